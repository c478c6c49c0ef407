"""A sampler whose steps can be taken again: what a computed noise shows about a skipped one corrects the latents."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin

from lib_fusion.fusion.policies import Correction
from lib_fusion.fusion.session import FusionSession
from lib_fusion.fusion.step import Step


@dataclass
class Taken:
    """One step as it was taken: the scheduler and the latents (B,C,H,W) before it, and its fusion step."""

    scheduler: SchedulerMixin
    timestep: torch.Tensor
    latents: torch.Tensor
    step: Step


class CorrectedSampler:
    """Takes a scheduler's steps under a session, and keeps as many as a correction may reach back to.

    ``generators``: each picture's, where the sampler adds noise; such steps are not corrected.
    """

    def __init__(
        self, scheduler: SchedulerMixin, session: FusionSession, generators: list[torch.Generator] | None = None
    ) -> None:
        self.scheduler, self.session = scheduler, session
        self._noise = {"generator": generators} if generators else {}
        if session.skips is not None and generators:
            session.skips.adds_noise, session.skips.reach = True, 0
        self._taken: dict[float, Taken] = {}

    def take(self, step: Step, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents (B,C,H,W) after this step, from those before it, which are corrected first."""
        skips = self.session.skips
        if skips is not None:
            latents = self.correct(skips.take_corrections(), latents)
            if skips.reach:
                kept = list(self._taken.items())[-skips.reach + 1 :] if skips.reach > 1 else []
                taken = Taken(snapshot(self.scheduler), t, latents, step)
                self._taken = {**dict(kept), step.level.log_sigma: taken}
        return self._step(step, t, latents)

    def correct(self, corrections: Sequence[Correction], latents: torch.Tensor) -> torch.Tensor:
        """The latents where the sampler stands, had it known the corrected noises."""
        levels = list(self._taken)
        first = len(levels)
        for correction in corrections:
            if correction.log_sigma in self._taken:
                taken = self._taken[correction.log_sigma]
                taken.step.correct(correction.model, correction.picture, correction.change)
                first = min(first, levels.index(correction.log_sigma))
        for level in levels[first:]:
            taken = self._taken[level]
            if level == levels[first]:
                self.scheduler, latents = taken.scheduler, taken.latents
            taken.scheduler, taken.latents = snapshot(self.scheduler), latents
            latents = self._step(taken.step, taken.timestep, latents)
        return latents

    def _step(self, step: Step, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        fused = step.fuse()
        cond, uncond = step.rows.combine(step.output() if fused is None else fused)
        guided = uncond + step.scale * (cond - uncond)
        return self.scheduler.step(guided, t, latents, **self._noise).prev_sample


def snapshot(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler in its present state; the predictions that a multistep one remembers are shared, not copied."""
    result = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(result, name, list(value))
    return result
