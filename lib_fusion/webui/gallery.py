"""Adds previews to the pictures that the host shows, and saves them where it saves such extras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules import images, shared

from lib_fusion import previews
from lib_fusion.session import MaskRecord


def add_masks(p: Any, processed: Any, batches: list[list[MaskRecord]], models: list[str]) -> None:
    """A strip of masks after each picture (and what the host itself has put after it)."""
    first = processed.index_of_first_image
    pictures = min(len(processed.infotexts) - first, len(batches) * p.batch_size)
    each = (len(processed.images) - first) // max(pictures, 1)
    names = [Path(name).stem for name in models]
    for i in reversed(range(pictures)):  # so that what is inserted moves nothing that is still to come
        masks = [(mask.timestep, mask.winner[i % p.batch_size, 0]) for mask in batches[i // p.batch_size]]
        if not masks or not each:
            continue
        strip = previews.mask_strip(processed.images[first + i * each], masks, names, images.get_font)
        text = processed.infotexts[first + i]
        if p.save_samples():
            images.save_image(strip, p.outpath_samples, "", p.all_seeds[i], p.all_prompts[i],
                              shared.opts.samples_format, info=text, p=p, suffix="-fusion-masks")  # fmt: skip
        processed.images.insert(first + (i + 1) * each, strip)
        if each == 1:  # the gallery finds a picture's text by its place
            processed.infotexts.insert(first + i + 1, text)
