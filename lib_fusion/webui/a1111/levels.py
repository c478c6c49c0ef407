"""The host's noise levels: read from its sampling functions and denoisers, in its own units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from modules import sd_samplers_timesteps, shared


def has_timesteps(denoiser: Any) -> bool:
    """Whether a denoiser's levels are timesteps, and its latents variance-preserving; else its levels are sigmas."""
    return isinstance(denoiser, sd_samplers_timesteps.CFGDenoiserTimesteps)


def limits_of(predictions: Sequence[str], alphas: torch.Tensor, trained: torch.Tensor) -> dict[int, float]:
    """For each model the timestep above which it cannot predict, of models some of which predict v.

    ``alphas`` (T,): the cumulated alphas of the pass, ``trained`` (T,) those that the models were trained with. *Zero
    Terminal SNR* leaves the first timesteps next to no signal: there a prediction of the noise says nothing about the
    picture (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024), and as v it
    would be divided by nothing. Where all models predict the noise, the host draws so, too, and nobody is left out.
    """
    least = trained[-1].to(alphas) * (1 - 1e-3)  # half precision rounds
    if "v" not in predictions or bool(alphas[-1] >= least):
        return {}
    limit = float((alphas >= least).sum() - 1)
    return {model: limit for model, prediction in enumerate(predictions) if prediction != "v"}


def sigmas_of(levels: Sequence[float], denoiser: Any, alphas: Sequence[float]) -> list[float]:
    """A denoiser's noise levels as sigmas."""
    if not has_timesteps(denoiser):
        return list(levels)
    return [math.sqrt((1 - alpha) / alpha) for alpha in (alpha_of(denoiser, level, alphas) for level in levels)]


def alpha_of(denoiser: Any, value: float, alphas: Sequence[float]) -> float:
    """The cumulated alpha of a denoiser's noise level: the picture's share of the latents' variance."""
    return alphas[int(value)] if has_timesteps(denoiser) else 1 / (1 + value**2)


def leaves_out_uncond(denoiser: Any, sigma: float, s_min_uncond: float) -> bool:
    """Whether the host leaves out the unconditional half of this step (NGMS, Skip Early CFG), by its own rule."""
    early = shared.opts.skip_early_cond
    if early != 0 and denoiser.step / denoiser.total_steps <= early:
        return True
    return bool((denoiser.step % 2 or shared.opts.s_min_uncond_all) and s_min_uncond > 0 and sigma < s_min_uncond)


def output_scale(inner_model: Any, sigma: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """The change of the host's rows (R,1,1,1) by one unit of raw output: its denoisers are linear in the output."""
    if hasattr(inner_model, "get_scalings"):
        scale = inner_model.get_scalings(sigma)[-2]
    elif isinstance(inner_model, sd_samplers_timesteps.CompVisTimestepsVDenoiser):
        scale = alphas[sigma.to(torch.int)].sqrt()
    else:
        scale = torch.ones_like(sigma, dtype=torch.float32)
    return scale[:, None, None, None]
