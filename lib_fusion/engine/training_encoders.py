"""The engine's VAE and text encoders, for caching a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lib_fusion.engine.loader import VAE_SCALE, add_text_loras, check_checkpoint, load_text, load_vae
from lib_fusion.training.cache import Text, encoder_identity
from lib_fusion.unet.lora import read_loras
from lib_fusion.unet.model_file import ModelFile


class EngineEncoders:
    """Pictures by the VAE of ``vae`` (default: the first model's), captions by each model's own text encoder."""

    def __init__(
        self, models: Sequence[str | Path | ModelFile], vae: str | Path | None = None,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        given = [ModelFile.of(model) for model in models]
        files = [check_checkpoint(model.path) for model in given]
        loras = [read_loras(model, file) for model, file in zip(given, files, strict=True)]
        source = check_checkpoint(vae) if vae else files[0]
        self.identity = encoder_identity(given, source)
        self.device = torch.device(device)
        self.vae = load_vae(source, device)
        texts = [load_text(file, torch.float32, device) for file in files]
        self.texts = [add_text_loras(text, own) for text, own in zip(texts, loras, strict=True)]

    @torch.no_grad()
    def encode_picture(self, picture: torch.Tensor) -> torch.Tensor:
        """(3,H,W) in -1..1 -> latent (4,H/8,W/8): the VAE's mode, since its spread is next to nothing."""
        return self.vae.encode(picture[None].to(self.device)).latent_dist.mode()[0] * VAE_SCALE

    def encode_texts(self, texts: Sequence[str]) -> list[Text]:
        """Each model's states (B,77,D)."""
        return [Text(text(list(texts))) for text in self.texts]
