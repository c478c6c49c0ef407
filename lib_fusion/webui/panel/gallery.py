"""Adds previews to the pictures that the host shows, and saves them where it saves such extras."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from modules import images, shared

from lib_fusion.fusion.records import Records
from lib_fusion.previews import draw_previews
from lib_fusion.requests.settings import FusionSettings
from lib_fusion.unet.checkpoint import distinct_names


def add_previews(p: Any, processed: Any, kinds: Collection[str], batches: list[Records], settings: FusionSettings,
                 names: list[str], shown: bool = True) -> None:  # fmt: skip
    """Previews of these kinds after each picture (and what the host itself has put after it).

    ``batches``: the records of each; ``names``: the experts', for people. Not ``shown``, they are only saved.
    """
    first = processed.index_of_first_image
    pictures = min(len(processed.infotexts) - first, len(batches) * p.batch_size)
    each = (len(processed.images) - first) // max(pictures, 1)
    models = ["base", *distinct_names(names)]
    for i in reversed(range(pictures if each else 0)):  # so that what is inserted moves nothing that is still to come
        records = batches[i // p.batch_size].of(i % p.batch_size)
        picture, text = processed.images[first + i * each], processed.infotexts[first + i]
        drawn = list(draw_previews(kinds, picture, records, models, settings, images.get_font))
        for kind, image in reversed(drawn):
            if p.save_samples():
                images.save_image(image, p.outpath_samples, "", p.all_seeds[i], p.all_prompts[i],
                                  shared.opts.samples_format, info=text, p=p, suffix=f"-fusion-{kind}")  # fmt: skip
            if not shown:
                continue
            processed.images.insert(first + (i + 1) * each, image)
            if each == 1:  # the gallery finds a picture's text by its place
                processed.infotexts.insert(first + i + 1, text)
