"""Adaptive skipping: the U-Net is left out where its noise can be told from before; the sampler takes every step.

``ThirdOrderEstimator`` is AdaptiveDiffusion's rule (Ye et al., "Training-free Adaptive Diffusion with Bounded
Difference Approximation Strategy", NeurIPS 2024): it watches the latents, and the last noise is used again.

``Forecaster`` is ours. Along the trajectory a noise prediction is a smooth function of the logarithm of sigma, so

1. it is extrapolated linearly in log sigma from the last two computed ones       -> ``forecast``
2. each computed one shows how wrong its own forecast would have been; that error,
   scaled by the spans in log sigma, says whether the next may be skipped          -> ``observe``, ``may_skip``
3. the one computed after a skip brackets the one that was skipped, which is then
   interpolated, for the sampler step to be taken again with                       -> ``corrected``

All rows of a picture (conditional, unconditional) are forecast together: alone, guidance multiplies their errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class ThirdOrderEstimator:
    """AdaptiveDiffusion's rule: may the next noise prediction be skipped? One decision for all that it is shown.

    With d_i the mean absolute difference between latents i and i - 1, the official code skips where
    ``|(d_i + d_(i-2)) / 2 - d_(i-1)| <= threshold * d_(i-1)`` (the paper's criterion is the third difference of the
    latents themselves). ``max_skips``: the most in a row, at least 1; as in the official code it holds only once five
    decisions are made. The first four predictions are always computed.
    """

    def __init__(self, threshold: float = 0.01, max_skips: int = 4) -> None:
        self.threshold, self.max_skips = threshold, max_skips
        self._latent: torch.Tensor | None = None
        self._distances: list[torch.Tensor] = []
        self._skipped: list[bool] = []

    def observe(self, latent: torch.Tensor) -> bool:
        """Takes the latent after a sampler step (any shape, variance-preserving); True: reuse the noise next."""
        if self._latent is not None:
            self._distances = [*self._distances[-2:], (latent - self._latent).abs().mean()]
        self._latent = latent
        if len(self._distances) < 3:
            return False
        before_last, last, now = self._distances
        skip = bool(((now + before_last) / 2 - last).abs() <= last * self.threshold)
        if len(self._skipped) > 4 and all(self._skipped[-self.max_skips :]):
            skip = False
        self._skipped.append(skip)
        return skip


class Forecaster:
    """Error-controlled forecasts of one model's noise for one picture.

    ``tolerance``: the relative error of the guided noise up to which a prediction is skipped; 0 skips none.
    ``max_skips``: the most in a row. ``warmup``: how many predictions are computed first, at least 3.
    """

    def __init__(self, tolerance: float = 0.1, max_skips: int = 1, warmup: int = 4) -> None:
        self.tolerance, self.max_skips, self.warmup = tolerance, max_skips, max(warmup, 3)
        self.errors: list[float] = []
        self._nodes: list[tuple[float, torch.Tensor]] = []
        self._skipped: list[float] = []
        self._computed = 0
        self._curvature = float("inf")

    def may_skip(self, log_sigma: float) -> bool:
        """Whether the prediction at this noise level may be a forecast."""
        if self._computed < self.warmup or len(self._skipped) >= self.max_skips:
            return False
        return 0 < self.tolerance and self._curvature * self._spans(log_sigma) <= self.tolerance

    def forecast(self, log_sigma: float) -> torch.Tensor:
        """The noise at this level, extrapolated linearly in log sigma from the last two computed: (K,C,H,W)."""
        self._skipped.append(log_sigma)
        return _interpolate(self._nodes[-2:], log_sigma)

    def observe(self, log_sigma: float, noise: torch.Tensor, weights: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
        """Takes computed noise (K,C,H,W) of all rows of the picture.

        ``weights`` (K,1,1,1) are those with which the rows add up to the guided noise: for a prompt and guidance
        scale w, (w, 1 - w). Returns what the predictions skipped since the last computed one should have been, by
        quadratic interpolation through this and the two computed before: (log_sigma, (K,C,H,W)), oldest first.
        """
        if len(self._nodes) >= 2:
            expected = _interpolate(self._nodes[-2:], log_sigma)
            guided = (weights * noise).sum(0)
            error = float(torch.linalg.vector_norm((weights * (noise - expected)).sum(0))
                          / torch.linalg.vector_norm(guided).clamp_min(1e-12))  # fmt: skip
            spans = self._spans(log_sigma)
            self._curvature = error / spans if spans > 0 else float("inf")
            self.errors.append(error)
        self._nodes = [*self._nodes[-2:], (log_sigma, noise)]
        self._computed += 1
        skipped, self._skipped = self._skipped, []
        return [(level, _interpolate(self._nodes, level)) for level in skipped]

    def _spans(self, log_sigma: float) -> float:
        """|(l - l1)(l - l2)|, by which the error of a line through l1 and l2 grows at l."""
        (first, _), (second, _) = self._nodes[-2:]
        return abs((log_sigma - first) * (log_sigma - second))


def _interpolate(nodes: Sequence[tuple[float, torch.Tensor]], at: float) -> torch.Tensor:
    """The polynomial through the nodes (Lagrange), at ``at``."""
    result = 0
    for i, (x_i, y_i) in enumerate(nodes):
        weight = 1.0
        for j, (x_j, _) in enumerate(nodes):
            if j != i:
                weight *= (at - x_j) / (x_i - x_j)
        result = result + weight * y_i
    return result
