"""The samplers by the names the WebUI gives them, as diffusers' schedulers with Stable Diffusion's noise schedule."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


#: Samplers that add noise in their steps.
NOISY = ("Euler a", "DPM++ 2M SDE")


class Scheduler(Protocol):
    """The attributes of diffusers' schedulers that the engine uses; their own base class declares none of them."""

    alphas_cumprod: torch.Tensor
    timesteps: torch.Tensor
    init_noise_sigma: torch.Tensor | float

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device) -> None: ...

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor: ...

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> Any: ...


def make_scheduler(sampler: str, steps: int, device: str | torch.device = "cpu") -> Scheduler:
    """A scheduler set to ``steps`` steps, for noise predictions; v predictions are converted before they reach it.

    ``sampler``: a choice of ``GenerationSettings.sampler``. Raises ValueError for any other name.
    """
    karras = sampler.endswith(" Karras")
    name = sampler.removesuffix(" Karras")
    scheduler: Scheduler
    if name == "DDIM":
        scheduler = DDIMScheduler(
            **SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
        )
    elif name == "Euler":
        scheduler = EulerDiscreteScheduler(**SCHEDULE, use_karras_sigmas=karras, timestep_spacing="linspace")
    elif name == "Euler a":
        scheduler = EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="linspace")
    elif name in ("DPM++ 2M", "DPM++ 2M SDE"):
        kind = "sde-dpmsolver++" if name in NOISY else "dpmsolver++"
        scheduler = DPMSolverMultistepScheduler(
            **SCHEDULE, use_karras_sigmas=karras, timestep_spacing="linspace", algorithm_type=kind
        )
    else:
        raise ValueError(f"no sampler {sampler!r}")
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def sigmas_of(scheduler: Scheduler) -> list[float]:
    """The noise levels of a scheduler's steps as sigmas, falling, and where the last one ends: one more than steps.

    By its own sigmas where it has them, since its timesteps may be rounded.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        alphas = scheduler.alphas_cumprod[scheduler.timesteps.cpu()].double()
        sigmas = torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1)])
    return sigmas.tolist()


def is_sigma_scaled(scheduler: Scheduler) -> bool:
    """Whether a scheduler holds picture + sigma * noise; else its latents are variance-preserving."""
    return isinstance(scheduler, (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler))


def adds_noise(sampler: str) -> bool:
    """Whether a sampler, by its name, adds new noise in its steps."""
    return sampler.removesuffix(" Karras") in NOISY
