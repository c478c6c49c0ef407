"""Corrections of the host's latents: what a computed noise shows about one that was skipped before it.

Exact where the sampler's step is known and its latents can be edited in place: k-diffusion's Euler and DPM++ 2M, and
DDIM. All are linear in the noise, so the same steps are taken with the changes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lib_fusion.fusion.session import FusionSession
from lib_fusion.fusion.step import Step
from lib_fusion.webui.sampling.levels import adds_noise


@dataclass
class Taken:
    """A step that the sampler has taken; ``changes``: (picture, change of its guided noise (C,H,W))."""

    step: Step
    denoised: torch.Tensor
    changes: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        """The change of the guided noise of all pictures (B,C,H,W), float32."""
        result = torch.zeros_like(like, dtype=torch.float32)
        for picture, change in self.changes:
            result[picture] += change
        return result


class EulerCorrector:
    """Takes Euler's last steps once more with the changes of their noises, and adds the difference.

    Between steps it holds what the sampler holds: noise levels and the denoised latents. ``alphas``: the cumulated ones
    of the pass's levels.
    """

    def __init__(self, session: FusionSession, alphas: Sequence[float]) -> None:
        self.session, self.alphas = session, alphas
        self._taken: list[Taken] = []

    def after_model(self, x: torch.Tensor, denoised: torch.Tensor, step: Step | None) -> None:
        """The sampler's callback: between the model's answer and its step, or for DDIM after both.

        ``x`` and ``denoised`` (B,C,H,W) are the sampler's own latents. ``step`` is None where this step is not in our
        hands.
        """
        if step is None or not step.skips:
            self._taken = []
            return
        for correction in self.session.skips.take_corrections():
            for taken in self._taken:
                if taken.step.level.log_sigma == correction.log_sigma:
                    weights = taken.step.guidance(correction.change.device)[correction.picture]
                    guided = (weights * correction.change).sum(0)
                    guided = guided * taken.step.share(correction.model, correction.picture)
                    taken.changes.append((correction.picture, guided))
        if any(taken.changes for taken in self._taken):
            sigmas = [math.exp(taken.step.level.log_sigma) for taken in self._taken]
            sigmas.append(math.exp(step.level.log_sigma))
            self._put(x, denoised, self._replay(sigmas, x), sigmas[-1])
            for taken in self._taken:
                taken.changes = []
        self._taken = [*self._taken[-self.session.skips.reach :], Taken(step, denoised)]

    def _first(self) -> int:
        return next(j for j, taken in enumerate(self._taken) if taken.changes)

    def _replay(self, sigmas: list[float], x: torch.Tensor) -> torch.Tensor:
        """The change of the latents where the sampler stands, (B,C,H,W) over sqrt(alpha)."""
        error = torch.zeros_like(x, dtype=torch.float32)
        for j in range(self._first(), len(self._taken)):
            error = error + self._taken[j].noise(x) * (sigmas[j + 1] - sigmas[j])
        return error

    def _put(self, x: torch.Tensor, denoised: torch.Tensor, error: torch.Tensor, sigma: float) -> None:
        x += error.to(x.dtype)
        denoised += error.to(x.dtype)


class DPMCorrector(EulerCorrector):
    """DPM++ 2M: a step also extrapolates the denoised latents of the two steps before."""

    def _replay(self, sigmas: list[float], x: torch.Tensor) -> torch.Tensor:
        error = before = torch.zeros_like(x, dtype=torch.float32)
        for j in range(self._first(), len(self._taken)):
            moved = error - sigmas[j] * self._taken[j].noise(x)  # of the denoised latents
            h, h_last = math.log(sigmas[j] / sigmas[j + 1]), math.log(sigmas[j - 1] / sigmas[j])
            both = moved + (moved - before) * h / (2 * h_last)
            error = sigmas[j + 1] / sigmas[j] * error - math.expm1(-h) * both
            self._taken[j].denoised += moved.to(x.dtype)
            before = moved
        return error


class DDIMCorrector(EulerCorrector):
    """DDIM: Euler's step in other variables. Its latents are those of the next step already, variance-preserving."""

    def _put(self, x: torch.Tensor, denoised: torch.Tensor, error: torch.Tensor, sigma: float) -> None:
        sigmas = [math.sqrt((1 - alpha) / alpha) for alpha in self.alphas]
        now = min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - sigma))
        x += (error * math.sqrt(self.alphas[now + 1])).to(x.dtype)


#: By the names of the host's sampling functions, those whose steps can be corrected.
CORRECTORS = {"sample_euler": EulerCorrector, "sample_dpmpp_2m": DPMCorrector, "ddim": DDIMCorrector}


def correcting_callback(
    session: FusionSession, function: Any, arguments: Mapping[str, Any], alphas: Sequence[float], is_plain: bool,
    step: Callable[[], Step | None],
) -> Callable[[dict[str, Any]], None]:  # fmt: skip
    """The callback for the host's sampling function, which also corrects its latents where that is exact.

    ``alphas``: the cumulated ones of the pass's levels. ``is_plain``: whether the halves are added up by the host's own
    rule, over the whole picture. ``step`` gives the step that the sampler has just had, None where it is not ours.
    """
    callback, name = arguments["callback"], getattr(function, "__name__", "")
    noisy = session.skips.adds_noise = adds_noise(function, arguments)
    if name not in CORRECTORS or noisy or not is_plain:
        session.skips.reach = 0
        return callback
    corrector = CORRECTORS[name](session, alphas)

    def after_model(given: dict[str, Any]) -> None:
        corrector.after_model(given["x"], given["denoised"], step())
        callback(given)

    return after_model
