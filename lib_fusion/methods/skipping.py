"""Adaptive skipping: U-Net calls are left out where their noise can be forecast; the sampler takes every step.

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

import math
from collections.abc import Sequence

import torch

#: How much of a correction is made: the noises computed meanwhile were computed at the uncorrected latent.
CORRECTION = 0.8
#: A forecast of the denoised prediction may be wrong by so many times more: what is added afterwards covers it.
DENOISED_TOLERANCE = 4.0
#: Log sigmas that are no further apart are one noise level.
SAME_LEVEL = 1e-4


class ThirdOrderEstimator:
    """AdaptiveDiffusion's rule: may the next noise prediction be skipped? One decision for all that it is shown.

    With d_i the mean absolute difference between latents i and i - 1, the official code skips where
    ``|(d_i + d_(i-2)) / 2 - d_(i-1)| <= threshold * d_(i-1)`` (the paper's criterion is the third difference of the
    latents themselves). ``max_skips``: the most in a row, at least 1; as in the official code it holds only once five
    decisions are made. The first four predictions are always computed.
    """

    def __init__(self, threshold: float = 0.01, max_skips: int = 4) -> None:
        self.threshold, self.max_skips = threshold, max_skips
        self._distances: list[torch.Tensor] = []
        self._skipped: list[bool] = []

    def observe(self, distance: float) -> bool:
        """Takes d_i after the sampler step i, from the second on; True: reuse the noise next."""
        self._distances = [*self._distances[-2:], torch.tensor(distance, dtype=torch.float32)]
        if len(self._distances) < 3:
            return False
        before_last, last, now = self._distances
        skip = bool(((now + before_last) / 2 - last).abs() <= last * self.threshold)
        if len(self._skipped) > 4 and all(self._skipped[-self.max_skips :]):
            skip = False
        self._skipped.append(skip)
        return skip

    @property
    def unsteadiness(self) -> float | None:
        """What the last decision compared with the threshold; None where there was none."""
        if len(self._distances) < 3:
            return None
        before_last, last, now = map(float, self._distances)
        return abs((now + before_last) / 2 - last) / max(last, 1e-12)


class Policy:
    """What the policies of one model and picture have in common.

    In a step, ``watch`` comes first; then the host fetches ``measured`` of all policies from the device at once and
    gives each its number by ``settle``; then ``may_skip``, and ``forecast`` or, with the computed noise, ``observe``.

    ``measured``: a number on the device (0-dim) that the next decision waits for, or None. ``errors``: the relative
    errors of the guided noise that forecasts had or would have had, as far as they are settled.
    """

    def __init__(self) -> None:
        self.measured: torch.Tensor | None = None
        self.errors: list[float] = []

    def watch(self, latent: torch.Tensor) -> None:
        """Takes the latent (C,H,W) of this step, as the sampler holds it."""

    def settle(self, value: float) -> None:
        """Takes the value of ``measured``."""
        self.measured = None

    def end_guidance(self) -> None:
        """From the next step on the guidance scale is 1, and the last row is a copy of the first."""

    def may_skip(self, log_sigma: float, stride: float = 1.0) -> bool:
        """Whether this step's prediction, at this noise level, may be skipped; ``stride``: as ``Level`` has it."""
        raise NotImplementedError

    def estimate(self, log_sigma: float, stride: float = 1.0) -> float | None:
        """What the decision compares with its limit, or None where nothing is known."""
        raise NotImplementedError

    def forecast(self, log_sigma: float, latent: torch.Tensor) -> torch.Tensor:
        """The noise (K,C,H,W) of a skipped prediction; ``latent`` (C,H,W) is the step's, picture + sigma * noise."""
        raise NotImplementedError

    def observe(
        self, log_sigma: float, noise: torch.Tensor, weights: torch.Tensor, latent: torch.Tensor
    ) -> list[tuple[float, torch.Tensor]]:
        """Takes computed noise (K,C,H,W) of all rows of the picture, at the latent that it was computed for.

        ``weights`` (K,1,1,1) are those with which the rows add up to the guided noise: w and 1 - w, for one prompt
        and the guidance scale w. Returns what is to be added to noises that were forecast before:
        (log sigma, (K,C,H,W)), oldest first.
        """
        raise NotImplementedError


class LastNoise(Policy):
    """AdaptiveDiffusion for one model and picture: by the estimator's decision the last noise is used again.

    The official code decides once for a batch, by all of its latents; here every picture decides by its own.
    """

    def __init__(self, threshold: float = 0.01, max_skips: int = 4) -> None:
        super().__init__()
        self._estimator = ThirdOrderEstimator(threshold, max_skips)
        self._latent: torch.Tensor | None = None
        self._noise: torch.Tensor | None = None
        self._skips = False

    def watch(self, latent: torch.Tensor) -> None:
        """Takes the latent as the sampler holds it: scaled by sigma or not, which the rule is not indifferent to."""
        if self._noise is None:  # the official code's first latent is the one after the first step
            return
        latent = latent.to(torch.promote_types(latent.dtype, torch.float32))
        if self._latent is not None:
            self.measured = (latent - self._latent).abs().mean()
        self._latent = latent

    def settle(self, value: float) -> None:
        super().settle(value)
        self._skips = self._estimator.observe(value)

    def may_skip(self, log_sigma: float, stride: float = 1.0) -> bool:
        return self._skips

    def estimate(self, log_sigma: float, stride: float = 1.0) -> float | None:
        return self._estimator.unsteadiness

    def forecast(self, log_sigma: float, latent: torch.Tensor) -> torch.Tensor:
        assert self._noise is not None, "nothing was observed yet, so may_skip is false"
        return self._noise

    def observe(
        self, log_sigma: float, noise: torch.Tensor, weights: torch.Tensor, latent: torch.Tensor
    ) -> list[tuple[float, torch.Tensor]]:
        self._noise = noise
        return []


class Forecaster(Policy):
    """Error-controlled forecasts of one model's noise for one picture.

    ``tolerance``: the weighted error (``_weight``) up to which a prediction is skipped; 0 skips none. ``max_skips``:
    the most in a row. ``warmup``: how many predictions are computed first, at least 3. ``errors`` has a relative error
    for each computed prediction that had a forecast.
    """

    def __init__(self, tolerance: float = 0.1, max_skips: int = 1, warmup: int = 4) -> None:
        super().__init__()
        self.tolerance, self.max_skips, self.warmup = tolerance, max_skips, max(warmup, 3)
        self._nodes: list[tuple[float, torch.Tensor]] = []  # the last three computed: log sigma, noise
        self._skipped: list[tuple[float, torch.Tensor]] = []  # since then, to be corrected: log sigma, forecast
        self._in_row = 0
        self._computed = 0
        self._error_spans = 0.0
        self._curvature = float("inf")

    def may_skip(self, log_sigma: float, stride: float = 1.0) -> bool:
        if self.tolerance <= 0 or self._computed < self.warmup or self._in_row >= self.max_skips:
            return False
        estimate = self.estimate(log_sigma, stride)
        return estimate is not None and estimate <= self.tolerance

    def estimate(self, log_sigma: float, stride: float = 1.0) -> float | None:
        """The weighted error that a forecast is thought to have; None where nothing is known.

        The error of a line grows as its spans, and the picture is wrong by it as far as the step goes with it.
        """
        if len(self._nodes) < 2 or log_sigma >= self._nodes[-1][0] - SAME_LEVEL or math.isinf(self._curvature):
            return None
        return self._curvature * self._spans(log_sigma) * _weight(log_sigma) * stride

    def forecast(self, log_sigma: float, latent: torch.Tensor) -> torch.Tensor:
        """The noise (K,C,H,W) at this level, extrapolated linearly in log sigma from the last two computed."""
        value = _interpolate(self._nodes[-2:], log_sigma)
        self._skipped.append((log_sigma, value))
        self._in_row += 1
        return self._to_noise(log_sigma, value, latent)

    def observe(
        self, log_sigma: float, noise: torch.Tensor, weights: torch.Tensor, latent: torch.Tensor
    ) -> list[tuple[float, torch.Tensor]]:
        """Takes computed noise; ``measured`` is then the error that its own forecast would have had.

        Returns the corrections of those skipped since the last computed one, by quadratic interpolation through this
        and the two computed before.

        A noise level that has not fallen (samplers that evaluate one twice, or go back up) begins a new history.
        """
        if self._nodes and log_sigma >= self._nodes[-1][0] - SAME_LEVEL:
            self._nodes, self._skipped, self._curvature = [], [], float("inf")
        if len(self._nodes) >= 2:
            wrong = noise - self._to_noise(log_sigma, _interpolate(self._nodes[-2:], log_sigma), latent)
            error, size = (torch.linalg.vector_norm((weights * rows).sum(0)) for rows in (wrong, noise))
            self.measured = error / size.clamp_min(1e-12)
            self._error_spans = self._spans(log_sigma)
        self._nodes = [*self._nodes[-2:], (log_sigma, self._from_noise(log_sigma, noise, latent))]
        self._computed += 1
        self._in_row = 0
        skipped, self._skipped = self._skipped, []
        return [(level, CORRECTION * (_interpolate(self._nodes, level) - was)) for level, was in skipped]

    def end_guidance(self) -> None:
        """The history goes on without the unconditional row; what was skipped under guidance stays uncorrected."""
        self._nodes = [(level, value[:1].expand_as(value)) for level, value in self._nodes]
        self._skipped = []

    def settle(self, value: float) -> None:
        """Takes the error of the last forecast that a computed noise was compared with."""
        super().settle(value)
        self.errors.append(value)
        self._curvature = value / self._error_spans if self._error_spans > 0 else float("inf")

    def _from_noise(self, log_sigma: float, noise: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """What is extrapolated: here the noise itself."""
        return noise

    def _to_noise(self, log_sigma: float, value: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """The noise of what was extrapolated."""
        return value

    def _spans(self, log_sigma: float) -> float:
        (first, _), (second, _) = self._nodes[-2:]
        return abs((log_sigma - first) * (log_sigma - second))


class DenoisedForecaster(Forecaster):
    """For samplers that add noise (ancestral, SDE): extrapolates the denoised prediction, D = x - sigma * noise.

    Their own new noise makes the model's unpredictable. But it is in the latent x already, so (x - D) / sigma with the
    D extrapolated and the x that is there follows it. Nothing is corrected: steps are not taken again with new noise.
    """

    def __init__(self, tolerance: float = 0.1, max_skips: int = 1, warmup: int = 4) -> None:
        super().__init__(tolerance * DENOISED_TOLERANCE, max_skips, warmup)

    def observe(
        self, log_sigma: float, noise: torch.Tensor, weights: torch.Tensor, latent: torch.Tensor
    ) -> list[tuple[float, torch.Tensor]]:
        super().observe(log_sigma, noise, weights, latent)
        return []

    def _from_noise(self, log_sigma: float, noise: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return latent - math.exp(log_sigma) * noise

    def _to_noise(self, log_sigma: float, value: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return (latent - value) / math.exp(log_sigma)


def _weight(log_sigma: float) -> float:
    """How much a relative error of the noise counts: (1 - alpha) ** 1/4, which is 1 in pure noise and 0 at its end.

    The square of it is noise's share of the latent. Relative to the noise errors are judged too strictly late, relative
    to the latent too mildly, above all where late steps are long (DDIM).
    """
    return (1 + math.exp(-2 * log_sigma)) ** -0.25


def _interpolate(nodes: Sequence[tuple[float, torch.Tensor]], at: float) -> torch.Tensor:
    """The polynomial through the nodes (Lagrange), at ``at``."""
    result = torch.zeros_like(nodes[0][1])
    for i, (x_i, y_i) in enumerate(nodes):
        factor = math.prod((at - x_j) / (x_i - x_j) for j, (x_j, _) in enumerate(nodes) if j != i)
        result = result + factor * y_i
    return result
