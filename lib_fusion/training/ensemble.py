"""What is trained and evaluated: frozen U-Nets in lockstep under aggregators, on Stable Diffusion's noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib_fusion.errors import CheckpointError, FusionError
from lib_fusion.fusion.lockstep import Lockstep, mean_context
from lib_fusion.training.cache import Cache, Text, text_hashes
from lib_fusion.unet.checkpoint import Checkpoint
from lib_fusion.unet.layout import read_layout
from lib_fusion.unet.lora import read_loras, with_loras
from lib_fusion.unet.model import UNet, load_unet
from lib_fusion.unet.model_file import ModelFile
from lib_fusion.unet.vector import SIZES_DIM, sdxl_vector

TIMESTEPS = 1000
#: Pixels to a latent's position, each way.
PIXELS = 8


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's schedule: scaled-linear betas 0.00085..0.012, float32 (1000,)."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2, 0).float()


class Ensemble(nn.Module):
    """U-Nets in lockstep. Only the aggregators are its parameters: the U-Nets are frozen and kept outside it."""

    def __init__(self, unets: Sequence[UNet], aggregators: nn.Module) -> None:
        super().__init__()
        self.aggregators = aggregators
        self._unets = tuple(unets)
        self.lockstep = Lockstep(unets[0], unets[1:], aggregators)
        self.hooks = self.lockstep.attach()

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, texts: Sequence[Text]) -> torch.Tensor:
        """The prediction (B,C,H,W) for noisy latents at ``timesteps`` (B,) and each model's ``texts`` of B captions.

        SDXL's conditioning also has the pictures' size, which is that of the latents.
        """
        contexts = [text.states for text in texts]
        height, width = (PIXELS * size for size in x.shape[-2:])
        vectors = [None if text.pooled is None else sdxl_vector(text.pooled, height, width) for text in texts]
        with self.lockstep.running(contexts[1:], mean_context(contexts), vectors[1:]):
            return self._unets[0](x, timesteps, contexts[0], vectors[0])

    def recompute_activations(self) -> None:
        """Blocks and aggregators forget their activations and compute them again in the backward pass."""
        blocks = [point.module for unet in self._unets for point in read_layout(unet).points]
        for module in [*blocks, *self.aggregators.children()]:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def load_models(
    given: Sequence[str | Path | ModelFile], cache: Cache, dtype: torch.dtype, device: torch.device
) -> list[UNet]:
    """The frozen U-Nets of models whose text encoders made a cache, in its order; raises FusionError."""
    models = [ModelFile.of(model) for model in given]
    if text_hashes(models) != cache.index["texts"]:
        names = ", ".join(model.name for model in models)
        made_for = ", ".join(cache.index["models"])
        raise FusionError(f"the cache was made with the text encoders of {made_for}, not with those of {names}")
    if len(models) < 2:
        raise FusionError("an ensemble needs at least two models")
    unets = [_load_unet(model, dtype, device) for model in models]
    for path, unet, text in zip((model.path for model in models), unets, cache.empty, strict=True):
        width = 0 if text.pooled is None else len(text.pooled) + SIZES_DIM
        if unet.label_dim != width:
            problem = f"its U-Net takes a vector of {unet.label_dim} numbers, the cache's pooled text gives {width}"
            raise FusionError(f"{path}: {problem}")
        broken = [name for name, value in unet.named_parameters() if not value.isfinite().all()]
        if broken:
            problem = f"{len(broken)} tensors of its U-Net hold values that are not finite, such as {broken[0]}"
            raise CheckpointError(f"{path}: {problem}")
    if len({unet.prediction for unet in unets}) > 1:
        raise FusionError(f"the models predict different things: {', '.join(unet.prediction for unet in unets)}")
    return unets


def _load_unet(model: ModelFile, dtype: torch.dtype, device: torch.device) -> UNet:
    unet = load_unet(model.path, dtype=dtype, device=device)
    loras = read_loras(model, Checkpoint.open(model.path))
    return with_loras(unet, [(lora.unet, lora.file.weight) for lora in loras])


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents, and what is to be predicted; ``alphas`` (B,) are alphas_cumprod at the rows' timesteps."""
    a = alphas.view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    return noisy, noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
