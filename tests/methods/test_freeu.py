"""FreeU against the official code's formulas, written here in float64 with a Fourier transform and step by step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_fusion.methods import freeu
from lib_fusion.methods.freeu import FreeU, LowBand, Stage
from tests.helpers import relative_error

SIZES = (8, 9, 16, 33, 64, 129)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def formula_skip(skip: torch.Tensor, scale: float, cutoff: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Transform, shift, mask the middle ``[n//2 - r, n//2 + r)`` of both axes, and back; the real part."""
    skip = skip.double()
    waves = torch.fft.fftshift(torch.fft.fftn(skip, dim=(-2, -1)), dim=(-2, -1))
    mask = torch.full(waves.shape, high, dtype=torch.float64)
    y, x = (n // 2 for n in skip.shape[-2:])
    ry, rx = (max(1, math.floor(half * cutoff)) for half in (y, x))
    mask[..., y - ry : y + ry, x - rx : x + rx] = scale
    return torch.fft.ifftn(torch.fft.ifftshift(waves * mask, dim=(-2, -1)), dim=(-2, -1)).real


def formula_backbone(h: torch.Tensor, factor: float, version: int, channels: list[int] | None = None) -> torch.Tensor:
    h = h.double()
    result = h.clone()
    for sample, out in zip(h, result, strict=True):
        mean = sample.mean(0)
        low, high = mean.min(), mean.max()
        normalised = (mean - low) / (high - low) if high > low else torch.zeros_like(mean)
        scale = torch.full_like(mean, factor) if version == 1 else (factor - 1) * normalised + 1
        for c in range(len(sample) // 2) if channels is None else channels:
            out[c] = sample[c] * scale
    return result


def features(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Not centred, so that the mean and the low frequencies are there to be changed."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (maps + torch.linspace(-1, 2, shape[-1], dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("height", "width"), [*itertools.product(SIZES, repeat=2)])
def test_skip_equals_the_official_formula(height, width, dtype):
    skip = features(2, 3, height, width, dtype=dtype)
    filtered = freeu.filter_skip(skip, 0.2)
    assert filtered.dtype == dtype
    assert relative_error(filtered, formula_skip(skip, 0.2)) < TOLERANCE[dtype]
    assert torch.equal(skip, features(2, 3, height, width, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("height", "width"), [*itertools.product(SIZES, repeat=2)])
def test_backbone_equals_the_official_formula(height, width, version, dtype):
    h = features(2, 6, height, width, dtype=dtype)
    scaled = freeu.scale_backbone(h, 1.4, version)
    assert scaled.dtype == dtype
    assert relative_error(scaled, formula_backbone(h, 1.4, version)) < TOLERANCE[dtype]
    assert torch.equal(scaled[:, 3:], h[:, 3:])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(-1, 3), st.floats(0, 1), st.floats(-1, 3), st.integers(0, 99)
)
def test_any_cutoff_and_high_end(height, width, scale, cutoff, high, seed):
    skip = features(2, 3, height, width, seed=seed)
    filtered = freeu.filter_skip(skip, scale, cutoff, high)
    expected = formula_skip(skip, scale, cutoff, high)
    assert (filtered - expected).abs().max() < 1e-5 * skip.abs().max() * max(1, abs(scale), abs(high))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.sampled_from([1, 2]))
def test_any_window_of_channels(channels, offset, width, version):
    h = features(2, channels, 5, 7)
    start, many = round(offset * channels), round(width * channels)
    window = [(start + i) % channels for i in range(many)]
    scaled = freeu.scale_backbone(h, 1.5, version, offset, width)
    assert relative_error(scaled, formula_backbone(h, 1.5, version, window)) < 1e-6


def test_a_constant_map_is_left_as_it_is():
    for shape in ((1, 4, 1, 1), (2, 4, 3, 5)):
        h = torch.full(shape, 0.7)
        assert torch.equal(freeu.scale_backbone(h, 1.6), h)


def test_factors_of_one_change_no_bit():
    x = features(2, 8, 9, 11)
    assert torch.equal(freeu.scale_backbone(x, 1.0), x)
    assert torch.equal(freeu.filter_skip(x, 1.0), x)
    neutral = FreeU({4: Stage(offset=0.5, width=1, cutoff=0.5)})
    assert neutral.stages == {}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_joined_features_are_edited_in_place(memory_format, dtype, version):
    stage = Stage(1.5, 0.2, offset=0.75, width=0.5, high=1.1)
    made = FreeU({2: stage}, version)
    made.strength = 1.0
    joined = features(2, 12, 8, 10, dtype=dtype).to(memory_format=memory_format)
    h, skip = joined[:, :8].clone(), joined[:, 8:].clone()
    made.edit_(joined, 8, multiple=2)
    assert relative_error(joined[:, :8], freeu.scale_backbone(h, 1.5, version, 0.75, 0.5)) < TOLERANCE[dtype]
    assert relative_error(joined[:, 8:], freeu.filter_skip(skip, 0.2, high=1.1)) < TOLERANCE[dtype]


def test_strength_draws_factors_towards_one():
    joined = features(2, 12, 8, 10)
    made = FreeU({4: Stage(1.6, 0.2, high=1.4)}, version=1)
    for strength in (0.0, 0.25, 1.0):
        made.strength = strength
        edited = joined.clone()
        made.edit_(edited, 8, multiple=4)
        made.edit_(edited, 8, multiple=2)  # another stage: nothing
        b, s, high = (1 + strength * (factor - 1) for factor in (1.6, 0.2, 1.4))
        assert relative_error(edited[:, :8], freeu.scale_backbone(joined[:, :8], b, 1)) < 1e-6
        assert relative_error(edited[:, 8:], freeu.filter_skip(joined[:, 8:], s, high=high)) < 1e-6
    made.strength = 0.0
    made.edit_(edited := joined.clone(), 8, multiple=4)
    assert torch.equal(edited, joined)


@pytest.mark.parametrize("cutoff", [0.0, 0.5])
def test_autocast_does_not_make_it_less_precise(cutoff):
    skip = features(2, 3, 16, 16)
    plain = freeu.filter_skip(skip, 0.2, cutoff)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(freeu.filter_skip(skip, 0.2, cutoff), plain)


def test_published_threshold_takes_seven_waves():
    assert LowBand.like(torch.zeros(1, 1, 16, 9), 0.0).waves.shape == (1, 7, 16 * 9)


def test_schedule_switches_at_whole_steps():
    def on(start: float, stop: float, steps: int = 10) -> list[int]:
        return [i for i in range(steps) if freeu.strength(i, steps, start, stop, 0) == 1]

    assert on(0, 1) == list(range(10))
    assert on(0.3, 0.8) == on(3, 8) == [3, 4, 5, 6, 7]
    assert on(0.25, 0.59) == [2, 3, 4]  # rounded down to whole steps
    assert on(0.7, 0.7, 20) == []
    assert on(2, 1000) == list(range(2, 10))
    assert on(0.29, 1, 100)[0] == 29  # 0.29 * 100 is a little less than 29


@pytest.mark.parametrize("smooth", [0, 0.3, 1])
def test_schedule_mixes_the_switch_with_a_ramp(smooth):
    """As sd-webui-freeu has it: the ramp rises to 1 at the start and falls to 0 at the stop."""
    ramp = [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0]
    for i, height in enumerate(ramp):
        switch = 1 if 4 <= i < 8 else 0
        mixed = (1 - smooth) * switch + smooth * height
        assert freeu.strength(i, 10, 0.4, 0.8, smooth) == pytest.approx(mixed)


@given(st.floats(0, 12), st.floats(0, 1000), st.floats(0, 1000), st.floats(0, 1))
def test_strength_stays_between_none_and_all(step, start, stop, smooth):
    assert 0 <= freeu.strength(min(step, 12), 12, start, stop, smooth) <= 1


def test_step_of_a_noise_level():
    levels = [14.0, 7.0, 3.0, 1.0, 0.0]
    assert [freeu.step_at(level, levels) for level in levels] == [0, 1, 2, 3, 4]
    assert freeu.step_at(20.0, levels) == 0
    assert freeu.step_at(5.0, levels) == 1.5
    assert freeu.step_at(-1.0, levels) == 4
