"""SNB, saliency-aware noise blending (Zhao et al., "MagicFusion", ICCV 2023), for a general model and N experts.

At each denoising step all models see the same latent, and every position takes its noise from the model that is most
salient there:

1. saliency of a model: how much its prompt changes its prediction, blurred (eq. 3)  -> ``saliency``
2. each map is sharpened by k and normalised over the positions (eq. 4)              -> ``log_maps``
3. every position goes to the model whose map is largest (eq. 5)                     -> ``winner``, ``expert_mask``
4. the noise is taken from that model, all channels together (eq. 6)                 -> ``select``, ``blend``

Selecting commutes with guidance: applied to the conditional and unconditional noises with one mask, it gives what it
gives on the guided noise. Beyond the paper, ``HeldMask`` fixes the mask after the first, noisiest timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F


def saliency(cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Saliency S of a model from its noise predictions (B,C,H,W) with and without the prompt -> (B,1,H,W), >= 0.

    ``S = mean over channels of Resize(Blur(|w (eps_c - eps_u)|))``: blur is a 4x4 mean, stride 1, padding 1 (zeros
    counted), which loses a row and a column; resize is bilinear, back to H x W. The paper takes each model's own
    ``uncond``; the official code takes the general model's for all. Computed in float32 (float64 for float64 input).
    """
    difference = (cond - uncond) if cond.dtype == torch.float64 else (cond.float() - uncond.float())
    # blur and resize are linear, so the mean over channels may come first
    strength = (guidance_scale * difference).abs().mean(dim=1, keepdim=True)
    blurred = F.avg_pool2d(strength, kernel_size=4, stride=1, padding=1)
    return F.interpolate(blurred, size=cond.shape[-2:], mode="bilinear", align_corners=False)


def log_maps(saliencies: Sequence[torch.Tensor], sharpness: Sequence[float]) -> torch.Tensor:
    """Logarithms of ``softmax over positions of (k S)``, models along dim 1: N maps (B,1,H,W) -> (B,N,H,W).

    ``sharpness`` holds one k >= 0 a model; k = 0 makes a map uniform. The logarithm keeps the order and does not
    underflow where k is large.
    """
    scaled = torch.cat([k * s for s, k in zip(saliencies, sharpness, strict=True)], dim=1)
    return scaled.flatten(2).log_softmax(dim=-1).view_as(scaled)


def winner(maps: torch.Tensor) -> torch.Tensor:
    """The model with the largest map at each position: (B,N,H,W) -> int64 (B,1,H,W). Ties go to the lower index."""
    best, index = maps[:, :1], torch.zeros_like(maps[:, :1], dtype=torch.int64)
    for i in range(1, maps.shape[1]):
        challenger = maps[:, i : i + 1]
        wins = challenger > best
        best, index = torch.where(wins, challenger, best), torch.where(wins, i, index)
    return index


def expert_mask(
    saliency_general: torch.Tensor, saliency_expert: torch.Tensor, k_general: float = 1.0, k_expert: float = 1.0
) -> torch.Tensor:
    """Where the expert wins, of two models: saliencies (B,1,H,W) -> bool (B,1,H,W). A tie goes to the general model."""
    return winner(log_maps([saliency_general, saliency_expert], [k_general, k_expert])) == 1


def blend(mask: torch.Tensor, general: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """The expert's values where ``mask`` (bool (B,1,H,W)) is True, else the general model's: (B,C,H,W)."""
    return torch.where(mask, expert, general)


def select(index: torch.Tensor, predictions: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Takes each position from the model that ``index`` (int64 (B,1,H,W)) names: {model: (B,C,H,W)} -> (B,C,H,W).

    Models that ``index`` does not name may be missing.
    """
    (_, result), *others = predictions.items()
    for i, prediction in others:
        result = blend(index == i, result, prediction)
    return result


def average(predictions: Iterable[torch.Tensor]) -> torch.Tensor:
    """The plain mean of the models' noises, the paper's control: N tensors (B,C,H,W) -> (B,C,H,W)."""
    return torch.stack(list(predictions)).mean(dim=0)


def mix(weights: Mapping[int, torch.Tensor | float], predictions: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The weighted sum of predictions (B,C,H,W): a number or a map (B,1,H,W) for each model, which add up to one.

    Computed as differences from the first, so that equal predictions give just that.
    """
    (_, first), *others = predictions.items()
    result = first
    for model, prediction in others:
        result = result + (weights[model] * (prediction - first)).to(first.dtype)
    return result


# Beyond the paper


def divergence(cond: torch.Tensor, base: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """A saliency of an expert made from the base: how far its prediction with the prompt is from the base's.

    ``S = mean over channels of Resize(Blur(|w (eps_c - eps_base)|))``, both (B,C,H,W) -> (B,1,H,W). The weights by
    divergence are those of LoRAtorio (arXiv 2508.11624), put into eq. 3.
    """
    return saliency(cond, base, guidance_scale)


def otsu(values: torch.Tensor, bins: int = 128) -> torch.Tensor:
    """Otsu's threshold of each map (B,1,H,W) -> (B,1,1,1): the one that parts it into the two most distinct classes."""
    flat = values.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    edges = torch.linspace(0, 1, bins + 1, device=flat.device)[1:-1]
    thresholds = low + (high - low) * edges  # (B,bins-1)
    above = (flat[:, None] > thresholds[..., None]).to(flat.dtype)  # (B,bins-1,HW)
    share = above.mean(-1)
    mean_above = (above * flat[:, None]).mean(-1)
    mean = flat.mean(1, keepdim=True)
    between = (mean * share - mean_above) ** 2 / (share * (1 - share)).clamp_min(1e-12)
    best = between.argmax(1, keepdim=True)
    return thresholds.gather(1, best)[..., None, None]


class HeldMask:
    """Gathers the models' log-maps while ``timestep > until`` and then holds the winner of their sum.

    Saliency shows which model knows an object only while the latent is nearly noise; later the latent itself tells a
    competent model the answer, and its prompt changes little. ``until`` is a timestep in 0..1000; 0 never holds, which
    is the paper. The first maps always count, so there is a mask to hold in passes that begin below ``until``.
    ``decide`` makes the winners (B,1,H,W) of summed maps (B,N,H,W).
    """

    def __init__(self, until: float, decide: Callable[[torch.Tensor], torch.Tensor] = winner) -> None:
        self.until, self.decide = until, decide
        self._sum: torch.Tensor | None = None
        self._lowest = float("inf")
        self._held: torch.Tensor | None = None

    def is_held(self, timestep: float) -> bool:
        """Whether the mask of this timestep is already decided, so that no saliency is needed."""
        return self.until > 0 and self._sum is not None and timestep <= self.until

    def update(self, timestep: float, maps: torch.Tensor) -> torch.Tensor:
        """Takes the log-maps (B,N,H,W) of a timestep; returns the winners there, int64 (B,1,H,W).

        A timestep that is evaluated again counts once.
        """
        if self.is_held(timestep):
            return self.held()
        if timestep < self._lowest:
            self._sum = maps if self._sum is None else self._sum + maps
            self._lowest, self._held = timestep, None
        return self.held() if self.is_held(timestep) else self.decide(maps)

    def held(self) -> torch.Tensor:
        """The winners over all gathered maps."""
        if self._held is None:
            assert self._sum is not None
            self._held = self.decide(self._sum)
        return self._held
