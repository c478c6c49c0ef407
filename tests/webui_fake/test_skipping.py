"""The correction of the host's latent against its samplers run with the right noises from the start."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_fusion.fusion.level import Level, Schedule
from lib_fusion.fusion.policies import Correction
from tests.webui_fake import fakes

WEIGHTS = torch.tensor([5.0, -4.0], dtype=torch.float64).view(2, 1, 1, 1)
ALPHAS = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
TIMESTEPS = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
SIGMAS = [math.sqrt((1 - ALPHAS[t]) / ALPHAS[t]) for t in TIMESTEPS]


@pytest.fixture
def correcting(monkeypatch: pytest.MonkeyPatch) -> Any:
    fakes.install(monkeypatch)
    from lib_fusion.webui.sampling import correcting

    return correcting


def level_of(i: int) -> Level:
    return Level(TIMESTEPS[i], float(ALPHAS[TIMESTEPS[i]]))


def step_of(i: int) -> SimpleNamespace:
    """A fusion step of one model for two pictures, whose rows the policies have decided on."""
    return SimpleNamespace(skips=True, level=level_of(i), guidance=lambda _: [WEIGHTS] * 2, share=lambda *_: 1.0)


def sample(function: str, noises: list[torch.Tensor], x: torch.Tensor, callback: Any) -> torch.Tensor:
    """The host's samplers on noises that do not depend on the latent; each calls back where the host's does."""
    old = None
    for i in range(len(SIGMAS) - 1):
        sigma, following, noise = SIGMAS[i], SIGMAS[i + 1], noises[i]
        if function == "ddim":
            a, a_next = ALPHAS[TIMESTEPS[i]], ALPHAS[TIMESTEPS[i + 1]]
            x0 = (x - (1 - a).sqrt() * noise) / a.sqrt()
            x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * noise
            callback(i, {"x": x, "denoised": x0})
            continue
        denoised = x - sigma * noise
        if function == "sample_euler":
            slope = (x - denoised) / sigma
            callback(i, {"x": x, "denoised": denoised})
            x = x + slope * (following - sigma)
            continue
        callback(i, {"x": x, "denoised": denoised})
        h = math.log(sigma / following)
        mixed = denoised
        if old is not None:
            r = math.log(SIGMAS[i - 1] / sigma) / h
            mixed = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x = following / sigma * x - math.expm1(-h) * mixed
        old = denoised
    return x


@pytest.mark.parametrize("function", ["sample_euler", "sample_dpmpp_2m", "ddim"])
@pytest.mark.parametrize("runs", [{4: [3]}, {4: [3], 6: [5], 8: [7]}, {5: [3, 4], 7: [6]}])
def test_correction_is_the_sampler_with_the_right_noises(correcting: Any, function: str, runs: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    right = [torch.randn(start.shape, generator=generator, dtype=torch.float64) for _ in SIGMAS]
    used, changes = list(right), {}
    for skipped in (i for found in runs.values() for i in found):
        changes[skipped] = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)  # rows of picture 1
        used[skipped] = right[skipped].clone()
        used[skipped][1] -= (WEIGHTS * changes[skipped]).sum(0)
    skips = SimpleNamespace(reach=2, take_corrections=lambda: found)
    session = SimpleNamespace(skips=skips, schedule=Schedule([float(t) for t in TIMESTEPS]))
    corrector = correcting.CORRECTORS[function](session, ALPHAS[TIMESTEPS].tolist())
    found: list[Correction] = []

    def after(i: int, given: dict) -> None:
        found[:] = [Correction(0, 1, level_of(j).log_sigma, changes[j]) for j in runs.get(i, [])]
        corrector.after_model(given["x"], given["denoised"], step_of(i))

    corrected = sample(function, used, start, after)
    expected = sample(function, right, start, lambda i, given: None)
    wrong = sample(function, used, start, lambda i, given: None)
    torch.testing.assert_close(corrected, expected, rtol=1e-5, atol=1e-5)
    assert (wrong[1] - expected[1]).abs().max() > 0.05
    assert torch.equal(corrected[0], expected[0])


def test_a_step_in_other_hands_ends_the_reach_of_corrections(correcting: Any) -> None:
    skips = SimpleNamespace(reach=1, take_corrections=list)
    corrector = correcting.EulerCorrector(SimpleNamespace(skips=skips), ALPHAS.tolist())
    latent = torch.zeros(1, 4, 2, 2)
    corrector.after_model(latent, latent, step_of(3))
    corrector.after_model(latent, latent, None)
    skips.take_corrections = lambda: [Correction(0, 0, level_of(3).log_sigma, torch.ones(2, 4, 2, 2))]
    corrector.after_model(latent, latent, step_of(5))
    assert not latent.any()


def test_conditioning_is_taken_row_by_row(correcting: Any) -> None:
    from lib_fusion.webui.a1111.contexts import take_rows

    states, image = torch.arange(12.0).view(4, 3), torch.arange(4.0).view(4, 1)
    taken = take_rows({"c_crossattn": [states], "c_concat": [image], "vector": image}, [1, 3])
    assert torch.equal(taken["c_crossattn"][0], states[[1, 3]])
    assert torch.equal(taken["c_concat"][0], image[[1, 3]])
    assert torch.equal(taken["vector"], image[[1, 3]])


def sample_ancestral(model: Any, x: Any, sigmas: Any, eta: float = 1.0, noise_sampler: Any = None) -> None: ...
def sample_fast(model: Any, x: Any, eta: float = 0.0, noise_sampler: Any = None) -> None: ...
def sample_lcm(model: Any, x: Any, sigmas: Any, noise_sampler: Any = None) -> None: ...
def sample_churning(model: Any, x: Any, sigmas: Any, s_churn: float = 0.0) -> None: ...
def ddim(model: Any, x: Any, timesteps: Any, eta: float = 0.0) -> None: ...


@pytest.mark.parametrize(
    ("function", "arguments", "adds"),
    [(sample_ancestral, {}, True), (sample_ancestral, {"eta": 0.0}, False), (sample_fast, {}, False),
     (sample_fast, {"eta": 1.0}, True), (sample_lcm, {}, True), (sample_churning, {}, False),
     (sample_churning, {"s_churn": 2.0}, True), (ddim, {}, False), (ddim, {"eta": 0.3}, True)],
)  # fmt: skip
def test_which_samplers_add_noise(correcting: Any, function: Any, arguments: dict, adds: bool) -> None:
    from lib_fusion.webui.sampling.levels import adds_noise

    assert adds_noise(function, arguments) is adds


def test_levels_as_sigmas(correcting: Any) -> None:
    from modules import sd_samplers_timesteps

    from lib_fusion.webui.a1111.levels import sigmas_of

    by_timesteps = object.__new__(sd_samplers_timesteps.CFGDenoiserTimesteps)
    assert sigmas_of(TIMESTEPS, by_timesteps, ALPHAS) == pytest.approx(SIGMAS)
    assert sigmas_of(SIGMAS, object(), ALPHAS) == SIGMAS
