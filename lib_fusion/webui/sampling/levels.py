"""The host's noise levels: read from its sampling functions and denoisers, in its own units."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from modules import sd_samplers_timesteps, shared


def levels_of(arguments: Mapping[str, Any], steps: int) -> list[float]:
    """The noise levels of a pass, from the arguments of the host's sampling function: its sigmas, or its timesteps.

    Timesteps are ascending there, and the pass ends at the first. DPM fast and adaptive have neither: they go from one
    sigma to another, in steps that are even in the logarithm.
    """
    sigmas = arguments.get("sigmas", arguments.get("sigma_sched"))
    if sigmas is not None:
        return sigmas.tolist()
    if "timesteps" in arguments:
        return arguments["timesteps"].flip(0).tolist()
    first, last = (math.log(float(arguments[f"sigma_{end}"])) for end in ("max", "min"))
    return [math.exp(first + (last - first) * i / steps) for i in range(steps + 1)]


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


def adds_noise(function: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    """Whether the host's sampling function adds noise in its steps, by its own parameters and these arguments of it.

    Those that do have ``eta``, the amount, or at least a ``noise_sampler`` (LCM); others may churn.
    """
    parameters = inspect.signature(function).parameters
    if "eta" in parameters:
        return arguments.get("eta", parameters["eta"].default) > 0 or bool(arguments.get("s_churn", 0))
    return "noise_sampler" in parameters or bool(arguments.get("s_churn", 0))


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
