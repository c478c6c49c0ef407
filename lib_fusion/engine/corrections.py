"""Sampler steps that can be taken again: what a computed noise says about a skipped one corrects the latent."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin

from lib_fusion.fusion.policies import Correction
from lib_fusion.fusion.session import FusionSession


@dataclass
class Step:
    """One step as it was taken: the sampler before it, the latent (B,C,H,W), and each model's noise (B,2,C,H,W)."""

    sampler: SchedulerMixin
    timestep: torch.Tensor
    latent: torch.Tensor
    noises: dict[int, torch.Tensor]


class SamplerSteps:
    """Takes a sampler's steps under a session, and keeps as many as a correction may reach back to."""

    def __init__(self, sampler: SchedulerMixin, session: FusionSession, guidance_scale: float) -> None:
        self.sampler, self.session, self.guidance_scale = sampler, session, guidance_scale
        self._taken: dict[float, Step] = {}

    def take(self, noises: dict[int, torch.Tensor], t: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """The latent after this step, from that before it and each model's noise (B,2,C,H,W), cond and uncond."""
        skips = self.session.skips
        if skips is not None and skips.reach:
            kept = list(self._taken.items())[-skips.reach + 1 :] if skips.reach > 1 else []
            self._taken = {**dict(kept), skips.log_sigma: Step(snapshot(self.sampler), t, latent, noises)}
        return self._step(noises, t, latent)

    def correct(self, corrections: Sequence[Correction], latent: torch.Tensor) -> torch.Tensor:
        """The latent where the sampler stands, had it known the corrected noises."""
        levels = list(self._taken)
        first = len(levels)
        for correction in corrections:
            if correction.log_sigma in self._taken:
                self._taken[correction.log_sigma].noises[correction.model][correction.picture] += correction.change
                first = min(first, levels.index(correction.log_sigma))
        for level in levels[first:]:
            step = self._taken[level]
            if level == levels[first]:
                self.sampler, latent = step.sampler, step.latent
            step.sampler, step.latent = snapshot(self.sampler), latent
            latent = self._step(step.noises, step.timestep, latent)
        return latent

    def _step(self, noises: dict[int, torch.Tensor], t: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        cond, uncond = ({i: noise[:, half] for i, noise in noises.items()} for half in (0, 1))
        c, u = self.session.fuse(float(t), cond, uncond, self.guidance_scale)
        return self.sampler.step(u + self.guidance_scale * (c - u), t, latent).prev_sample


def snapshot(sampler: SchedulerMixin) -> SchedulerMixin:
    """The sampler in its present state; the predictions that a multistep sampler remembers are shared, not copied."""
    result = copy.copy(sampler)
    for name, value in vars(sampler).items():
        if isinstance(value, list):
            setattr(result, name, list(value))
    return result
