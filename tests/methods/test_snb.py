"""SNB against the paper's formulas, written here step by step in float64 and without torch's pooling or resizing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_fusion.methods import snb

SIZES = [(8, 8), (9, 11), (16, 32), (33, 7), (64, 64)]


def formula_saliency(cond: np.ndarray, uncond: np.ndarray, w: float) -> np.ndarray:
    """S of one sample (C,H,W) -> (H,W), by loops: 4x4 mean over zero-padded neighbours, bilinear back to H x W."""
    strength = np.abs(w * (cond - uncond))
    channels, height, width = strength.shape
    padded = np.pad(strength, ((0, 0), (1, 1), (1, 1)))
    blurred = np.zeros((channels, height - 1, width - 1))
    for y in range(height - 1):
        for x in range(width - 1):
            blurred[:, y, x] = padded[:, y : y + 4, x : x + 4].sum(axis=(1, 2)) / 16

    def sample(size: int, out: int, i: int) -> tuple[int, int, float]:
        centre = max((i + 0.5) * size / out - 0.5, 0.0)
        low = min(math.floor(centre), size - 1)
        return low, min(low + 1, size - 1), centre - low

    resized = np.zeros((channels, height, width))
    for y in range(height):
        y0, y1, fy = sample(height - 1, height, y)
        for x in range(width):
            x0, x1, fx = sample(width - 1, width, x)
            top = blurred[:, y0, x0] * (1 - fx) + blurred[:, y0, x1] * fx
            bottom = blurred[:, y1, x0] * (1 - fx) + blurred[:, y1, x1] * fx
            resized[:, y, x] = top * (1 - fy) + bottom * fy
    return resized.mean(axis=0)


def formula_softmax(s: np.ndarray, k: float) -> np.ndarray:
    e = np.exp(k * s - (k * s).max())
    return e / e.sum()


def noises(batch: int, size: tuple[int, int], seed: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, *size, generator=generator, dtype=dtype) for _ in range(4)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_saliency_is_the_formula(batch, size):
    cond, uncond, *_ = noises(batch, size, seed=1)
    got = snb.saliency(cond, uncond, 7.5)
    assert got.shape == (batch, 1, *size)
    for i in range(batch):
        expected = formula_saliency(cond[i].numpy(), uncond[i].numpy(), 7.5)
        np.testing.assert_allclose(got[i, 0].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("k", [(1.0, 1.0), (0.5, 2.0), (100.0, 100.0), (0.0, 1.0)])
@pytest.mark.parametrize("size", SIZES)
def test_mask_and_blend_are_the_formula(size, k):
    cond_g, uncond_g, cond_e, uncond_e = noises(3, size, seed=2)
    w = 4.0
    s_g, s_e = snb.saliency(cond_g, uncond_g, w), snb.saliency(cond_e, uncond_e, w)
    mask = snb.expert_mask(s_g, s_e, *k)
    general, expert = uncond_g + w * (cond_g - uncond_g), uncond_e + w * (cond_e - uncond_e)
    blended = snb.blend(mask, general, expert)
    for i in range(3):
        map_g = formula_softmax(formula_saliency(cond_g[i].numpy(), uncond_g[i].numpy(), w), k[0])
        map_e = formula_softmax(formula_saliency(cond_e[i].numpy(), uncond_e[i].numpy(), w), k[1])
        expected = map_e > map_g
        assert (mask[i, 0].numpy() == expected).all()
        np.testing.assert_array_equal(blended[i].numpy(), np.where(expected, expert[i].numpy(), general[i].numpy()))


def test_half_precision_is_computed_in_float32():
    cond, uncond, *_ = noises(2, (16, 16), seed=3, dtype=torch.float32)
    half = snb.saliency(cond.half(), uncond.half(), 7.5)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, snb.saliency(cond.half().float(), uncond.half().float(), 7.5), rtol=0, atol=0)


def test_a_tie_goes_to_the_general_model():
    s = torch.rand(2, 1, 8, 8)
    assert not snb.expert_mask(s, s).any()
    assert (snb.winner(snb.log_maps([s, s, s], [1, 1, 1])) == 0).all()


def test_large_k_keeps_the_order_where_softmax_underflows():
    s_g, s_e = torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16)
    mask = snb.expert_mask(s_g, s_e, 1000, 1000)
    exact = (1000 * s_e.double()).flatten(2).log_softmax(-1) > (1000 * s_g.double()).flatten(2).log_softmax(-1)
    assert (mask.flatten() == exact.flatten()).float().mean() > 0.99
    assert 0 < mask.float().mean() < 1


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 4), st.integers(4, 20), st.integers(4, 20), st.integers(0, 10**6))
def test_winner_has_the_largest_map(models, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    saliencies = [torch.rand(2, 1, height, width, generator=generator) for _ in range(models)]
    k = (torch.rand(models, generator=generator) * 5).tolist()
    maps = snb.log_maps(saliencies, k)
    torch.testing.assert_close(maps.exp().sum(dim=(2, 3)), torch.ones(2, models))
    index = snb.winner(maps)
    chosen = maps.gather(1, index)
    assert (chosen >= maps).all()
    predictions = {i: torch.full((2, 4, height, width), float(i)) for i in range(models)}
    assert (snb.select(index, predictions) == index).all()


@given(st.integers(0, 10**6), st.floats(1, 20))
@settings(max_examples=30, deadline=None)
def test_selecting_commutes_with_guidance(seed, w):
    cond_g, uncond_g, cond_e, uncond_e = noises(1, (8, 12), seed)
    mask = torch.rand(1, 1, 8, 12, generator=torch.Generator().manual_seed(seed)) > 0.5
    cond, uncond = snb.blend(mask, cond_g, cond_e), snb.blend(mask, uncond_g, uncond_e)
    guided = snb.blend(mask, uncond_g + w * (cond_g - uncond_g), uncond_e + w * (cond_e - uncond_e))
    assert torch.equal(uncond + w * (cond - uncond), guided)


def test_average_is_the_mean():
    a, b, c, _ = noises(2, (8, 8), seed=5)
    torch.testing.assert_close(snb.average([a, b, c]), (a + b + c) / 3)


class TestHeldMask:
    def maps(self, count: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        drawn = [torch.rand(2, 2, 1, 6, 6, generator=generator) for _ in range(count)]
        return [snb.log_maps(list(saliencies), [1, 1]) for saliencies in drawn]

    def test_zero_never_holds(self):
        hold = snb.HeldMask(0)
        for t, maps in zip((981, 500, 1, 0), self.maps(4), strict=True):
            assert not hold.is_held(t)
            assert torch.equal(hold.update(t, maps), snb.winner(maps))

    def test_holds_the_winner_of_the_mean(self):
        hold, maps = snb.HeldMask(900), self.maps(4)
        for t, m in zip((981, 961, 941), maps, strict=False):
            assert torch.equal(hold.update(t, m), snb.winner(m))
        expected = snb.winner((maps[0] + maps[1] + maps[2]) / 3)
        assert hold.is_held(900)
        assert torch.equal(hold.held(), expected)
        assert torch.equal(hold.update(881, maps[3]), expected)
        assert torch.equal(hold.update(1, maps[0]), expected)

    def test_a_pass_that_begins_below_holds_its_first_mask(self):
        hold, maps = snb.HeldMask(900), self.maps(2)
        assert not hold.is_held(400)
        assert torch.equal(hold.update(400, maps[0]), snb.winner(maps[0]))
        assert torch.equal(hold.update(380, maps[1]), snb.winner(maps[0]))


@pytest.mark.parametrize("seed", range(5))
def test_otsus_threshold_is_the_one_of_most_variance_between_its_classes(seed):
    values = np.random.default_rng(seed).gamma(2.0, size=(3, 1, 7, 9)) * [[[[1.0]]], [[[9.0]]], [[[0.1]]]] - 1
    found = snb.otsu(torch.from_numpy(values))
    assert found.shape == (3, 1, 1, 1)
    for v, threshold in zip(values, found.flatten().tolist(), strict=True):
        edges = v.min() + np.ptp(v) * np.arange(1, 128) / 128
        assert np.abs(edges - threshold).min() < 1e-6 * np.ptp(v)

        def between(edge: float, v: np.ndarray = v) -> float:
            low, high = v[v <= edge], v[v > edge]
            return low.size * high.size / v.size**2 * (high.mean() - low.mean()) ** 2

        assert between(threshold) == pytest.approx(max(between(edge) for edge in edges))


def test_a_mix_is_the_weighted_sum():
    a, b, c, _ = noises(2, (5, 6), seed=6)
    soft = torch.rand(2, 1, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(snb.mix({0: 0.2, 1: 0.5, 2: 0.3}, {0: a, 1: b, 2: c}), 0.2 * a + 0.5 * b + 0.3 * c)
    torch.testing.assert_close(snb.mix({0: 1 - soft, 2: soft}, {0: a, 2: c}), (1 - soft) * a + soft * c)
    assert torch.equal(snb.mix({0: 0.2, 1: 0.5, 2: 0.3}, dict.fromkeys(range(3), a)), a)
