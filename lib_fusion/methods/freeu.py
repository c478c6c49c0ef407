"""FreeU (Si et al., "FreeU: Free Lunch in Diffusion U-Net", CVPR 2024): the decoder's two inputs, re-weighted.

A decoder block is given ``[h | skip]``: the backbone's features so far, and those that an encoder block has stored.

1. Half of the backbone's channels are multiplied by b: evenly in version 1, in version 2 (the CVPR paper's eq. 4 and 5)
   by more where the mean over all channels is large                                             -> ``scale_backbone``
2. The lowest frequencies of the skip features are multiplied by s (eq. 6 to 8)                   -> ``filter_skip``

The official code filters with a Fourier transform, whose mask keeps the frequencies ``-r .. r-1`` of both axes; r is 1.
That filter is a projection on few waves, so here it is two thin matrix products, in real numbers and on any device.

``Stage`` holds the factors of one stage of the decoder, ``FreeU`` applies them, ``strength`` is the schedule. The
window of channels, the cutoff, the high-end factor and the schedule are those of ljleb's sd-webui-freeu.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

#: Devices whose autocast can be switched off; under it matrix products would be half precise.
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu")


@dataclass(frozen=True)
class Stage:
    """What is done at the blocks of one stage; 1 is neutral for all factors.

    ``backbone`` (b) scales the channels from ``offset`` on, as many as ``width`` says (both parts of all channels in
    0..1, around the end if need be). ``skip`` (s) scales frequencies up to ``cutoff`` (0..1 of the highest; 0: the
    published threshold), ``high`` those above.
    """

    backbone: float = 1.0
    skip: float = 1.0
    offset: float = 0.0
    width: float = 0.5
    high: float = 1.0
    cutoff: float = 0.0

    @property
    def is_neutral(self) -> bool:
        return self.backbone == self.skip == self.high == 1

    def at(self, strength: float) -> Stage:
        """The stage with its factors drawn towards 1: 0 is neutral, 1 the stage itself."""
        if strength == 1:
            return self
        factors = {name: 1 + strength * (getattr(self, name) - 1) for name in ("backbone", "skip", "high")}
        return replace(self, **factors)


class FreeU:
    """FreeU during one sampling pass: ``stages`` by their channels in multiples of the U-Net's model channels.

    ``strength`` (0..1) is set before each call of a U-Net; 0, as at first, leaves everything as it is.
    """

    def __init__(self, stages: Mapping[int, Stage], version: int = 2) -> None:
        self.stages = {multiple: stage for multiple, stage in stages.items() if not stage.is_neutral}
        self.version = version
        #: Whether it was to act in a call, and whether it has.
        self.was_due = self.has_acted = False
        self._strength = 0.0
        self._bands: dict[tuple, LowBand] = {}

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = value
        self.was_due = self.was_due or (value != 0 and bool(self.stages))

    def edit_(self, features: torch.Tensor, h_channels: int, multiple: int) -> None:
        """Edits ``[h | skip]`` (B,C,H,W) in place; ``multiple`` says which stage it is given to."""
        if self.strength == 0 or multiple not in self.stages:
            return
        self.has_acted = True
        stage = self.stages[multiple].at(self.strength)
        scale_backbone_(features[:, :h_channels], stage.backbone, self.version, stage.offset, stage.width)
        if stage.skip == stage.high == 1:
            return
        skip = features[:, h_channels:]
        key = (skip.shape, stage.cutoff, skip.device, skip.dtype)
        band = self._bands.get(key)
        if band is None:
            band = self._bands[key] = LowBand.like(skip, stage.cutoff)
        band.scale_(skip, stage.skip, stage.high)


def scale_backbone(
    h: torch.Tensor, factor: float, version: int = 2, offset: float = 0.0, width: float = 0.5
) -> torch.Tensor:
    """Backbone features (B,C,H,W) with a window of their channels (by default the first half) scaled by b.

    Version 1: by ``factor``. Version 2: by ``1 + (factor - 1) m``, where m is the mean over all channels, normalised
    per sample to 0..1 by its least and largest value; a map that is constant gives 1. Any dtype; m is in float32.
    """
    return scale_backbone_(h.clone(memory_format=torch.contiguous_format), factor, version, offset, width)


def scale_backbone_(
    h: torch.Tensor, factor: float, version: int = 2, offset: float = 0.0, width: float = 0.5
) -> torch.Tensor:
    """``scale_backbone`` in place."""
    if factor == 1:
        return h
    flat = h.flatten(2)
    channels = h.shape[1]
    start = round(offset * channels) % channels
    stop = start + round(width * channels)
    windows = [flat[:, start:stop]] if stop <= channels else [flat[:, start:], flat[:, : stop - channels]]
    normalised = None if version == 1 else normalised_mean(flat)
    for window in windows:
        if normalised is None:
            window.mul_(factor)
        else:
            window.mul_(1 + (factor - 1) * normalised)  # not addcmul_, whose writes into slices MPS may lose
    return h


def normalised_mean(h: torch.Tensor) -> torch.Tensor:
    """The mean over channels of (B,C,HW), from 0 at its least to 1 at its largest of each sample: (B,1,HW)."""
    mean = h.mean(dim=1, keepdim=True, dtype=_wide(h.dtype))
    low, high = mean.aminmax(dim=2, keepdim=True)
    span = high.sub_(low).clamp_min_(torch.finfo(mean.dtype).tiny)  # a constant map: 0 everywhere, not 0/0
    return mean.sub_(low).div_(span)


def filter_skip(
    skip: torch.Tensor, scale: float, cutoff: float | None = None, high: float = 1.0
) -> torch.Tensor:
    """Skip features (B,C,H,W) with their low frequencies scaled by ``scale`` and all others by ``high``.

    Low are ``-r .. r-1`` of both axes, r = ``cutoff`` (0..1) of the axis' highest frequency and at least 1, which is
    the published threshold and what None stands for. The set is not symmetric; as in the official code the real part
    is taken. Any dtype and size; computed in float32, or in float64 for float64.
    """
    skip = skip.clone(memory_format=torch.contiguous_format)
    if scale == high == 1:
        return skip
    return LowBand.like(skip, cutoff or 0.0).scale_(skip, scale, high)


class LowBand:
    """The low frequencies of maps of one shape: their projection, made once and applied to any number of maps.

    With E the waves ``exp(i (f y + g x))`` of all f, g in the band, over ``sqrt(HW)``, the low part of a map is
    ``Re(E E* map) = P P' map``, where P are the real and imaginary parts of E, side by side. For r = 1 these are seven
    columns. For larger bands the axes are taken one at a time: ``Re(A map B') = Re A map Re B' - Im A map Im B'``.
    """

    def __init__(self, shape: Sequence[int], cutoff: float, **made: Any) -> None:
        batch, channels, height, width = shape
        f, g = (_low_frequencies(size, cutoff) for size in (height, width))
        self.waves: torch.Tensor | None = None
        self.axes: list[list[torch.Tensor]] = []
        if len(f) * len(g) <= 4:
            angles = [_angles(height, a)[:, None] + _angles(width, b)[None] for a in f for b in g]
            waves = [wave for angle in angles for wave in (angle.cos(), angle.sin()) if wave.any()]
            stacked = (torch.stack(waves).flatten(1) / math.sqrt(height * width)).to(**made)
            self.waves = stacked.expand(batch, -1, -1)
            self._parts = torch.empty((batch, len(waves), channels), **made)
            self._parts_turned = self._parts.transpose(1, 2)
        else:
            self.axes = [[part.to(**made) for part in _projector(*axis)] for axis in ((height, f), (width, g))]

    @classmethod
    def like(cls, maps: torch.Tensor, cutoff: float) -> LowBand:
        """For (B,C,H,W) of this shape, device and dtype."""
        return cls(maps.shape, cutoff, device=maps.device, dtype=_wide(maps.dtype))

    def scale_(self, maps: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """Scales the low part of (B,C,H,W) by ``low`` and the rest by ``high``, in place."""
        wide = maps.to(_wide(maps.dtype))
        if self.waves is not None:
            # Autocast leaves products alone that have a place to go. In this order they are fastest on a CPU.
            flat = wide.flatten(2)
            torch.bmm(self.waves, flat.transpose(1, 2), out=self._parts)
            scaled = torch.empty_like(flat, memory_format=torch.contiguous_format)
            torch.baddbmm(flat, self._parts_turned, self.waves, beta=high, alpha=low - high, out=scaled)
        else:
            device = maps.device.type
            with torch.autocast(device, enabled=False) if device in AUTOCAST_DEVICES else nullcontext():
                (re_a, im_a), (re_b, im_b) = self.axes
                part = re_a @ (wide @ re_b.T) - im_a @ (wide @ im_b.T)
            scaled = (wide * high).add_(part, alpha=low - high)
        return maps.copy_(scaled.view(maps.shape))  # into a slice, only copy_ and mul_ are sure to write on MPS


def _low_frequencies(size: int, cutoff: float) -> range:
    """The frequencies of the official code's slice ``[size//2 - r, size//2 + r)`` after its shift."""
    half = size // 2
    r = max(1, math.floor(half * cutoff))
    return range(-min(r, half), r)


def _angles(size: int, frequency: int) -> torch.Tensor:
    return 2 * math.pi * frequency / size * torch.arange(size, dtype=torch.float64)


def _projector(size: int, frequencies: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of the projection (size,size) of one axis on the frequencies."""
    waves = torch.stack([torch.polar(torch.ones(size, dtype=torch.float64), _angles(size, f)) for f in frequencies])
    projection = waves.T @ waves.conj() / size
    return projection.real, projection.imag


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def strength(step: float, steps: int, start: float, stop: float, smooth: float) -> float:
    """How strongly FreeU acts, 0..1, at ``step`` of ``steps`` (0 is the first; between two where a sampler goes there).

    ``start`` and ``stop``: parts of the steps up to 1, numbers of steps above. ``smooth`` 0 switches: fully on from
    start until stop, else off. 1 is a ramp: up to start, down to stop. Between, the two are mixed.
    """
    first, last = (whole_steps(value, steps) for value in (start, stop))
    if first >= last:
        return 0.0
    flat = 1.0 if first <= step < last else 0.0
    ramp = step / first if step < first else max(0.0, (last - step) / (last - first))
    return flat + smooth * (ramp - flat)


def whole_steps(value: float, steps: int) -> int:
    """A number of steps from a part of all (up to 1, rounded down) or a number (above 1)."""
    return math.floor((value * steps if value <= 1 else value) + 1e-6)


def step_at(level: float, levels: Sequence[float]) -> float:
    """Which step has this noise level, where step i goes from ``levels[i]`` down to ``levels[i + 1]``.

    Levels are sigmas or timesteps. Between two, as a second-order sampler evaluates, the step is a fraction.
    """
    for i, end in enumerate(levels):
        if level >= end:
            if i == 0:
                return 0.0
            return i - (level - end) / (levels[i - 1] - end)
    return float(len(levels) - 1)
