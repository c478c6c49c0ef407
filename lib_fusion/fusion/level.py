"""How noisy the latents of a step are: one small type for what samplers, U-Nets and methods each say differently."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lib_fusion.methods.freeu import step_at
from lib_fusion.methods.skipping import SAME_LEVEL


@dataclass(frozen=True)
class Level:
    """The noise level of one step.

    ``timestep``: what the U-Net is given, 0..1000. ``alpha``: the cumulated alpha in (0, 1), the picture's share of the
    latents' variance. ``position``: which step of the pass this is, 0 the first; a fraction where a sampler evaluates
    between two steps. ``is_last``: whether the pass ends with it. ``stride``: how far the step goes in log sigma, in
    multiples of the pass's mean step; infinite where it ends without noise.
    """

    timestep: float
    alpha: float
    position: float = 0.0
    is_last: bool = False
    stride: float = 1.0

    @property
    def log_sigma(self) -> float:
        """The logarithm of sigma, the noise's standard deviation where the picture's is one."""
        return math.log((1 - self.alpha) / self.alpha) / 2

    @property
    def signal(self) -> float:
        """``sqrt(alpha)``, the factor of the picture in variance-preserving latents."""
        return math.sqrt(self.alpha)

    @property
    def noise(self) -> float:
        """``sqrt(1 - alpha)``, the factor of the noise in variance-preserving latents."""
        return math.sqrt(1 - self.alpha)


@dataclass(frozen=True)
class Schedule:
    """The falling noise levels of a pass, sigmas or timesteps: step i goes from ``levels[i]`` to ``levels[i + 1]``.

    ``sigmas``: the same as sigmas, where somebody wants to know how long the steps are.
    """

    levels: Sequence[float] = (1000.0, 0.0)
    sigmas: Sequence[float] = ()

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def level(self, value: float, timestep: float, alpha: float) -> Level:
        """The level of the step that begins at ``value``, written as in ``levels``."""
        is_last = value <= self.levels[-2] * (1 + 1e-6)
        level = Level(timestep, alpha, step_at(value, self.levels), is_last)
        return replace(level, stride=self._stride(level.log_sigma)) if self.sigmas else level

    def _stride(self, log_sigma: float) -> float:
        logs = [math.log(sigma) for sigma in self.sigmas if sigma > 0]
        following = [value for value in logs if value < log_sigma - SAME_LEVEL]
        if not following:
            return math.inf
        return (log_sigma - following[0]) / ((logs[0] - logs[-1]) / (len(logs) - 1))
