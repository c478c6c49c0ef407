"""What is trained and evaluated: frozen U-Nets in lockstep under aggregators, on Stable Diffusion's noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib_fusion.aggregators import part_hash
from lib_fusion.checkpoint import TEXT_PREFIX, Checkpoint
from lib_fusion.errors import CheckpointError, FusionError
from lib_fusion.training.cache import Cache
from lib_fusion.unet.layout import read_layout
from lib_fusion.unet.lockstep import Lockstep, mean_context
from lib_fusion.unet.model import UNet, load_unet

TIMESTEPS = 1000


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's schedule: scaled-linear betas 0.00085..0.012, float32 (1000,)."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2, 0).float()


class Ensemble(nn.Module):
    """U-Nets in lockstep. Only the aggregators are its parameters: the U-Nets are frozen, and held beside it."""

    def __init__(self, unets: Sequence[UNet], aggregators: nn.Module) -> None:
        super().__init__()
        self.aggregators = aggregators
        self._unets = tuple(unets)
        self.lockstep = Lockstep(unets[0], unets[1:], aggregators)
        self.hooks = self.lockstep.attach()

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, contexts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The prediction (B,C,H,W) for noisy latents at ``timesteps`` (B,), with each model's text states (B,T,D)."""
        with self.lockstep.running(contexts[1:], mean_context(contexts)):
            return self._unets[0](x, timesteps, contexts[0])

    def recompute_activations(self) -> None:
        """Blocks and aggregators forget their activations and compute them again in the backward pass."""
        blocks = [point.module for unet in self._unets for point in read_layout(unet).points]
        for module in [*blocks, *self.aggregators]:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def load_models(
    paths: Sequence[str | Path], cache: Cache, dtype: torch.dtype, device: torch.device
) -> list[UNet]:
    """The frozen U-Nets of checkpoints whose text encoders made a cache, in its order; raises FusionError."""
    texts = [part_hash(Checkpoint.open(path), TEXT_PREFIX) for path in paths]
    if texts != cache.index["texts"]:
        names = ", ".join(Path(path).stem for path in paths)
        made_for = ", ".join(cache.index["models"])
        raise FusionError(f"the cache was made with the text encoders of {made_for}, not with those of {names}")
    if len(paths) < 2:
        raise FusionError("an ensemble needs at least two models")
    unets = [load_unet(path, dtype=dtype, device=device) for path in paths]
    for path, unet in zip(paths, unets, strict=True):
        broken = [name for name, value in unet.named_parameters() if not value.isfinite().all()]
        if broken:
            told = f"{len(broken)} tensors of its U-Net hold values that are not finite, such as {broken[0]}"
            raise CheckpointError(f"{path}: {told}")
    if len({unet.prediction for unet in unets}) > 1:
        raise FusionError(f"the models predict different things: {', '.join(unet.prediction for unet in unets)}")
    return unets


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents, and what is to be predicted; ``alphas`` (B,) are alphas_cumprod at the rows' timesteps."""
    a = alphas.view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    return noisy, noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
