"""Skipping in the host: runs a model on the rows that need it, forecasts the others, and corrects the sampler's latent.

Corrections are exact where the sampler's step is known and its latent can be edited in place: k-diffusion's Euler and
DPM++ 2M, and DDIM. All are linear in the noise, so the same step is taken with the changes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from modules import sd_samplers_timesteps, shared

from lib_fusion.fusion.session import FusionSession
from lib_fusion.webui.sampling.contexts import Rows

#: The host's sampling functions whose steps can be corrected.
CORRECTED = ("sample_euler", "sample_dpmpp_2m", "ddim")
#: Runs a model on some rows, given their latents, timesteps, conditioning, and which of the step's they are.
Run = Callable[[torch.Tensor, torch.Tensor, dict[str, Any], Sequence[int]], torch.Tensor]


class StepSkips:
    """The skipping of one step. ``run`` of a model's rows computes those of the pictures that need it.

    ``latents`` are the step's rows (R,C,H,W) as the host has them, ``sigma`` its noise level or timestep.
    """

    def __init__(self, session: FusionSession, rows: Rows, denoiser: Any, latents: torch.Tensor, sigma: torch.Tensor,
                 alphas: torch.Tensor, guidance_scale: float) -> None:  # fmt: skip
        self.session, self.rows, self.skips = session, rows, session.skips
        level = float(sigma[0])
        self.alpha = alpha_of(denoiser, level, alphas)
        self.weights = row_weights(rows, guidance_scale, latents)
        self.owners = rows.owners(torch.device("cpu")).tolist()
        self._needed: dict[int, list[int]] = {}
        self._noises: dict[int, dict[int, torch.Tensor]] = {}
        first = latents[rows.first_rows()]
        scaled = first if has_timesteps(denoiser) else first * math.sqrt(self.alpha)
        is_last = level <= session.levels[-2] * (1 + 1e-6)
        log_sigma = math.log((1 - self.alpha) / self.alpha) / 2
        self.skips.begin_step(log_sigma, list(scaled), is_last)

    def run(self, model: int, x: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], chosen: range, together: bool,
            is_v: bool, call: Run) -> torch.Tensor:  # fmt: skip
        """A model's raw output (R,C,H,W) for the rows ``chosen`` of the step, which are those of one call.

        ``together``: where others have changed the U-Net, it is run for all rows or for none.
        """
        if model not in self._needed:
            self._needed[model] = self.skips.needed(model, together)
            pictures = range(len(self.rows.weights))
            self._noises[model] = {i: self.skips.forecast(model, i) for i in pictures if i not in self._needed[model]}
        start, owners = chosen.start, self.owners[chosen.start : chosen.stop]
        computed = [i for i, owner in enumerate(owners) if owner in self._needed[model]]
        raw = None
        if len(computed) == len(owners):
            raw = call(x, t, cond, chosen)
        elif computed:
            part = call(x[computed], t[computed], take_rows(cond, computed), [start + i for i in computed])
            raw = torch.zeros((len(x), *part.shape[1:]), dtype=part.dtype, device=part.device)
            raw[computed] = part
        self.session.count(model, len(computed), len(owners) - len(computed))
        a, b = (math.sqrt(self.alpha), math.sqrt(1 - self.alpha)) if is_v else (1.0, 0.0)  # noise = a raw + b x
        if raw is not None:
            self._keep(model, start, computed, a * raw + b * x if is_v else raw)
        for i, owner in enumerate(owners):
            if i not in computed:
                noise = self._noises[model][owner][self._place(start + i)].to(x.device)
                if raw is None:
                    raw = torch.zeros((len(x), *noise.shape), dtype=x.dtype, device=x.device)
                raw[i] = ((noise - b * x[i]) / a).to(raw.dtype)
        return raw

    def end(self) -> None:
        """All rows of the step are there: shows the computed ones to the policies."""
        for model, needed in self._needed.items():
            for picture in needed:
                self.skips.observe(model, picture, self._noises[model][picture], self.weights[picture])

    def _place(self, row: int) -> int:
        """Which of its picture's rows a row is: the parts of the prompt first, then the unconditional one."""
        if row >= self.rows.num_cond:
            return len(self.rows.weights[self.owners[row]])
        return row - self.rows.first_rows()[self.owners[row]]

    def _keep(self, model: int, start: int, computed: list[int], noise: torch.Tensor) -> None:
        for i in computed:
            picture = self.owners[start + i]
            if picture not in self._noises[model]:
                shape = (len(self.rows.weights[picture]) + 1, *noise.shape[1:])
                self._noises[model][picture] = torch.zeros(shape, dtype=torch.float32, device=noise.device)
            self._noises[model][picture][self._place(start + i)] = noise[i]


def has_timesteps(denoiser: Any) -> bool:
    """Whether a denoiser's noise levels are timesteps, and its latents variance-preserving; else they are sigmas."""
    return isinstance(denoiser, sd_samplers_timesteps.CFGDenoiserTimesteps)


def alpha_of(denoiser: Any, level: float, alphas: torch.Tensor) -> float:
    """How much of a step's latent is picture, in variance: the cumulated alpha of its noise level."""
    return float(alphas[int(level)]) if has_timesteps(denoiser) else 1 / (1 + level**2)


def leaves_out_uncond(denoiser: Any, sigma: torch.Tensor, s_min_uncond: float) -> bool:
    """Whether the host leaves the unconditional half of this step out (NGMS, Skip Early CFG), by its own rule."""
    early = shared.opts.skip_early_cond
    if early != 0 and denoiser.step / denoiser.total_steps <= early:
        return True
    return bool((denoiser.step % 2 or shared.opts.s_min_uncond_all) and s_min_uncond > 0 and sigma[0] < s_min_uncond)


def row_weights(rows: Rows, guidance_scale: float, like: torch.Tensor) -> list[torch.Tensor]:
    """For each picture the weights (K,1,1,1) with which the host adds its rows up to the guided noise."""
    result = []
    for parts in rows.weights:
        scaled = [part * guidance_scale for part in parts]
        values = torch.tensor([*scaled, 1 - sum(scaled)], dtype=torch.float32, device=like.device)
        result.append(values.view(-1, 1, 1, 1))
    return result


def take_rows(cond: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """The host's conditioning of one call, for some of its rows."""
    return {
        key: [part[chosen] for part in value] if isinstance(value, list) else value[chosen]
        for key, value in cond.items()
    }


@dataclass
class Taken:
    """A step that the sampler has taken; ``changes``: (picture, change of its guided noise (C,H,W))."""

    log_sigma: float
    denoised: torch.Tensor
    share: Callable[[int, int], Any]
    changes: list[tuple[int, torch.Tensor]] = field(default_factory=list)


class Corrector:
    """Takes the sampler's last steps once more with the changes of their noises, and adds what comes of it.

    ``function`` is the name of the host's sampling function. Between steps it holds what the sampler holds: noise
    levels and, for DPM++ 2M, the denoised latents.
    """

    def __init__(self, function: str, session: FusionSession, alphas: torch.Tensor) -> None:
        self.function, self.session, self.alphas = function, session, alphas
        self._taken: list[Taken] = []

    def after_model(self, given: dict[str, Any], step: StepSkips | None, share: Callable[[int, int], Any]) -> None:
        """The sampler's callback: between the model's answer and its step, or for DDIM after both.

        ``step`` is None where this one is not in our hands. ``share`` of a model and a picture: how much, or where, the
        model's noise is that of the step.
        """
        if step is None:
            self._taken = []
            return
        for correction in self.session.skips.take_corrections():
            for taken in self._taken:
                if taken.log_sigma == correction.log_sigma:
                    guided = (step.weights[correction.picture] * correction.change).sum(0)
                    guided = guided * taken.share(correction.model, correction.picture)
                    taken.changes.append((correction.picture, guided))
        if any(taken.changes for taken in self._taken):
            self._correct(given["x"], given["denoised"], math.exp(self.session.skips.log_sigma))
        taken = Taken(self.session.skips.log_sigma, given["denoised"], share)
        self._taken = [*self._taken[-self.session.skips.reach :], taken]

    def _correct(self, x: torch.Tensor, denoised: torch.Tensor, sigma_now: float) -> None:
        sigmas = [math.exp(taken.log_sigma) for taken in self._taken] + [sigma_now]
        first = next(j for j, taken in enumerate(self._taken) if taken.changes)
        error, before = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(x, dtype=torch.float32)
        for j in range(first, len(self._taken)):
            noise = torch.zeros_like(error)
            for picture, change in self._taken[j].changes:
                noise[picture] += change
            moved = error - sigmas[j] * noise  # of the denoised latent
            if self.function == "sample_dpmpp_2m":
                h, h_last = math.log(sigmas[j] / sigmas[j + 1]), math.log(sigmas[j - 1] / sigmas[j])
                both = moved + (moved - before) * h / (2 * h_last)
                error = sigmas[j + 1] / sigmas[j] * error - math.expm1(-h) * both
                self._taken[j].denoised += moved.to(x.dtype)
            else:
                error = error + noise * (sigmas[j + 1] - sigmas[j])
            before = moved
            self._taken[j].changes = []
        if self.function == "ddim":  # its latent is already that of the next step, and variance-preserving
            levels = self.session.levels
            now = min(range(len(levels)), key=lambda i: abs(self._sigma_of(levels[i]) - sigma_now))
            x += (error * math.sqrt(float(self.alphas[int(levels[now + 1])]))).to(x.dtype)
        else:
            x += error.to(x.dtype)
            denoised += error.to(x.dtype)

    def _sigma_of(self, timestep: float) -> float:
        alpha = float(self.alphas[int(timestep)])
        return math.sqrt((1 - alpha) / alpha)
