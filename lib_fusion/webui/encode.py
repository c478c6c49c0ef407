"""The host's own VAE and text encoders, for caching a data set in a process without the host's ``modules``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import ldm.modules.diffusionmodules.model
import ldm.modules.encoders.modules
import open_clip
import torch
from ldm.util import instantiate_from_config
from omegaconf import OmegaConf
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lib_fusion.checkpoint import TEXT_PREFIX, VAE_PREFIX, Checkpoint
from lib_fusion.errors import CheckpointError
from lib_fusion.training.cache import encoder_identity

#: SD1 files made by some tools lack this part of their text encoders' names.
TEXT_MODEL, TEXT_INNER = "transformer.", "transformer.text_model."


class HostEncoders:
    """Pictures by the VAE of the first checkpoint, captions by each checkpoint's own text encoder.

    ``configs``: each checkpoint's configuration file, in the host's format. Captions are plain text, cut at 77 tokens:
    no emphasis, no embeddings.
    """

    def __init__(
        self, checkpoints: Sequence[str | Path], configs: Sequence[str | Path], device: str | torch.device = "cpu"
    ) -> None:
        files = [Checkpoint.open(path) for path in checkpoints]
        params = [OmegaConf.load(path).model.params for path in configs]
        self.identity = encoder_identity(files, files[0])
        self.device = torch.device(device)
        self.scale = float(params[0].scale_factor)
        with _without_weights():
            self.vae = _load(params[0].first_stage_config, files[0], VAE_PREFIX).to(self.device)
            self.texts = [_load(p.cond_stage_config, file, TEXT_PREFIX) for p, file in zip(params, files)]
        for text in self.texts:
            text.to(self.device).device = self.device

    @torch.no_grad()
    def encode_picture(self, picture: torch.Tensor) -> torch.Tensor:
        """(3,H,W) in -1..1 -> latent (4,H/8,W/8): the VAE's mode."""
        return self.vae.encode(picture[None].to(self.device)).mode()[0] * self.scale

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Each model's states (B,77,D)."""
        return [text.encode(list(texts)) for text in self.texts]


def _load(config: object, file: Checkpoint, prefix: str) -> nn.Module:
    """A part of a checkpoint in the host's class, float32; raises CheckpointError where tensors lack."""
    module = instantiate_from_config(config)
    tensors = file.read(prefix, torch.float32)
    if any(key.startswith(TEXT_MODEL) for key in tensors) and not any(key.startswith(TEXT_INNER) for key in tensors):
        tensors = {key.replace(TEXT_MODEL, TEXT_INNER, 1): value for key, value in tensors.items()}
    missing = [key for key in module.load_state_dict(tensors, strict=False).missing_keys if "position_ids" not in key]
    if missing:
        raise CheckpointError(f"{file.path}: {len(missing)} tensors of {prefix}* lack, such as {missing[0]}")
    return module.eval().requires_grad_(False)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Text encoders are built from their configuration alone: the checkpoint brings their weights.

    And the VAE without xformers' attention, which is not for every device.
    """
    make = open_clip.create_model_and_transforms
    with (
        mock.patch.object(ldm.modules.encoders.modules, "CLIPTextModel", _EmptyText),
        mock.patch.object(open_clip, "create_model_and_transforms",
                          lambda *args, pretrained=None, **more: make(*args, pretrained=None, **more)),
        mock.patch.object(ldm.modules.diffusionmodules.model, "XFORMERS_IS_AVAILBLE", False),
    ):  # fmt: skip
        yield


class _EmptyText:
    @staticmethod
    def from_pretrained(version: str) -> CLIPTextModel:
        return CLIPTextModel(CLIPTextConfig.from_pretrained(version))
