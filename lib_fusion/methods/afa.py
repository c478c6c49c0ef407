"""AFA: adaptive feature aggregation by spatial-aware block-wise (SABW) attention, of N U-Nets that run in lockstep.

Wang et al., "Ensembling Diffusion Models via Adaptive Feature Aggregation" (ICLR 2025, arXiv 2405.17082). At each point
of the U-Net an aggregator looks at all models' features, the time and the text, and gives each model a weight at each
position; every model continues with the weighted sum. Sizes and initialisation are those of the official code
(Tenvence/afa); tensor names are diffusers', so that its weights fit. Pure tensor code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lib_fusion.methods.layers import SpatialTransformer

#: GroupNorm's groups, and the fewest channels in one: a group of one channel would take the time embedding, which is
#: the same at every position, out again.
GROUPS, GROUP_CHANNELS = 32, 4


class TimeResBlock(nn.Module):
    """GroupNorm, SiLU, conv; plus the time embedding; GroupNorm, SiLU, conv; plus the input. Width H throughout."""

    def __init__(self, hidden: int, time_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, hidden, eps=1e-6)
        self.conv1 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, hidden)
        self.norm2 = nn.GroupNorm(groups, hidden, eps=1e-6)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1)

    def forward(self, x: torch.Tensor, time_embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time_embedding))[..., None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class Aggregator(nn.Module):
    """SABW attention at one point: ``A = softmax_i(W_out ST(Res(W_in [F_1 .. F_N], e), c))``, ``F = sum_i A_i F_i``.

    ``channels`` is C of the point, ``hidden`` the width H (128 in the official code). W_out starts at zero, so that an
    untrained aggregator gives the plain mean.
    """

    def __init__(
        self, channels: int, num_models: int, context_dim: int, time_dim: int,
        hidden: int = 128, layers: int = 2, heads: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        groups = groups_of(hidden)
        self.conv_in = nn.Conv2d(num_models * channels, hidden, 1)
        self.res_block = TimeResBlock(hidden, time_dim, groups)
        self.transformer = SpatialTransformer(
            hidden, context_dim, heads, inner=4 * hidden, depth=layers, linear=False, groups=groups
        )
        self.conv_out = nn.Conv2d(hidden, num_models, 1, bias=False)
        nn.init.zeros_(self.conv_out.weight)

    def forward(
        self, features: torch.Tensor, time_embedding: torch.Tensor, context: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``features`` (B,N,C,H,W), the models' mean ``time_embedding`` (B,E) and mean text states ``context`` (B,T,D).

        Returns the aggregate (B,C,H,W) and the attention maps (B,N,H,W), which sum to 1 over the models.
        """
        z = self.conv_in(features.flatten(1, 2))
        z = self.res_block(z, time_embedding)
        z = self.transformer(z, context)
        maps = self.conv_out(z).softmax(dim=1, dtype=torch.promote_types(z.dtype, torch.float32)).to(features.dtype)
        return weighted_sum(features, maps), maps


class FixedAggregator(nn.Module):
    """The controls: the same weight for a model everywhere. Uniform is the plain mean, one-hot a single model."""

    weights: torch.Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    def forward(
        self, features: torch.Tensor, time_embedding: torch.Tensor, context: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Aggregator's; time and text play no part."""
        b, n, _, h, w = features.shape
        maps = self.weights.to(features).view(1, n, 1, 1).expand(b, n, h, w)
        return weighted_sum(features, maps), maps


def groups_of(hidden: int) -> int:
    """Groups of the normalisation at width H; 0 is too narrow."""
    return min(GROUPS, hidden // GROUP_CHANNELS)


def weighted_sum(features: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """``sum_i A_i F_i`` of features (B,N,C,H,W) and maps (B,N,H,W), each map broadcast over the channels."""
    return (maps.unsqueeze(2) * features).sum(dim=1)


@dataclass(frozen=True)
class AggregatorSizes:
    """Everything that the shapes of a set of aggregators depend on; ``channels`` of its points in running order."""

    num_models: int
    channels: tuple[int, ...]
    context_dim: int
    time_dim: int
    hidden: int = 128
    layers: int = 2
    heads: int = 8

    def make(self) -> nn.ModuleList:
        """Untrained aggregators, one a point: the plain mean."""
        values = asdict(self)
        return nn.ModuleList(Aggregator(channels, **values) for channels in values.pop("channels"))


def uniform(num_models: int) -> FixedAggregator:
    """The plain mean of the models' features."""
    return FixedAggregator([1 / num_models] * num_models)


def one_hot(num_models: int, model: int) -> FixedAggregator:
    """One model alone, in the same pipeline."""
    return FixedAggregator([float(i == model) for i in range(num_models)])
