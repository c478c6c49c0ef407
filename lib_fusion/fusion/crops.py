"""Crops: a model whose place is given is run on the box of that place, with a margin, and not on the whole picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lib_fusion.fusion.places import Places

#: A latent pixel's side in pixels.
PIXELS = 8
#: How much a model sees around its place, in latent pixels.
MARGIN = 8
#: A box that is more of the picture than this is not worth it: the model is run on the whole picture.
LARGEST = 0.75
#: A box begins and ends at multiples of this (latent pixels), by the kind of U-Net, or at the picture's edge: so often
#: does the U-Net halve its features.
STEPS = {"sdxl": 4}
STEP = 8


@dataclass(frozen=True)
class Box:
    """A rectangle of latents (..,H,W), in latent pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """The rectangle (..,height,width) of values (..,H,W): a view."""
        return values[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def paste(self, values: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """``into`` (..,H,W) with ``values`` (..,height,width) in the rectangle, in place."""
        self.cut(into).copy_(values)
        return into

    def in_pixels(self, corner: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Top left and size (height, width) in pixels, of a picture whose top left is ``corner``."""
        top, left = corner[0] + PIXELS * self.top, corner[1] + PIXELS * self.left
        return (top, left), (PIXELS * self.height, PIXELS * self.width)

    def share(self, size: Sequence[int]) -> float:
        """The rectangle's part of a picture of this size (H, W)."""
        return self.height * self.width / (size[-2] * size[-1])


def box_around(region: torch.Tensor, margin: int, step: int) -> Box | None:
    """The box of a region, bool (H,W), grown by a margin and to multiples of ``step``; None where it is too large.

    It ends at the picture's edges, which may be at no such multiple. An empty region has no box.
    """
    if not bool(region.any()):
        return None
    spans = []
    for side, line in zip(region.shape, (region.any(1), region.any(0))):
        filled = line.nonzero().flatten().tolist()
        start = max(filled[0] - margin, 0) // step * step
        stop = min(-(-(filled[-1] + 1 + margin) // step) * step, side)
        spans.append((start, stop - start))
    (top, height), (left, width) = spans
    box = Box(top, left, height, width)
    return box if box.share(region.shape) <= LARGEST else None


class Crops:
    """The boxes of the models of a pass. ``weights``: each model's, the base first; ``kinds``: of their U-Nets."""

    def __init__(self, places: Places, weights: Sequence[float], kinds: Sequence[str]) -> None:
        self.places, self.weights = places, weights
        self._steps = [STEPS.get(kind, STEP) for kind in kinds]
        self._margin = max(MARGIN, places.reach)
        self._boxes: dict[tuple, Mapping[int, Box]] = {}

    def of(self, models: Sequence[int], size: Sequence[int]) -> Mapping[int, Box]:
        """The boxes of these models, whose places alone divide latents of this size (H, W); made once for each.

        The base (0) draws what the others' places leave, and where one of them has less than full weight. A model
        that draws in a box of more than three quarters has none; nor has any where pictures have masks of their own.
        """
        key = (*models, *size)
        if key not in self._boxes:
            self._boxes[key] = self._make(models, size)
        return self._boxes[key]

    def _make(self, models: Sequence[int], size: Sequence[int]) -> dict[int, Box]:
        regions = {model: self.places.hard(model, size) for model in models if model}
        if any(len(region) > 1 for region in regions.values()):
            return {}
        taken = [region for model, region in regions.items() if self.weights[model] == 1]
        regions[0] = 1 - torch.stack(taken).amax(0) if taken else torch.ones(1, 1, *size)
        boxes = {model: box_around(regions[model][0, 0] > 0.5, self._margin, self._steps[model]) for model in models}
        return {model: box for model, box in boxes.items() if box is not None}
