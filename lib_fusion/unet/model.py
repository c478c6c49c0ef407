"""The U-Net of latent diffusion models (SD1, SD2, SDXL), built from a checkpoint's own tensors.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022); SDXL: Podell et al. (2023).
Module names are LDM's, so that a checkpoint's state dict fits as it is, and so are the calls between modules: every
block gets ``(h, emb, context)``, every decoder block gets ``[h | skip]`` as one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lib_fusion.errors import CheckpointError
from lib_fusion.methods.layers import (
    Downsample,
    ResBlock,
    SpatialTransformer,
    TimestepEmbedSequential,
    Upsample,
    timestep_embedding,
)
from lib_fusion.unet.checkpoint import Checkpoint, describe_keys, unet_kind, unet_prefix

#: Attention heads: SD1 has always 8 of them; SD2 and SDXL have heads of 64 channels, as many as fit.
SD1_HEADS = 8
HEAD_CHANNELS = 64


class UNet(nn.Module):
    """An LDM U-Net of the sizes that ``shapes`` (state-dict names without prefix -> shapes) says.

    Raises CheckpointError where a tensor has no place in the architecture.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], found: str = "the given state dict") -> None:
        super().__init__()
        self.kind = unet_kind(shapes, found)
        self.prediction = "epsilon"
        try:
            self._build(shapes)
        except (KeyError, ValueError, IndexError) as error:
            what = f"nothing is named {error}" if isinstance(error, KeyError) else error
            raise CheckpointError(f"unknown U-Net architecture ({what}) in {found}") from error
        if misfits := _misfits(shapes, {key: tuple(value.shape) for key, value in self.state_dict().items()}):
            raise CheckpointError(f"unknown U-Net architecture ({misfits}) in {found}")

    def _build(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model_channels, self.in_channels = shapes["input_blocks.0.0.weight"][:2]
        self.out_channels, width = shapes["out.2.weight"][:2]
        emb = shapes["time_embed.0.weight"][0]
        self.time_embed = nn.Sequential(nn.Linear(self.model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_dim = shapes.get("label_emb.0.0.weight", (0, 0))[1]
        if self.label_dim:
            self.label_emb = nn.Sequential(
                nn.Sequential(nn.Linear(self.label_dim, emb), nn.SiLU(), nn.Linear(emb, emb))
            )
        build = _Builder(shapes, emb)
        self.input_blocks = nn.ModuleList(build.blocks("input_blocks"))
        self.middle_block = build.block("middle_block.")
        self.output_blocks = nn.ModuleList(build.blocks("output_blocks"))
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, self.out_channels, 3, padding=1))
        self.context_dim = build.context_dim

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predicts the noise (or v) of ``x`` (B,C,H,W), any H and W, at ``timesteps`` (B,) in 0..999.

        ``context``: text states (B,T,context_dim). ``y``: SDXL's pooled text and sizes (B,label_dim). The result has
        the dtype of ``x`` and shape (B,out_channels,H,W).
        """
        if (y is None) != (self.label_dim == 0):
            raise ValueError(f"y is {'required' if y is None else 'not taken'} by this {self.kind} U-Net")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))
        if y is not None:
            emb = emb + self.label_emb(y.to(self.dtype))
        context = context.to(self.dtype)
        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            skip = skips.pop()
            if h.shape[-2:] != skip.shape[-2:]:  # odd sizes: up-sampling made one row or column too many
                h = F.interpolate(h, skip.shape[-2:], mode="nearest")
            h = block(torch.cat([h, skip], dim=1), emb, context)
        return self.out(h).to(x.dtype)


def _misfits(given: Mapping[str, tuple[int, ...]], built: Mapping[str, tuple[int, ...]]) -> str:
    """In words: the given tensors that have no place, the places that have no tensor, and the wrong shapes."""
    shapes = [f"{key} {given[key]} for {built[key]}" for key in given if key in built and given[key] != built[key]]
    lists = {
        "unexpected": given.keys() - built.keys(),
        "missing": built.keys() - given.keys(),
        "of the wrong shape": shapes,
    }
    return ", ".join(f"{len(keys)} tensors {what}, such as {min(keys)}" for what, keys in lists.items() if keys)


class _Builder:
    """Turns tensor names and shapes into modules, and fails on names it does not know."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], emb: int) -> None:
        self.shapes, self.emb, self.context_dim = shapes, emb, 0
        self.names: dict[str, set[str]] = {}
        for key in shapes:
            parts = key.split(".")
            for i in range(1, len(parts)):
                self.names.setdefault(".".join(parts[:i]) + ".", set()).add(parts[i])

    def blocks(self, name: str) -> list[TimestepEmbedSequential]:
        return [self.block(f"{name}.{i}.") for i in range(len(self.names[f"{name}."]))]

    def block(self, prefix: str) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(*(self.layer(f"{prefix}{i}.") for i in range(len(self.names[prefix]))))

    def layer(self, prefix: str) -> nn.Module:
        has, shapes = self.names[prefix], self.shapes
        if "in_layers" in has:
            out_channels, channels = shapes[f"{prefix}in_layers.2.weight"][:2]
            return ResBlock(channels, self.emb, out_channels)
        if "transformer_blocks" in has:
            proj_in = shapes[f"{prefix}proj_in.weight"]
            first = f"{prefix}transformer_blocks.0."
            self.context_dim = shapes[f"{first}attn2.to_k.weight"][1]
            linear = len(proj_in) == 2
            heads = max(1, proj_in[0] // HEAD_CHANNELS) if linear else SD1_HEADS
            inner = shapes[f"{first}ff.net.2.weight"][1]
            depth = len(self.names[f"{prefix}transformer_blocks."])
            return SpatialTransformer(proj_in[0], self.context_dim, heads, inner, depth, linear)
        if "op" in has:
            return Downsample(shapes[f"{prefix}op.weight"][0])
        if "conv" in has:
            return Upsample(shapes[f"{prefix}conv.weight"][0])
        if has == {"weight", "bias"}:
            out_channels, channels = shapes[f"{prefix}weight"][:2]
            return nn.Conv2d(channels, out_channels, 3, padding=1)
        raise ValueError(f"{prefix} holds {', '.join(sorted(has))}")


def load_unet(
    path_or_state_dict: str | Path | Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> UNet:
    """Loads the U-Net of a checkpoint and nothing else of it: evaluation mode, no gradients.

    Takes a ``.safetensors`` file or a state dict, with or without the prefix ``model.diffusion_model.``; a state dict's
    tensors are shared, not copied, where they already have that dtype and device. Sets ``unet.prediction`` to
    ``epsilon`` or ``v`` as the file says. Raises CheckpointError if it is no Stable Diffusion U-Net, is truncated, or
    has tensors of an unknown architecture.
    """
    if isinstance(path_or_state_dict, Mapping):
        prefix = unet_prefix(path_or_state_dict)
        tensors = {k[len(prefix) :]: v.to(dtype) for k, v in path_or_state_dict.items() if k.startswith(prefix)}
        unet = _empty_unet(
            {k: tuple(v.shape) for k, v in tensors.items()},
            f"the given state dict: {describe_keys(path_or_state_dict)}",
        )
        unet.prediction = "v" if "v_pred" in path_or_state_dict else "epsilon"
    else:
        file = Checkpoint.open(path_or_state_dict)
        unet = _empty_unet(file.unet_shapes, file.describe())  # checks the header before gigabytes are read
        unet.prediction = file.prediction
        tensors = file.read(file.unet_prefix, dtype)
    unet.load_state_dict(tensors, assign=True)
    # Not channels-last: on a CPU it takes 0.98 to 1.6 times as long (float32 and bfloat16, 64 and 320 channels).
    return unet.to(device).eval().requires_grad_(False)


def _empty_unet(shapes: Mapping[str, tuple[int, ...]], found: str) -> UNet:
    with torch.device("meta"):
        return UNet(shapes, found)
