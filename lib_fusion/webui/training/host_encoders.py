"""The host's own VAE and text encoders, for caching a data set in a process without the host's ``modules``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ldm.modules.diffusionmodules.model
import ldm.modules.encoders.modules
import open_clip
import torch
from ldm.util import instantiate_from_config
from omegaconf import OmegaConf
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lib_fusion.errors import CheckpointError
from lib_fusion.training.cache import Text, encoder_identity
from lib_fusion.unet.checkpoint import VAE_PREFIX, Checkpoint
from lib_fusion.unet.lora import read_loras, with_loras
from lib_fusion.unet.model_file import ModelFile

#: SD1 files made by some tools lack this part of their text encoders' names.
TEXT_MODEL, TEXT_INNER = "transformer.", "transformer.text_model."
#: Tensors that some files lack and nothing needs.
IDLE = ("position_ids", "logit_scale")


class HostEncoders:
    """Pictures by the VAE of the first checkpoint, captions by each checkpoint's own text encoders.

    ``checkpoints``: also with LoRAs (``ModelFile``). ``configs``: each checkpoint's configuration file, in the host's
    format. Captions are plain text, cut at 77 tokens: no emphasis, no embeddings. SDXL's empty caption is zeros: what
    the host, as Stability AI's own sampling does, gives it for an empty negative prompt, so what the aggregators will
    meet there.
    """

    def __init__(
        self, checkpoints: Sequence[str | Path], configs: Sequence[str | Path], device: str | torch.device = "cpu"
    ) -> None:
        models = [ModelFile.of(model) for model in checkpoints]
        files = [Checkpoint.open(model.path) for model in models]
        loras = [read_loras(model, file) for model, file in zip(models, files)]
        params = [OmegaConf.load(path).model.params for path in configs]
        self.identity = encoder_identity(models, files[0])
        self.device = torch.device(device)
        self.scale = float(params[0].scale_factor)
        self.is_sdxl = files[0].kind == "sdxl"
        with _without_weights(self.is_sdxl):
            self.vae = _load(_vae_config(params[0]), files[0], VAE_PREFIX).to(self.device)
            self.texts = [_load(_text_config(p), file, file.text_prefix) for p, file in zip(params, files)]
        for text, own in zip(self.texts, loras):
            if any(lora.text for lora in own):  # of SD1 only: others are refused
                text.transformer = with_loras(text.transformer, [(lora.text, lora.file.weight) for lora in own])
            text.to(self.device)
            for encoder in text.embedders if self.is_sdxl else [text]:
                encoder.device = self.device

    @torch.no_grad()
    def encode_picture(self, picture: torch.Tensor) -> torch.Tensor:
        """(3,H,W) in -1..1 -> latent (4,H/8,W/8): the VAE's mode, also where its class would draw from the spread."""
        moments = self.vae.quant_conv(self.vae.encoder(picture[None].to(self.device)))
        return moments[0].chunk(2)[0] * self.scale

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> list[Text]:
        """Each model's states (B,77,D), and for SDXL its pooled text (B,P)."""
        if not self.is_sdxl:
            return [Text(text.encode(list(texts))) for text in self.texts]
        found = [text({"txt": list(texts)}) for text in self.texts]
        is_full = torch.tensor([text != "" for text in texts], device=self.device)
        return [Text(f["crossattn"] * is_full[:, None, None], f["vector"] * is_full[:, None]) for f in found]


def _vae_config(params: Any) -> Any:
    config = params.first_stage_config
    if "attn_type" in config.params.ddconfig:  # SDXL's names xformers, which is not for every device
        config.params.ddconfig.attn_type = "vanilla"
    return config


def _text_config(params: Any) -> Any:
    """SDXL's conditioner has its text encoders first; what embeds sizes has no weights, and is not needed for texts."""
    if "conditioner_config" not in params:
        return params.cond_stage_config
    config = params.conditioner_config
    embedders = [e for e in config.params.emb_models if e.get("input_key") == "txt"]
    for embedder in embedders:
        embedder.ucg_rate = 0.0  # the share of captions that its own training would leave out
    config.params.emb_models = embedders
    return config


def _load(config: Any, file: Checkpoint, prefix: str) -> nn.Module:
    """A part of a checkpoint in the host's class, float32; raises CheckpointError where ``config`` is of another."""
    module = instantiate_from_config(config)
    tensors = file.read(prefix, torch.float32)
    if any(key.startswith(TEXT_MODEL) for key in tensors) and not any(key.startswith(TEXT_INNER) for key in tensors):
        tensors = {key.replace(TEXT_MODEL, TEXT_INNER, 1): value for key, value in tensors.items()}
    wanted = {key: value.shape for key, value in module.state_dict().items()}
    given = {key: value.shape for key, value in tensors.items()}
    wrong = [key for key in wanted if given.get(key) != wanted[key] and not (key.endswith(IDLE) and key not in given)]
    if wrong:
        problem = f"{len(wrong)} tensors of {prefix}* lack, or have other shapes than its configuration says"
        raise CheckpointError(f"{file.path}: {problem}, such as {wrong[0]}")
    module.load_state_dict(tensors, strict=False)
    return module.eval().requires_grad_(False)


@contextmanager
def _without_weights(is_sdxl: bool) -> Iterator[None]:
    """Text encoders are built from their configuration alone: the checkpoint brings their weights.

    And SD1's and SD2's VAE without xformers' attention, which is not for every device.
    """
    changes = [
        (ldm.modules.encoders.modules, "CLIPTextModel", _EmptyText),
        (open_clip, "create_model_and_transforms", _empty_open_clip),
        (ldm.modules.diffusionmodules.model, "XFORMERS_IS_AVAILBLE", False),
    ]
    if is_sdxl:  # takes seconds to import
        import sgm.modules.encoders.modules

        changes.append((sgm.modules.encoders.modules, "CLIPTextModel", _EmptyText))
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        yield


class _EmptyText:
    @staticmethod
    def from_pretrained(version: str) -> CLIPTextModel:
        return CLIPTextModel(CLIPTextConfig.from_pretrained(version))


def _empty_open_clip(arch: str, **_: object) -> tuple[nn.Module, None, None]:
    """OpenCLIP's model with next to none of its picture encoder: it is not used, and SDXL's has 1.8 billion numbers."""
    config = open_clip.factory.get_model_config(arch)
    if config is None:
        raise CheckpointError(f"OpenCLIP knows no text encoder {arch}, which a model's configuration names")
    config["vision_cfg"] |= {"layers": 1, "width": 64, "head_width": 64}
    return open_clip.CLIP(**config), None, None
