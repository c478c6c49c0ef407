"""Shared by the tests: small U-Nets of every architecture, random weights, and independent U-Nets to compare with."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from lib_fusion.requests.presets import PAPER
from lib_fusion.unet.checkpoint import UNET_PREFIX
from lib_fusion.unet.config import SD15, unet_shapes

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]

_LINEAR = {"use_linear_in_transformer": True}
#: The real architectures, in the terms of LDM's constructor.
REAL: dict[str, Config] = {
    "sd1": SD15,
    "sd2": SD15 | _LINEAR | {"context_dim": 1024},
    "sdxl": {"model_channels": 320, "channel_mult": (1, 2, 4), "num_res_blocks": 2, "attention_resolutions": (4, 2),
             "transformer_depth": (0, 2, 10), "context_dim": 2048, "adm_in_channels": 2816} | _LINEAR,
    "sdxl-refiner": {"model_channels": 384, "channel_mult": (1, 2, 4, 4), "num_res_blocks": 2,
                     "attention_resolutions": (4, 2), "transformer_depth": 4, "context_dim": 1280,
                     "adm_in_channels": 2560} | _LINEAR,
}  # fmt: skip

_SMALL = {"channel_mult": (1, 2, 2, 2), "context_dim": 24}
#: The same architectures, small enough to compute in a fraction of a second.
SMALL: dict[str, Config] = {
    "sd1": REAL["sd1"] | _SMALL | {"model_channels": 32},
    "sd1-inpainting": REAL["sd1"] | _SMALL | {"model_channels": 32, "in_channels": 9},
    "sd2": REAL["sd2"] | _SMALL | {"model_channels": 64},
    "sdxl": REAL["sdxl"] | _SMALL | {"model_channels": 64, "channel_mult": (1, 2, 4), "transformer_depth": (0, 2, 3),
                                     "adm_in_channels": 96},
    "sdxl-refiner": REAL["sdxl-refiner"] | _SMALL | {"model_channels": 64, "transformer_depth": 2,
                                                     "adm_in_channels": 96},
}  # fmt: skip

#: The paper's rule: a new mask at every step, used at once, and one guidance scale.
PLAIN = {key: PAPER[key] for key in ("snb_hold", "snb_from", "guidance")}


def random_weights(config: Config, seed: int = 0, prefix: str = "") -> Weights:
    """A U-Net's state dict in which no parameter is zero or one.

    What enters and adds to residual streams is small, so that a wrong epsilon in a normalisation shows; queries, keys,
    values and embeddings are of size 1, so that a wrong number of heads or a wrong embedding shows.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in unet_shapes(**config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            is_norm_weight = name.endswith("weight")
            weights[prefix + name] = 1 + 0.2 * noise if is_norm_weight else 0.1 * noise
        else:
            full = re.search(r"to_[qkv]|ff\.net\.0|emb|skip_connection|proj_out", name)
            fan_in = noise[0].numel()
            weights[prefix + name] = noise * fan_in**-0.5 * (1.0 if full else 0.05)
    return weights


def random_inputs(
    config: Config, height: int = 8, width: int = 8, batch: int = 3, tokens: int = 7, seed: int = 1
) -> tuple:
    """Latents (B,C,H,W), float timesteps (B,), text states (B,T,D) and, for SDXL, the vector (B,V), else None."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, config.get("in_channels", 4), height, width, generator=generator)
    timesteps = torch.rand(batch, generator=generator) * 999
    context = torch.randn(batch, tokens, config["context_dim"], generator=generator)
    adm = config.get("adm_in_channels", 0)
    return latents, timesteps, context, torch.randn(batch, adm, generator=generator) if adm else None


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((value.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def ldm_module() -> Any:
    """``ldm.modules.diffusionmodules.openaimodel`` as Stability AI published it; skips the test where not installed."""
    reason = "needs the original U-Net: pip install --no-deps stable-diffusion-sdkit"
    return pytest.importorskip("ldm.modules.diffusionmodules.openaimodel", reason=reason)


def ldm_unet(config: Config, weights: Weights | None = None) -> nn.Module:
    """LDM's own class with these weights; call it through ``ldm_forward``.

    SDXL came after that class, whose transformers are all equally deep and which knows no vector: both are put in here.
    """
    ldm = ldm_module()
    config = {"in_channels": 4, "out_channels": 4, "transformer_depth": 1, **config}
    depths, adm = config.pop("transformer_depth"), config.pop("adm_in_channels", 0)
    linear = config.get("use_linear_in_transformer")
    heads = {"num_head_channels": 64, "legacy": False} if linear else {"num_heads": 8}
    omegaconf = {"omegaconf": SimpleNamespace(), "omegaconf.listconfig": SimpleNamespace(ListConfig=list)}
    with mock.patch.dict(sys.modules, omegaconf):  # imported by the constructor for a type check only
        unet = ldm.UNetModel(image_size=8, use_spatial_transformer=True, **heads, **config)
    levels, per_level = len(config["channel_mult"]), config["num_res_blocks"] + 1
    depths = [depths] * levels if isinstance(depths, int) else depths
    blocks = [((i - 1) // per_level, block) for i, block in enumerate(unet.input_blocks)]
    blocks += [(levels - 1, unet.middle_block)]
    blocks += [(levels - 1 - i // per_level, block) for i, block in enumerate(unet.output_blocks)]
    for level, block in blocks:
        if len(block) > 1 and isinstance(block[1], ldm.SpatialTransformer) and depths[level] > 1:
            attention = block[1].transformer_blocks[0].attn1
            dim_head = attention.to_q.out_features // attention.heads
            block[1] = ldm.SpatialTransformer(
                block[1].in_channels, attention.heads, dim_head, depth=depths[level], use_linear=True,
                context_dim=[config["context_dim"]] * depths[level], use_checkpoint=False,
            )  # fmt: skip
    if adm:
        emb = config["model_channels"] * 4
        unet.num_classes = "sequential"
        unet.label_emb = nn.Sequential(nn.Sequential(nn.Linear(adm, emb), nn.SiLU(), nn.Linear(emb, emb)))
    if weights:
        unet.load_state_dict(weights)
    return unet.eval().requires_grad_(False)


def ldm_forward(
    unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y=None
) -> torch.Tensor:
    """LDM's forward, with the WebUI host's amendment for odd sizes: ``h`` is resized to the skip's size."""

    def cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
        h, skip = tensors
        return torch.cat([nn.functional.interpolate(h, size=skip.shape[2:]), skip], dim)

    depth = max(len(m.transformer_blocks) for m in unet.modules() if hasattr(m, "transformer_blocks"))
    with mock.patch.object(ldm_module(), "th", SimpleNamespace(cat=cat)):
        return unet(latents, timesteps, [context] * depth, y)


def diffusers_unet(config: Config, weights: Weights) -> nn.Module:
    """diffusers' U-Net with these weights, put there by diffusers' own conversion."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    levels = len(config["channel_mult"])
    channels = [config["model_channels"] * mult for mult in config["channel_mult"]]
    has_attention = [2**level in config["attention_resolutions"] for level in range(levels)]
    linear = config.get("use_linear_in_transformer", False)
    depths = config.get("transformer_depth", 1)
    adm = config.get("adm_in_channels", 0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=config.get("in_channels", 4),
        block_out_channels=channels,
        layers_per_block=config["num_res_blocks"],
        down_block_types=["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_attention],
        up_block_types=["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)],
        transformer_layers_per_block=depths if isinstance(depths, int) else [max(1, depth) for depth in depths],
        attention_head_dim=[c // 64 for c in channels] if linear else 8,  # in truth the number of heads
        use_linear_projection=linear,
        cross_attention_dim=config["context_dim"],
        addition_embed_type="text_time" if adm else None,
        addition_time_embed_dim=adm // 8 if adm else None,
        projection_class_embeddings_input_dim=adm or None,
    )
    prefixed = {UNET_PREFIX + name: value for name, value in weights.items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(prefixed, unet.config))
    return unet.eval().requires_grad_(False)


def official_skips(latents: list[torch.Tensor], threshold: float, max_skips: int) -> list[bool]:
    """AdaptiveDiffusion's published procedure step by step, with its lists, for the latents after each sampler step.

    Whether the step that begins at each of them uses the last noise again.
    """
    seen, differences, compute, reused = [], [], [], []
    for latent in latents:
        # at the start of a step, while fewer than four latents are known, differences are only collected
        if len(seen) in (2, 3):
            differences.append((seen[-1] - seen[-2]).abs().mean())
        if len(seen) >= 3:
            last, one_before = differences[-1], differences[-2]
            now = (latent - seen[-1]).abs().mean()
            differences.append(now)
            if len(compute) > 4 and True not in compute[-max_skips:]:
                compute.append(True)
            else:
                compute.append(bool(not abs((now + one_before) / 2 - last) <= last * threshold))
            reused.append(not compute[-1])
        else:
            reused.append(False)
        seen.append(latent)
    return reused
