"""The U-Net of latent diffusion models (SD1, SD2, SDXL), built from a checkpoint's own tensors.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022); SDXL: Podell et al. (2023).
Module names are LDM's, so that a checkpoint's state dict fits as it is, and so are the calls between modules: every
block gets ``(h, emb, context)``, every decoder block gets ``[h | skip]`` as one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lib_fusion.checkpoint import Checkpoint, describe_keys, unet_kind, unet_prefix
from lib_fusion.errors import CheckpointError

#: Attention heads: SD1 has always 8 of them; SD2 and SDXL have heads of 64 channels, as many as fit.
SD1_HEADS = 8
HEAD_CHANNELS = 64


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal embedding of timesteps (B,) in 0..1000 -> (B, dim), float32: cosines, then sines."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half).to(timesteps.device)
    angles = timesteps[:, None].float() * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = self.out_channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = self.out_channels = channels
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv; plus the time embedding; GroupNorm, SiLU, conv; plus the input."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Attention of queries (B,L,C) to a context (B,T,D); to the queries themselves where none is given."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Identity())

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, inner), nn.Identity(), nn.Linear(inner, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, each with LayerNorm before and residual after."""

    def __init__(self, dim: int, context_dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim, inner)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of (B,C,H,W), projected in and out by 1x1 convolutions or linear layers."""

    def __init__(self, channels: int, context_dim: int, heads: int, inner: int, depth: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        project = nn.Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads, inner) for _ in range(depth)
        )
        self.proj_out = project(channels, channels)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)
        if self.linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).reshape(x.shape)
        if not self.linear:
            h = self.proj_out(h)
        return x + h


class TimestepEmbedSequential(nn.Sequential):
    """A block: passes the time embedding to its ResBlocks and the text to its transformers."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """An LDM U-Net of whatever sizes ``shapes`` (state-dict names without prefix -> shapes) says.

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
        return self.input_blocks[0][0].weight.dtype

    @property
    def device(self) -> torch.device:
        return self.input_blocks[0][0].weight.device

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
