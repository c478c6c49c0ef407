"""SADA and ZEUS, two other accelerators without training, as policies of the engine's skipping: controls.

Written from their papers and checked against their official code (github.com/Ting-Justin-Jiang/sada-icml, .../ZEUS),
whose token pruning is left out. Both decide after each step whether the next prediction is left out, by constants for
50 steps that are scaled here to other numbers.

- **SADA** (Jiang et al., "SADA: Stability-guided Adaptive Diffusion Acceleration", ICML 2025) extrapolates the latent
  by a third-order Adams-Bashforth step, and skips where its error and the ODE's second difference point away from each
  other.
- **ZEUS** (arXiv 2604.01552, 2026) skips by a fixed pattern, and extrapolates the noise from the last two.

The demos of both interpolate the denoised prediction in the second half instead (Lagrange), three steps of four.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib_fusion.engine.samplers import is_sigma_scaled, make_scheduler, sigmas_of
from lib_fusion.methods.skipping import Policy


@dataclass(frozen=True)
class Course:
    """A sampler's steps: each one's beta and sigma, the sigma that the last ends at, and how it holds its latents."""

    betas: tuple[float, ...]
    sigmas: tuple[float, ...]
    is_sigma_scaled: bool

    @classmethod
    def of(cls, sampler: str, steps: int) -> Course:
        scheduler = make_scheduler(sampler, steps)
        betas = [float(scheduler.betas[int(t)]) for t in scheduler.timesteps]
        return cls(tuple(betas), tuple(sigmas_of(scheduler)), is_sigma_scaled(scheduler))

    @property
    def steps(self) -> int:
        return len(self.betas)

    def alpha(self, step: int) -> float:
        """The factor of the picture in the variance-preserving latent."""
        return (1 + self.sigmas[step] ** 2) ** -0.5

    def sigma(self, step: int) -> float:
        """The factor of the noise in the variance-preserving latent."""
        return self.sigmas[step] * self.alpha(step)


@dataclass(frozen=True)
class Plan:
    """Where skipping is decided: after the steps from ``first`` on and before ``end``, at most ``most`` in a row.

    From ``lagrange_from`` on, three of four are skipped by Lagrange; None: nowhere.
    """

    first: int
    end: int
    lagrange_from: int | None
    most: int

    #: Lagrange's interval and the number of its points.
    INTERVAL, POINTS = 4, 4

    @classmethod
    def of(cls, steps: int, first: int, end: int, lagrange_from: int | None, most: int) -> Plan:
        """The numbers for 50 steps, scaled; without Lagrange where its points would not be there in time."""
        scale = steps / 50
        if lagrange_from is not None:
            lagrange_from = round(lagrange_from * scale / cls.INTERVAL) * cls.INTERVAL
            lagrange_from = lagrange_from if lagrange_from > cls.INTERVAL * (cls.POINTS - 1) else None
        return cls(max(3, round(first * scale)), round(end * scale), lagrange_from, most)


class Peer(Policy):
    """What both have in common. It is asked once a step; its rows are all the guided noise."""

    def __init__(self, course: Course, plan: Plan) -> None:
        super().__init__()
        self.course, self.plan = course, plan
        self._step = -1  # the one that is asked about
        self._skips, self._in_row, self._by_lagrange = False, 0, False
        self._rows = 1
        self._latent = torch.zeros(0)  # variance-preserving, of the last step
        self._noises: list[torch.Tensor] = []  # the computed one that each of the last two steps had at hand
        self._points: list[tuple[int, torch.Tensor]] = []  # Lagrange's

    def wants(self, step: int, following: torch.Tensor) -> bool:
        """Whether the prediction after ``step`` may be left out; ``following``: the latent (C,H,W) there."""
        raise NotImplementedError

    def extrapolate(self, step: int, latent: torch.Tensor) -> torch.Tensor:
        """The noise (C,H,W) of the skipped ``step`` at its latent."""
        raise NotImplementedError

    def watch(self, latent: torch.Tensor) -> None:
        step, plan = self._step, self.plan
        following = latent * self.course.alpha(step + 1) if self.course.is_sigma_scaled else latent
        in_lagrange = plan.lagrange_from is not None and step >= plan.lagrange_from
        wanted = self.wants(step, following)  # also takes notes
        if in_lagrange:
            wanted = step % plan.INTERVAL != 0
        self._skips = wanted and step >= 2 and plan.first <= step < plan.end and self._in_row < plan.most
        self._in_row = self._in_row + 1 if self._skips else 0
        self._by_lagrange = in_lagrange

    def may_skip(self, log_sigma: float, stride: float = 1.0) -> bool:
        self._step += 1
        return self._skips

    def estimate(self, log_sigma: float, stride: float = 1.0) -> float | None:
        return None

    def forecast(self, log_sigma: float, latent: torch.Tensor) -> torch.Tensor:
        step = self._step
        latent = latent * self.course.alpha(step)
        if self._by_lagrange:
            denoised = self._lagrange(step)
            noise = (latent - self.course.alpha(step) * denoised) / self.course.sigma(step)
        else:
            noise = self.extrapolate(step, latent)
        self._take(latent, self._noises[-1], noise)
        return noise.repeat(self._rows, 1, 1, 1)

    def observe(
        self, log_sigma: float, noise: torch.Tensor, weights: torch.Tensor, latent: torch.Tensor
    ) -> list[tuple[float, torch.Tensor]]:
        self._rows = len(noise)
        guided = (weights * noise).sum(0)
        self._take(latent * self.course.alpha(self._step), guided, guided)
        return []

    def _take(self, latent: torch.Tensor, at_hand: torch.Tensor, used: torch.Tensor) -> None:
        self._latent = latent
        self._noises = [*self._noises[-1:], at_hand]
        if self._step % self.plan.INTERVAL == 1:
            denoised = (latent - self.course.sigma(self._step) * used) / self.course.alpha(self._step)
            self._points = [*self._points[1 - self.plan.POINTS :], (self._step, denoised / self._scale(self._step))]

    def _lagrange(self, step: int) -> torch.Tensor:
        """The denoised prediction (C,H,W) at a step, by the polynomial in the step's number."""
        result = torch.zeros_like(self._points[0][1])
        for i, value in self._points:
            result += math.prod((step - j) / (i - j) for j, _ in self._points if j != i) * value
        return result * self._scale(step)

    def _scale(self, step: int) -> float:
        """The official code's Euler interpolates the denoised prediction divided by alpha."""
        return self.course.alpha(step) if self.course.is_sigma_scaled else 1.0


class Sada(Peer):
    """SADA's criterion and its extrapolation, with the official code's coefficients."""

    def __init__(self, course: Course, plan: Plan) -> None:
        super().__init__(course, plan)
        self._slopes: list[torch.Tensor] = []  # the probability-flow ODE's right-hand sides
        self._extrapolated = torch.zeros(0)

    def wants(self, step: int, following: torch.Tensor) -> bool:
        course = self.course
        speed = course.betas[step] * course.steps / 2
        slope = speed * (self._noises[-1] / course.sigma(step) - self._latent)
        before, self._slopes = self._slopes, [*self._slopes[-1:], slope]
        if len(before) < 2:
            return False
        second, last = before
        self._extrapolated = self._latent - (0.625 * slope + 0.75 * last - 0.375 * second) / course.steps
        curvature = slope - 2 * last + second
        return bool(((following - self._extrapolated) * curvature).mean() <= 0)

    def extrapolate(self, step: int, latent: torch.Tensor) -> torch.Tensor:
        """The last noise at the *extrapolated* latent gives the denoised prediction; this is its noise at this one."""
        return self._noises[-1] + (latent - self._extrapolated) / self.course.sigma(step)


class Zeus(Peer):
    """ZEUS's pattern: of each ``cycle`` steps the ones after step % cycle in ``skipped`` are left out."""

    def __init__(self, course: Course, plan: Plan, cycle: int, skipped: tuple[int, ...]) -> None:
        super().__init__(course, plan)
        self._cycle, self._skipped = cycle, skipped
        self._line = torch.zeros(0)

    def wants(self, step: int, following: torch.Tensor) -> bool:
        return step % self._cycle in self._skipped

    def extrapolate(self, step: int, latent: torch.Tensor) -> torch.Tensor:
        """The line through the last two predictions as if evenly spaced, and the last one itself, in turns."""
        if self._in_row == 1:
            self._line = 2 * self._noises[-1] - self._noises[-2]
        return self._line if self._in_row % 2 else self._noises[-1]


def make_sada(lagrange: bool) -> Callable[[Course], Peer]:
    return lambda course: Sada(course, Plan.of(course.steps, 10, 47, 24 if lagrange else None, 4))


def make_zeus(lagrange: bool, cycle: int = 3, skipped: tuple[int, ...] = (0, 1)) -> Callable[[Course], Peer]:
    return lambda course: Zeus(course, Plan.of(course.steps, 10, 45, 24 if lagrange else None, 6), cycle, skipped)


#: By name: what makes the policy of one picture. The first is the strongest of them, the last two the demos' settings.
PEERS: dict[str, Callable[[Course], Peer]] = {
    "ZEUS, 1 of 3 computed": make_zeus(lagrange=False),
    "SADA, no Lagrange": make_sada(lagrange=False),
    "ZEUS, 1 of 2 computed": make_zeus(lagrange=False, cycle=2, skipped=(1,)),
    "ZEUS": make_zeus(lagrange=True),
    "SADA": make_sada(lagrange=True),
}


def list_peers(steps: int) -> list[str]:
    """Those that differ with so many steps: with few of them the demos' settings have no room for Lagrange."""
    has_lagrange = Plan.of(steps, 10, 45, 24, 6).lagrange_from is not None
    return [name for name in PEERS if has_lagrange or name not in ("ZEUS", "SADA")]
