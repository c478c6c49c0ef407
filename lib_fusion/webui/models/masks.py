"""Painted masks in the host: read from a request, kept by the hash of their pixels, and cut to what a pass makes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from modules import images, paths, shared
from PIL import Image

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.files import write_whole
from lib_fusion.fusion.places import Places, make_places, read_boxes, read_mask
from lib_fusion.requests.settings import PAINTED, ExpertSettings, FusionSettings

#: Where masks are kept, in the WebUI's data directory.
FOLDER = "denoiser-fusion-masks"
#: How many hex digits of a mask's hash are its name.
DIGITS = 12
INPAINT_REMEDY = "allowed in img2img with an inpaint mask"

#: Masks (1,1,h,w) in 0..1 by expert, 1 the first.
Masks = dict[int, torch.Tensor]


def settle(p: Any, settings: FusionSettings) -> tuple[FusionSettings, Masks]:
    """Settings whose painted places name their masks by hash, and the masks; raises SettingError.

    Masks that came with the request are kept in files, so that a hash alone brings them back.
    """
    masks, experts = {}, []
    for i, expert in enumerate(settings.experts):
        field = f"experts[{i}].place"
        read_boxes(expert.place, field)
        if expert.uses_inpaint:
            if getattr(p, "image_mask", None) is None:
                raise SettingError(field, expert.place, INPAINT_REMEDY)
        elif expert.is_painted:
            masks[i + 1], name = _find(expert, i)
            expert = replace(expert, place=f"{PAINTED} {name}", mask="")
        experts.append(expert)
    return replace(settings, experts=tuple(experts)), masks


def places_of(p: Any, settings: FusionSettings, masks: Mapping[int, torch.Tensor]) -> Places:
    """Where the experts of a pass draw, on what it makes; raises SettingError.

    Places are parts of the whole picture, of which "Only masked" inpainting makes a region.
    """
    inpainted, painted = getattr(p, "nmask", None), dict(masks)
    for i, expert in enumerate(settings.experts):
        if expert.uses_inpaint:
            if inpainted is None:
                raise SettingError(f"experts[{i}].place", expert.place, INPAINT_REMEDY)
            height, width = inpainted.shape[-2:]  # (C,h,w); forks put more dimensions before
            painted[i + 1] = inpainted.reshape(-1, height, width)[None, :1].float().cpu()
    places = make_places(settings, painted)
    if getattr(p, "paste_to", None) is None:
        return places
    maps = {i: values if settings.experts[i - 1].uses_inpaint else _crop(p, values)
            for i, values in places.maps.items()}  # fmt: skip
    return Places(maps, places.feather, places.strength)


def save_masks(p: Any, processed: Any, masks: Mapping[int, torch.Tensor]) -> None:
    """Saves the painted masks with each picture, where the host saves its own."""
    if not (masks and shared.opts.save_mask and p.save_samples()):
        return
    first = processed.index_of_first_image
    for i, text in enumerate(processed.infotexts[first : first + len(p.all_seeds)]):
        for expert, mask in masks.items():
            image = to_image(mask).resize((p.width, p.height), Image.Resampling.NEAREST)
            suffix = "-fusion-mask" if len(masks) == 1 else f"-fusion-mask-{expert}"
            images.save_image(image, p.outpath_samples, "", p.all_seeds[i], p.all_prompts[i],
                              shared.opts.samples_format, info=text, p=p, suffix=suffix)  # fmt: skip


def to_image(mask: torch.Tensor) -> Image.Image:
    """A map (1,1,h,w) in 0..1 as a grey picture."""
    return Image.fromarray((mask[0, 0] * 255).round().to(torch.uint8).numpy())


def folder() -> Path:
    return Path(paths.data_path) / FOLDER


def _find(expert: ExpertSettings, i: int) -> tuple[torch.Tensor, str]:
    """An expert's mask and its hash: the one in the request, or the kept one that its place names."""
    name = expert.place.strip().lower().partition(" ")[2].strip()
    if expert.mask:
        mask = _decode(expert.mask, f"experts[{i}].mask")
        digest = _keep(mask)
        if name not in ("", digest):
            raise SettingError(f"experts[{i}].place", expert.place, f"allowed with this mask: {PAINTED}")
        return mask, digest
    if not name:
        remedy = f"allowed with place {PAINTED}: paint on expert {i + 1}'s canvas, or send a picture file in base64"
        raise SettingError(f"experts[{i}].mask", expert.mask, remedy)
    return _load(name, expert, i), name


def _decode(text: str, field: str) -> torch.Tensor:
    """A mask (1,1,h,w) from base64, with or without a data URL's beginning; raises SettingError."""
    plain = text.partition(",")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode(plain, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SettingError(field, text, "allowed: a picture file in base64") from error
    return read_mask(data, field, text)


def _keep(mask: torch.Tensor) -> str:
    """Writes a mask into its file, unless it is there; returns its hash. Raises FusionError."""
    image = to_image(mask)
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()[:DIGITS]
    path = folder() / f"{digest}.png"
    if path.is_file():
        return digest
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, lambda partial: image.save(partial, "PNG"), partial)
    except OSError as error:
        raise FusionError(f"{FOLDER}: the mask can't be written ({error}); make room or allow writing") from error
    return digest


def _load(name: str, expert: ExpertSettings, i: int) -> torch.Tensor:
    """The kept mask of a hash; raises SettingError. No other name is looked for."""
    path, field = folder() / f"{name}.png", f"experts[{i}].place"
    if not re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", name) or not path.is_file():
        remedy = f"the mask of this hash is not in {FOLDER}; paint it again and set the place to {PAINTED}"
        raise SettingError(field, expert.place, remedy)
    return read_mask(path.read_bytes(), field, expert.place)


def _crop(p: Any, values: torch.Tensor) -> torch.Tensor:
    """A map for the region that is inpainted, cut out and resized as the host does with its own mask."""
    left, top, width, height = p.paste_to
    whole = to_image(values).resize(p.image_mask.size, Image.Resampling.NEAREST)
    part = images.resize_image(2, whole.crop((left, top, left + width, top + height)), p.width, p.height)
    return torch.from_numpy(np.asarray(part.convert("L")).copy()).float()[None, None] / 255
