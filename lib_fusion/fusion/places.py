"""Places: where an expert draws because somebody said so, by a painted mask or by rectangles."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from lib_fusion.errors import SettingError
from lib_fusion.requests.settings import AUTO, INPAINT, PAINTED, FusionSettings

ALLOWED = (
    "allowed: auto; mask; rectangles as LEFT,TOP,WIDTH,HEIGHT in 0..1 with ; between them; a part of the picture such "
    "as columns 1:1 2 (the second of two) or rows 2:1 1; inpaint, in img2img with an inpaint mask"
)
#: Side of the maps that rectangles are drawn on, before they are resized to the latents.
CANVAS = 512
#: The most pixels of a painted mask.
LARGEST_MASK = 64_000_000
#: A feather below this (latent pixels) is none.
SHARP = 0.05
#: Keeps the logarithm of a prior finite where a mask is black.
EPSILON = 1e-3

#: Left, top, width and height, in 0..1 of the picture.
Box = tuple[float, float, float, float]


def read_boxes(text: str, field_name: str) -> list[Box] | None:
    """The rectangles of a place's text; None for ``auto``, ``mask`` and ``inpaint``. Raises SettingError.

    ``columns 1:2:1 3`` is the third of three columns, whose widths are as 1 to 2 to 1; ``rows`` likewise.
    """
    plain = " ".join(text.lower().split())
    if plain in ("", AUTO, INPAINT) or plain.partition(" ")[0] == PAINTED:
        return None
    try:
        part = re.fullmatch(r"(columns|rows) ([\d.]+(?::[\d.]+)*) (\d+)", plain)
        boxes = [_part(*part.groups())] if part else [_box(box) for box in plain.split(";") if box.strip()]
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise SettingError(field_name, text, ALLOWED) from error
    if not boxes:
        raise SettingError(field_name, text, ALLOWED)
    return boxes


def _part(direction: str, ratios: str, number: str) -> Box:
    sizes = [float(size) for size in ratios.split(":")]
    if int(number) < 1 or min(sizes) <= 0:
        raise ValueError
    start, size = sum(sizes[: int(number) - 1]) / sum(sizes), sizes[int(number) - 1] / sum(sizes)
    return (start, 0.0, size, 1.0) if direction == "columns" else (0.0, start, 1.0, size)


def _box(text: str) -> Box:
    left, top, width, height = (float(number) for number in text.split(","))
    if not (0 <= left < 1 and 0 <= top < 1 and 0 < width <= 1 - left + 1e-6 and 0 < height <= 1 - top + 1e-6):
        raise ValueError
    return left, top, width, height


def draw_boxes(boxes: Sequence[Box]) -> torch.Tensor:
    """A map (1,1,512,512), one within the rectangles and zero elsewhere."""
    canvas = torch.zeros(1, 1, CANVAS, CANVAS)
    for left, top, width, height in boxes:
        rows = slice(round(top * CANVAS), round((top + height) * CANVAS))
        canvas[..., rows, round(left * CANVAS) : round((left + width) * CANVAS)] = 1
    return canvas


@dataclass
class Places:
    """The maps (1 or B,1,h,w) in 0..1 of the experts that have a place, by their number in the pass (1 the first).

    ``feather`` is the softness of their edges in latent pixels. ``strength`` says how much a place counts against
    saliency: 1 the place alone, 0 saliency alone, between the two a prior on it.
    """

    maps: Mapping[int, torch.Tensor] = field(default_factory=dict)
    feather: float = 0.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        self._resized: dict[tuple, dict[int, torch.Tensor]] = {}
        self._cover: dict[tuple[int, ...], bool] = {}
        self._empty = {model for model, values in self.maps.items() if not bool((values > 0.5).any())}

    def is_empty(self, model: int) -> bool:
        """Whether a model has a place without any position in it."""
        return model in self._empty

    def rules(self, model: int) -> bool:
        """Whether a model draws in its place and nowhere else, so that it needs no saliency."""
        return model in self.maps and self.strength == 1

    def cover(self, models: Collection[int]) -> bool:
        """Whether the places of these models leave nothing of the picture to others."""
        key = tuple(models)
        if key not in self._cover:
            self._cover[key] = self._covers([self.maps[model] for model in models if self.rules(model)])
        return self._cover[key]

    def _covers(self, ruled: Sequence[torch.Tensor]) -> bool:
        if not ruled:
            return False
        size = (min(m.shape[-2] for m in ruled), min(m.shape[-1] for m in ruled))
        total = torch.stack([F.interpolate(m.float(), size=size, mode="area").amin(0) for m in ruled]).sum(0)
        return bool((total >= 1 - 1e-6).all())

    def at(self, size: Sequence[int], device: torch.device) -> dict[int, torch.Tensor]:
        """The maps (1 or B,1,H,W) at a latent's size, which add up to one at most; made once for each size."""
        key = (*size, device)
        if key not in self._resized:
            left, maps = torch.ones(1), {}
            for model in self.maps:  # where two overlap, the first has it
                maps[model] = torch.minimum(self._fit(model, size), left)
                left = left - maps[model]
            self._resized[key] = {model: values.to(device) for model, values in maps.items()}
        return self._resized[key]

    def prior(self, model: int, size: Sequence[int], device: torch.device) -> torch.Tensor | None:
        """What a place adds to a model's log-map (1 or B,1,H,W): ``beta log(M + 0.001)``, beta = s / (1 - s).

        The base's place is what the experts' leave over. None where it adds nothing.
        """
        if not self.maps or self.strength in (0, 1) or (model and model not in self.maps):
            return None
        maps = self.at(size, device)
        own = maps[model] if model else (1 - sum(maps.values(), torch.zeros(1, device=device))).clamp_min(0)
        return self.strength / (1 - self.strength) * (own + EPSILON).log()

    @property
    def reach(self) -> int:
        """How far soft edges go beyond a place, in latent pixels."""
        return 0 if self.feather < SHARP else math.ceil(3 * self.feather)

    def hard(self, model: int, size: Sequence[int]) -> torch.Tensor:
        """A model's own map (1 or B,1,H,W) at a latent's size with sharp edges: zeros and ones."""
        return (F.interpolate(self.maps[model].float(), size=tuple(size), mode="area") > 0.5).float()

    def _fit(self, model: int, size: Sequence[int]) -> torch.Tensor:
        hard = self.hard(model, size)
        if not self.reach:
            return hard
        reach = min(self.reach, *(side - 1 for side in size))
        line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / self.feather) ** 2)
        line = line / line.sum()
        padded = F.pad(hard, (reach,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(padded, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1)).clamp(0, 1)


def make_places(settings: FusionSettings, painted: Mapping[int, torch.Tensor]) -> Places:
    """The places that the settings ask for; ``painted``: the masks (1 or B,1,h,w) in 0..1 by expert, 1 the first.

    Raises SettingError where a place can't be read, or a painted mask is missing or not asked for.
    """
    maps = {}
    for i, expert in enumerate(settings.experts):
        name = f"experts[{i}].place"
        boxes = read_boxes(expert.place, name)
        if expert.is_painted != (i + 1 in painted):
            missing = "allowed: auto or rectangles, since there is no mask for this expert"
            raise SettingError(name, expert.place, missing if expert.is_painted else "allowed with a mask: mask")
        if expert.is_painted:
            maps[i + 1] = painted[i + 1].float()
        elif boxes is not None:
            maps[i + 1] = draw_boxes(boxes)
    return Places(maps, settings.place_feather, settings.place_strength)


def read_mask(data: bytes, field_name: str, shown: str) -> torch.Tensor:
    """A picture file's brightness, (1,1,h,w) in 0..1; transparent pixels are black. Raises SettingError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST_MASK:
                raise ValueError
            layer = image.convert("RGBA")
            grey = Image.composite(layer.convert("L"), Image.new("L", layer.size), layer.getchannel("A"))
            return torch.from_numpy(np.asarray(grey).copy()).float()[None, None] / 255
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        allowed = f"allowed: a picture file of at most {LARGEST_MASK // 10**6} million pixels"
        raise SettingError(field_name, shown, allowed) from error
