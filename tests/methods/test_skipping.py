"""The skipping policies: AdaptiveDiffusion's decisions, and forecasts against formulas of their own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_fusion.methods.skipping import CORRECTION, Forecaster, LastNoise, ThirdOrderEstimator

GUIDED = torch.tensor([5.0, -4.0]).view(2, 1, 1, 1)


def official(latents: list[torch.Tensor], threshold: float, max_skips: int) -> list[bool]:
    """The published procedure step by step, with its lists: whether each step after this latent reuses the noise."""
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


def test_estimator_decides_as_the_official_code_on_a_thousand_sequences():
    reuses = 0
    for seed in range(1000):
        latents = walk(seed)
        threshold, most = (0.003, 0.01, 0.03, 0.1)[seed % 4], 1 + seed % 5
        estimator = ThirdOrderEstimator(threshold, most)
        decisions = [estimator.observe(latent) for latent in latents]
        assert decisions == official(latents, threshold, most)
        reuses += sum(decisions)
    assert 2000 < reuses < 18000


def test_estimator_decides_as_the_official_code_on_real_latents():
    pytest.importorskip("diffusers")
    from lib_fusion.engine.corrections import CorrectedSampler
    from lib_fusion.engine.generate import Engine
    from lib_fusion.fusion.session import FusionSession
    from lib_fusion.requests.settings import FusionSettings, GenerationSettings

    engine = Engine(Path(__file__).resolve().parents[2] / "demo/general.safetensors")
    latents: list[torch.Tensor] = []
    take = CorrectedSampler.take

    def record(self, step, t, latent):
        latents.append(take(self, step, t, latent))
        return latents[-1]

    reuses = 0
    for sampler in ("DDIM", "DPM++ 2M Karras", "Euler Karras"):
        latents.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CorrectedSampler, "take", record)
            generation = GenerationSettings(("a dog, flat drawing",), width=128, height=128, steps=40, sampler=sampler)
            engine.denoise([("a dog, flat drawing", 3)], generation, FusionSession(FusionSettings()))
        estimator = ThirdOrderEstimator()
        decisions = [estimator.observe(latent) for latent in latents]
        assert len(decisions) == 40
        assert decisions == official(latents, 0.01, 4)
        reuses += sum(decisions)
    assert reuses > 10


def test_most_in_a_row_holds_only_after_five_decisions():
    line = [torch.full((1, 1, 2, 2), float(i)) for i in range(20)]  # even steps: always below the threshold
    estimator = ThirdOrderEstimator(0.01, 2)
    decisions = [estimator.observe(latent) for latent in line]
    assert decisions == [False] * 3 + [True] * 5 + [False, True, True] * 4


def test_paper_policy_gives_the_last_noise_again():
    policy = LastNoise(0.01, 4)
    assert not policy.may_skip(2.0, torch.zeros(1, 2, 2))
    for i in range(4):
        noise = torch.randn(2, 1, 2, 2)
        assert policy.observe(2.0 - i, noise, GUIDED) == []
        skips = policy.may_skip(1.0 - i, torch.full((1, 2, 2), float(i)))
    assert skips
    assert torch.equal(policy.forecast(0.0), noise)


def fill(policy: Forecaster, levels: list[float], course) -> None:
    for level in levels:
        assert not policy.may_skip(level)
        policy.observe(level, course(level), GUIDED)


def test_a_straight_course_is_forecast_exactly_and_always_skipped():
    a, b = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    policy = Forecaster(tolerance=1e-6, max_skips=3)
    fill(policy, [2.5, 2.2, 1.7, 1.5], lambda level: a + level * b)
    for level in (1.4, 1.0, 0.9):
        assert policy.may_skip(level)
        torch.testing.assert_close(policy.forecast(level), a + level * b)
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
        policy = Forecaster(tolerance)
        for level, noise in zip(levels, noises, strict=True):
            policy.observe(level, noise, GUIDED)
        assert policy.errors[-1] == pytest.approx(error)
        assert policy.may_skip(next_level) is skips


def test_the_next_computed_noise_corrects_the_skipped_ones():
    a, b, c = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)

    def course(level: float) -> torch.Tensor:
        return a + b * level + c * level**2

    policy = Forecaster(tolerance=1e9, max_skips=2)
    fill(policy, [2.0, 1.8, 1.5, 1.3], course)
    forecasts = {}
    for level in (1.2, 0.9):
        assert policy.may_skip(level)
        forecasts[level] = policy.forecast(level)
    found = policy.observe(0.6, course(0.6), GUIDED)
    assert [level for level, _ in found] == [1.2, 0.9]
    for level, change in found:
        torch.testing.assert_close(change, CORRECTION * (course(level) - forecasts[level]))
    assert policy.observe(0.5, course(0.5), GUIDED) == []


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(0, 8), st.floats(0, 5), st.integers(0, 10**6))
def test_warm_up_and_most_in_a_row_hold_whatever_comes(max_skips, warmup, tolerance, seed):
    generator = torch.Generator().manual_seed(seed)
    policy, level, run, computed = Forecaster(tolerance, max_skips, warmup), 3.0, 0, 0
    for _ in range(40):
        level -= 0.01 + 0.3 * float(torch.rand(1, generator=generator))
        if policy.may_skip(level):
            run += 1
            assert torch.isfinite(policy.forecast(level)).all()
            assert computed >= max(3, warmup)
            assert run <= max_skips
        else:
            found = policy.observe(level, torch.randn(2, 1, 2, 2, generator=generator), GUIDED)
            assert len(found) == run
            run, computed = 0, computed + 1


def test_a_noise_level_that_does_not_fall_begins_a_new_history():
    """As with Heun, which evaluates every level twice: nothing is ever skipped, and nothing divides by zero."""
    policy = Forecaster(tolerance=1e9, max_skips=3)
    for level in (2.0, 1.5, 1.5, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0):
        assert not policy.may_skip(level)
        policy.observe(level, torch.randn(2, 1, 2, 2), GUIDED)
    policy.observe(-1.0, torch.randn(2, 1, 2, 2), GUIDED)
    policy.observe(-1.5, torch.randn(2, 1, 2, 2), GUIDED)
    assert policy.may_skip(-2.0)
    assert not policy.may_skip(-1.5)


def test_a_correction_goes_by_the_last_three_computed():
    """Of a course that no parabola follows, the parabola through this and the two computed before."""
    policy = Forecaster(tolerance=1e9, max_skips=1)
    levels = [2.0, 1.8, 1.5, 1.3, 0.6]
    noises = [torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in levels]
    for level, noise in zip(levels[:4], noises, strict=False):
        assert policy.observe(level, noise, GUIDED) == []
    was = policy.forecast(1.0)
    ((_, change),) = policy.observe(levels[4], noises[4], GUIDED)
    parabola = np.polyfit(levels[2:], torch.stack(noises[2:]).flatten(1).numpy(), 2)
    expected = torch.from_numpy(np.polyval(parabola, 1.0)).view(2, 4, 3, 3)
    torch.testing.assert_close(change, CORRECTION * (expected - was))


def test_the_papers_policy_skips_four_in_a_row_unless_told():
    line = [torch.full((1, 1, 2, 2), float(i)) for i in range(20)]
    policy = LastNoise()
    policy.observe(1.0, torch.zeros(2, 1, 2, 2), GUIDED)
    expected = [False] * 3 + [True] * 5 + [False, True, True, True, True] * 2 + [False, True]
    assert [policy.may_skip(1.0, latent) for latent in line] == expected
    estimator = ThirdOrderEstimator()
    assert [estimator.observe(latent) for latent in line] == expected
