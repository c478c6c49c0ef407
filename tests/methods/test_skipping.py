"""The skipping policies: AdaptiveDiffusion's decisions, and forecasts against formulas of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_fusion.methods.skipping import CORRECTION, DENOISED_TOLERANCE, DenoisedForecaster, Forecaster, LastNoise
from tests.helpers import official_skips

GUIDED = torch.tensor([5.0, -4.0]).view(2, 1, 1, 1)
LATENT = torch.zeros(1)  # forecasts of noise do not need it


def walk(seed: int, steps: int = 24) -> list[torch.Tensor]:
    """Latents whose steps change by up to a few percent, as along a trajectory."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(1, 4, 5, 6, generator=generator)
    x, size, result = torch.randn(1, 4, 5, 6, generator=generator), 1.0, []
    roughness = 10 ** (-3 + 2.5 * float(torch.rand(1, generator=generator)))
    for _ in range(steps):
        size *= 1 + roughness * float(torch.randn(1, generator=generator))
        x = x + size * direction + 0.3 * roughness * torch.randn(x.shape, generator=generator)
        result.append(x)
    return result


def decide(policy: LastNoise, latents: list[torch.Tensor]) -> list[bool]:
    """The policy's decisions for the steps that begin at these latents; the first noise came before them."""
    policy.observe(9.0, torch.zeros(2, 1, 2, 2), GUIDED, latents[0])
    decisions = []
    for latent in latents:
        policy.watch(latent)
        if policy.measured is not None:
            policy.settle(policy.measured.item())
        decisions.append(policy.may_skip(1.0))
    return decisions


def test_it_decides_as_the_official_code_on_a_thousand_sequences():
    reuses = 0
    for seed in range(1000):
        latents = walk(seed)
        threshold, most = (0.003, 0.01, 0.03, 0.1)[seed % 4], 1 + seed % 5
        decisions = decide(LastNoise(threshold, most), latents)
        assert decisions == official_skips(latents, threshold, most)
        reuses += sum(decisions)
    assert 2000 < reuses < 18000


def test_most_in_a_row_holds_only_after_five_decisions():
    line = [torch.full((1, 2, 2), float(i)) for i in range(20)]  # even steps: always below the threshold
    assert decide(LastNoise(0.01, 2), line) == [False] * 3 + [True] * 5 + [False, True, True] * 4


def test_paper_policy_gives_the_last_noise_again():
    policy = LastNoise(0.01, 4)
    policy.watch(torch.zeros(1, 2, 2))
    assert not policy.may_skip(2.0)
    assert policy.measured is None  # the latent before the first noise is not watched
    for i in range(4):
        noise, latent = torch.randn(2, 1, 2, 2), torch.full((1, 2, 2), float(i))
        assert policy.observe(2.0 - i, noise, GUIDED, latent) == []
        policy.watch(latent)
        if policy.measured is not None:
            policy.settle(policy.measured.item())
    assert policy.may_skip(-1.0)
    assert torch.equal(policy.forecast(0.0, latent), noise)


def see(policy: Forecaster, level: float, noise: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
    """Shows a computed noise, and fetches what was measured as the host does."""
    found = policy.observe(level, noise, GUIDED, LATENT)
    if policy.measured is not None:
        policy.settle(policy.measured.item())
    return found


def fill(policy: Forecaster, levels: list[float], course) -> None:
    for level in levels:
        assert not policy.may_skip(level)
        see(policy, level, course(level))


def test_a_straight_course_is_forecast_exactly_and_always_skipped():
    a, b = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    policy = Forecaster(tolerance=1e-6, max_skips=3)
    fill(policy, [2.5, 2.2, 1.7, 1.5], lambda level: a + level * b)
    for level in (1.4, 1.0, 0.9):
        assert policy.may_skip(level)
        torch.testing.assert_close(policy.forecast(level, LATENT), a + level * b)
    assert not policy.may_skip(0.5)


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
def test_without_tolerance_nothing_is_skipped(tolerance):
    policy = Forecaster(tolerance)
    noise = torch.zeros(2, 1, 2, 2) if tolerance == 0 else None
    fill(policy, [2.0 - 0.1 * i for i in range(12)], lambda level: torch.randn(2, 1, 2, 2) if noise is None else noise)


def test_error_and_decision_are_those_of_the_formulas():
    levels, next_level = [2.0, 1.7, 1.5, 1.1], 0.9
    noises = [torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in levels]
    line = np.polyfit(levels[1:3], torch.stack(noises[1:3]).flatten(1).numpy(), 1)
    expected = torch.from_numpy(np.polyval(line, levels[3])).view(2, 4, 3, 3)
    guided = [5 * n[0] - 4 * n[1] for n in (noises[3], expected)]
    error = float((guided[0] - guided[1]).norm() / guided[0].norm())
    share = 1 / (1 + math.exp(-2 * next_level))  # noise's share of the variance, 1 - alpha
    spans = (next_level - levels[3]) * (next_level - levels[2]) / ((levels[3] - levels[2]) * (levels[3] - levels[1]))
    bound = error * spans * share**0.25
    for tolerance, skips in ((bound * 1.001, True), (bound * 0.999, False)):
        for stride in (1.0, 3.0):
            policy = Forecaster(tolerance * stride)
            for level, noise in zip(levels, noises, strict=True):
                see(policy, level, noise)
            assert policy.errors[-1] == pytest.approx(error)
            assert policy.may_skip(next_level, stride) is skips


def test_the_next_computed_noise_corrects_the_skipped_ones():
    a, b, c = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)

    def course(level: float) -> torch.Tensor:
        return a + b * level + c * level**2

    policy = Forecaster(tolerance=1e9, max_skips=2)
    fill(policy, [2.0, 1.8, 1.5, 1.3], course)
    forecasts = {}
    for level in (1.2, 0.9):
        assert policy.may_skip(level)
        forecasts[level] = policy.forecast(level, LATENT)
    found = see(policy, 0.6, course(0.6))
    assert [level for level, _ in found] == [1.2, 0.9]
    for level, change in found:
        torch.testing.assert_close(change, CORRECTION * (course(level) - forecasts[level]))
    assert see(policy, 0.5, course(0.5)) == []


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(0, 8), st.floats(0, 5), st.integers(0, 10**6))
def test_warm_up_and_most_in_a_row_hold_whatever_comes(max_skips, warmup, tolerance, seed):
    generator = torch.Generator().manual_seed(seed)
    policy, level, run, computed = Forecaster(tolerance, max_skips, warmup), 3.0, 0, 0
    for _ in range(40):
        level -= 0.01 + 0.3 * float(torch.rand(1, generator=generator))
        if policy.may_skip(level):
            run += 1
            assert torch.isfinite(policy.forecast(level, LATENT)).all()
            assert computed >= max(3, warmup)
            assert run <= max_skips
        else:
            found = see(policy, level, torch.randn(2, 1, 2, 2, generator=generator))
            assert len(found) == run
            run, computed = 0, computed + 1


def test_a_noise_level_that_does_not_fall_begins_a_new_history():
    """As with Heun, which evaluates every level twice: nothing is ever skipped, and nothing divides by zero."""
    policy = Forecaster(tolerance=1e9, max_skips=3)
    for level in (2.0, 1.5, 1.5, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0):
        assert not policy.may_skip(level)
        see(policy, level, torch.randn(2, 1, 2, 2))
    see(policy, -1.0, torch.randn(2, 1, 2, 2))
    see(policy, -1.5, torch.randn(2, 1, 2, 2))
    assert policy.may_skip(-2.0)
    assert not policy.may_skip(-1.5)


def test_a_correction_goes_by_the_last_three_computed():
    """Of a course that no parabola follows, the parabola through this and the two computed before."""
    policy = Forecaster(tolerance=1e9, max_skips=1)
    levels = [2.0, 1.8, 1.5, 1.3, 0.6]
    noises = [torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in levels]
    for level, noise in zip(levels[:4], noises, strict=False):
        assert see(policy, level, noise) == []
    was = policy.forecast(1.0, LATENT)
    ((_, change),) = see(policy, levels[4], noises[4])
    parabola = np.polyfit(levels[2:], torch.stack(noises[2:]).flatten(1).numpy(), 2)
    expected = torch.from_numpy(np.polyval(parabola, 1.0)).view(2, 4, 3, 3)
    torch.testing.assert_close(change, CORRECTION * (expected - was))


def test_where_guidance_ends_the_history_goes_on_without_the_unconditional_row():
    """The conditional row's line goes on, the other is its copy, and no step under guidance is corrected by it."""
    course = [torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 3.0)]  # of the conditional and unconditional row

    def noise(level: float, has_guidance: bool = True) -> torch.Tensor:
        return torch.stack([course[0] * level, (course[1] if has_guidance else course[0]) * level])

    policy = Forecaster(tolerance=1.0, max_skips=2, warmup=4)
    for i in range(4):
        see(policy, 4.0 - 0.1 * i, noise(4.0 - 0.1 * i))
    assert policy.may_skip(3.6)
    policy.forecast(3.6, LATENT)
    policy.end_guidance()
    assert policy.may_skip(3.5)
    torch.testing.assert_close(policy.forecast(3.5, LATENT), noise(3.5, has_guidance=False))
    assert not policy.may_skip(3.4)  # two in a row, across the end
    assert [level for level, _ in see(policy, 3.4, noise(3.4, has_guidance=False))] == [3.5]
    assert policy.errors[-1] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(policy.forecast(3.3, LATENT), noise(3.3, has_guidance=False))


def test_the_papers_policy_skips_four_in_a_row_unless_told():
    line = [torch.full((1, 2, 2), float(i)) for i in range(20)]
    expected = [False] * 3 + [True] * 5 + [False, True, True, True, True] * 2 + [False, True]
    assert decide(LastNoise(), line) == expected


def test_where_the_sampler_adds_noise_the_denoised_prediction_is_extrapolated():
    """Of a denoised prediction that is straight in log sigma the noise is forecast exactly, for any latent."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 4, 3, 3, generator=generator, dtype=torch.float64)

    def noise_at(level: float, latent: torch.Tensor) -> torch.Tensor:
        return (latent - (a + level * b)) / math.exp(level)

    policy = DenoisedForecaster(tolerance=1e-6)
    for level in (1.5, 1.2, 0.7, 0.5):
        latent = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)  # with new noise
        assert not policy.may_skip(level)
        assert policy.observe(level, noise_at(level, latent), GUIDED, latent) == []
        if policy.measured is not None:
            policy.settle(policy.measured.item())
    latent = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    assert policy.may_skip(0.4)
    torch.testing.assert_close(policy.forecast(0.4, latent), noise_at(0.4, latent))
    assert policy.observe(0.1, noise_at(0.1, latent), GUIDED, latent) == []  # nothing is corrected


def test_the_error_of_a_denoised_prediction_is_that_of_its_noise():
    generator = torch.Generator().manual_seed(1)
    levels, latent = [1.5, 1.2, 0.7], torch.randn(4, 3, 3, generator=generator)
    noises = [torch.randn(2, 4, 3, 3, generator=generator) for _ in levels]
    denoised = [latent - math.exp(level) * noise for level, noise in zip(levels, noises, strict=True)]
    line = np.polyfit(levels[:2], torch.stack(denoised[:2]).flatten(1).numpy(), 1)
    forecast = (latent - torch.from_numpy(np.polyval(line, levels[2])).view(2, 4, 3, 3)) / math.exp(levels[2])
    guided = [5 * n[0] - 4 * n[1] for n in (noises[2], forecast)]
    policy = DenoisedForecaster()
    for level, noise in zip(levels, noises, strict=True):
        policy.observe(level, noise, GUIDED, latent)
    assert float(policy.measured) == pytest.approx(float((guided[0] - guided[1]).norm() / guided[0].norm()), rel=1e-4)
    assert policy.tolerance == DENOISED_TOLERANCE * Forecaster().tolerance
