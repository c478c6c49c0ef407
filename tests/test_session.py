"""What a sampling pass runs at each timestep, and what it makes of the predictions."""

from __future__ import annotations

import pytest
import torch

from lib_fusion.fusion.records import Keep
from lib_fusion.fusion.session import FusionSession
from lib_fusion.methods import snb
from lib_fusion.requests.settings import FusionSettings


def session(experts: int = 1, **values) -> FusionSession:
    mask = values.pop("fixed_mask", None)
    settings = FusionSettings.from_dict({"experts": [{"checkpoint": str(i)} for i in range(experts)], **values})
    return FusionSession(settings, fixed_mask=mask, keep=Keep.read(["masks"]))


def predictions(models: int, seed: int = 0, size: tuple[int, int] = (6, 10)) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    made = [{i: torch.randn(2, 4, *size, generator=generator) for i in range(models)} for _ in range(2)]
    return made[0], made[1]


def test_without_experts_only_the_base_runs():
    assert session(experts=0).models_at(500) == (0,)


@pytest.mark.parametrize(("outside", "alone"), [("base", 0), ("expert", 1)])
def test_outside_the_window_one_model_runs_and_is_untouched(outside, alone):
    s = session(experts=2, snb_window="600:300", snb_outside=outside)
    assert s.models_at(601) == s.models_at(300) == (alone,)
    assert s.models_at(600) == s.models_at(301) == (0, 1, 2)
    cond, uncond = predictions(3)
    c, u = s.fuse(700, {alone: cond[alone]}, {alone: uncond[alone]}, 7)
    assert c is cond[alone]
    assert u is uncond[alone]


@pytest.mark.parametrize("method", ["SNB", "AFA"])
def test_outside_the_window_all_may_be_averaged(method):
    s = session(experts=2, method=method, snb_window="600:300", snb_outside="average")
    assert s.models_at(700) == s.models_at(500) == (0, 1, 2)
    assert not s.in_lockstep(700)
    assert s.in_lockstep(500) == (method == "AFA")
    cond, uncond = predictions(3)
    c, u = s.fuse(700, cond, uncond, 7)
    torch.testing.assert_close(c, (cond[0] + cond[1] + cond[2]) / 3)
    torch.testing.assert_close(u, (uncond[0] + uncond[1] + uncond[2]) / 3)
    rows = s.fuse_rows(700, cond, torch.tensor([0, 1]), None, None, 7)
    assert torch.equal(rows, c)
    assert s.records.masks == []


@pytest.mark.parametrize("variant", ["own", "code"])
def test_snb_takes_the_unconditional_of_the_variant(variant):
    cond, uncond = predictions(3)
    s = session(experts=2, snb_saliency=variant, k_general=2, k_expert=3)
    c, u = s.fuse(500, cond, uncond, 5)
    saliencies = [snb.saliency(cond[i], uncond[i if variant == "own" else 0], 5) for i in range(3)]
    index = snb.winner(snb.log_maps(saliencies, [2, 3, 3]))
    assert torch.equal(c, snb.select(index, cond))
    assert torch.equal(u, snb.select(index, uncond))
    assert torch.equal(s.records.masks[0].winner, index)


def test_experts_equal_to_the_base_change_nothing():
    cond, uncond = predictions(1)
    for method in ("SNB", "Mask"):
        s = session(experts=1, method=method, fixed_mask=torch.ones(1, 1, 3, 5, dtype=torch.bool))
        c, u = s.fuse(500, dict.fromkeys(range(2), cond[0]), dict.fromkeys(range(2), uncond[0]), 7)
        assert torch.equal(c, cond[0])
        assert torch.equal(u, uncond[0])


def test_average():
    cond, uncond = predictions(3)
    c, _ = session(experts=2, method="Average").fuse(500, cond, uncond, 7)
    torch.testing.assert_close(c, (cond[0] + cond[1] + cond[2]) / 3)


def test_fixed_mask_is_resized_to_the_latent():
    mask = torch.zeros(1, 1, 48, 80, dtype=torch.bool)
    mask[..., 40:] = True
    cond, uncond = predictions(2)
    c, _ = session(method="Mask", fixed_mask=mask).fuse(500, cond, uncond, 7)
    assert torch.equal(c[..., :5], cond[0][..., :5])
    assert torch.equal(c[..., 5:], cond[1][..., 5:])


def test_a_held_mask_spares_models_without_a_position():
    s = session(experts=1, snb_hold=900)
    cond, uncond = predictions(2)
    s.fuse(981, cond, uncond, 7)
    assert s.models_at(901) == (0, 1)
    # Both maps alike: every position is a tie, which the base keeps, so the expert has no position once it is held.
    alone = session(experts=1, snb_hold=900)
    alone.fuse(981, dict.fromkeys(range(2), cond[0]), dict.fromkeys(range(2), uncond[0]), 7)
    assert alone.models_at(881) == (0,)
    c, _ = alone.fuse(881, {0: cond[0]}, {0: uncond[0]}, 7)
    assert c is cond[0]


def test_held_mask_is_the_one_accumulated():
    s = session(experts=1, snb_hold=900)
    steps = [predictions(2, seed) for seed in range(4)]
    for t, (cond, uncond) in zip((981, 961, 881, 861), steps, strict=True):
        s.fuse(t, cond, uncond, 7)
    logs = [
        snb.log_maps([snb.saliency(cond[i], uncond[i], 7) for i in range(2)], [1, 1]) for cond, uncond in steps[:2]
    ]
    expected = snb.winner(logs[0] + logs[1])
    assert torch.equal(s.records.masks[2].winner, expected)
    assert torch.equal(s.records.masks[3].winner, expected)


def test_counts():
    s = session(experts=1)
    s.count(0, 4)
    s.count(0, 2)
    s.count(1, 4)
    assert (s.calls, s.rows) == ([2, 1], [6, 4])
