"""A step of N models: which of them run for which rows, and how their outputs become one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.fusion.crops import Box
from lib_fusion.fusion.level import Level, Schedule
from lib_fusion.fusion.places import make_places
from lib_fusion.fusion.policies import Skips
from lib_fusion.fusion.records import Keep
from lib_fusion.fusion.rows import Rows
from lib_fusion.fusion.session import FusionSession, make_freeu
from lib_fusion.fusion.step import Step
from lib_fusion.methods import snb
from lib_fusion.methods.freeu import Stage
from lib_fusion.methods.skipping import Policy
from lib_fusion.requests.settings import FusionSettings
from tests.helpers import PLAIN

SIZE = (6, 10)
Noises = dict[int, torch.Tensor]


def session(experts: int = 1, **values) -> FusionSession:
    """By the paper's rule unless ``values`` say otherwise; ``own``: rows of the first expert."""
    own, masks = values.pop("own", {}), values.pop("masks", {})
    listed = [{"checkpoint": str(i), **(own if i == 0 else {})} for i in range(experts)]
    settings = FusionSettings.from_dict({"experts": listed, **PLAIN, **values})
    return FusionSession(settings, make_places(settings, masks), Keep.read(["masks"]), guidance_scale=7)


def predictions(models: int, seed: int = 0) -> tuple[Noises, Noises]:
    """Conditional and unconditional noise of two pictures, by model."""
    generator = torch.Generator().manual_seed(seed)
    made = [{i: torch.randn(2, 4, *SIZE, generator=generator) for i in range(models)} for _ in range(2)]
    return made[0], made[1]


class Models:
    """Models with given outputs; ``calls`` are those that were asked for: (models, rows)."""

    def __init__(self, outputs: Noises) -> None:
        self.outputs, self.calls = outputs, []

    def __call__(self, models: Sequence[int], rows: Sequence[int], box: Box | None = None) -> torch.Tensor:
        self.calls.append((tuple(models), list(rows)))
        output = self.outputs[models[0]][list(rows)].clone()
        return output if box is None else box.cut(output)


def halves(cond: Noises, uncond: Noises) -> Models:
    return Models({i: torch.cat([cond[i], uncond[i]]) for i in cond})


def take(s: FusionSession, t: float, cond: Noises, uncond: Noises) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves of the fused noise of a step at this timestep."""
    step = Step(s, Level(t, 0.5), Rows.plain(2))
    models = halves(cond, uncond)
    step.run(range(4), torch.zeros(4, 4, *SIZE), models)
    assert [call for (call,), _ in models.calls] == list(step.models)
    step.observe()
    fused = step.fuse()
    return (step.output() if fused is None else fused).chunk(2)


def models_at(s: FusionSession, t: float) -> tuple[int, ...]:
    return Step(s, Level(t, 0.5), Rows.plain(2)).models


def test_without_experts_only_the_base_runs():
    assert models_at(session(experts=0), 500) == (0,)


@pytest.mark.parametrize(("outside", "alone"), [("base", 0), ("expert", 1)])
def test_outside_the_window_one_model_runs_and_is_untouched(outside, alone):
    s = session(experts=2, snb_window="600:300", snb_outside=outside)
    assert models_at(s, 601) == models_at(s, 300) == (alone,)
    assert models_at(s, 600) == models_at(s, 301) == (0, 1, 2)
    cond, uncond = predictions(3)
    c, u = take(s, 700, {alone: cond[alone]}, {alone: uncond[alone]})
    assert torch.equal(c, cond[alone])
    assert torch.equal(u, uncond[alone])


@pytest.mark.parametrize("method", ["SNB", "AFA"])
def test_outside_the_window_all_may_be_averaged(method):
    s = session(experts=2, method=method, snb_window="600:300", snb_outside="average")
    assert models_at(s, 700) == models_at(s, 500) == (0, 1, 2)
    assert not Step(s, Level(700, 0.5), Rows.plain(2)).is_joint
    assert Step(s, Level(500, 0.5), Rows.plain(2)).is_joint == (method == "AFA")
    cond, uncond = predictions(3)
    c, u = take(s, 700, cond, uncond)
    torch.testing.assert_close(c, (cond[0] + cond[1] + cond[2]) / 3)
    torch.testing.assert_close(u, (uncond[0] + uncond[1] + uncond[2]) / 3)
    assert s.records.masks == []


@pytest.mark.parametrize("variant", ["own", "code"])
def test_snb_takes_the_unconditional_of_the_variant(variant):
    cond, uncond = predictions(3)
    s = session(experts=2, snb_saliency=variant, k_general=2, k_expert=3)
    c, u = take(s, 500, cond, uncond)
    saliencies = [snb.saliency(cond[i], uncond[i if variant == "own" else 0], 7) for i in range(3)]
    index = snb.winner(snb.log_maps(saliencies, [2, 3, 3]))
    assert torch.equal(c, snb.select(index, cond))
    assert torch.equal(u, snb.select(index, uncond))
    assert torch.equal(s.records.masks[0].winner.long(), index)


def test_experts_equal_to_the_base_change_nothing():
    cond, uncond = predictions(1)
    half = torch.zeros(1, 1, 6, 10)
    half[..., 5:] = 1
    for how in ({}, {"snb_hold": 900, "snb_from": 300}, {"own": {"place": "mask"}, "masks": {1: half}}):
        s = session(experts=1, **how)
        c, u = take(s, 500, dict.fromkeys(range(2), cond[0]), dict.fromkeys(range(2), uncond[0]))
        assert torch.equal(c, cond[0])
        assert torch.equal(u, uncond[0])


def test_average():
    cond, uncond = predictions(3)
    c, _ = take(session(experts=2, method="Average"), 500, cond, uncond)
    torch.testing.assert_close(c, (cond[0] + cond[1] + cond[2]) / 3)


def test_a_painted_mask_is_resized_to_the_latents():
    mask = torch.zeros(1, 1, 48, 80)
    mask[..., 40:] = 1
    cond, uncond = predictions(2)
    c, _ = take(session(own={"place": "mask"}, masks={1: mask}, place_feather=0), 500, cond, uncond)
    assert torch.equal(c[..., :5], cond[0][..., :5])
    assert torch.equal(c[..., 5:], cond[1][..., 5:])


def test_a_held_mask_spares_models_without_a_position():
    s = session(experts=1, snb_hold=900)
    cond, uncond = predictions(2)
    take(s, 981, cond, uncond)
    assert models_at(s, 901) == (0, 1)
    # Both maps alike: every position is a tie, which the base keeps, so the expert has no position once it is held.
    alone = session(experts=1, snb_hold=900)
    take(alone, 981, dict.fromkeys(range(2), cond[0]), dict.fromkeys(range(2), uncond[0]))
    assert models_at(alone, 881) == (0,)
    c, _ = take(alone, 881, {0: cond[0]}, {0: uncond[0]})
    assert torch.equal(c, cond[0])


def test_held_mask_is_the_one_accumulated():
    s = session(experts=1, snb_hold=900)
    steps = [predictions(2, seed) for seed in range(4)]
    for t, (cond, uncond) in zip((981, 961, 881, 861), steps, strict=True):
        take(s, t, cond, uncond)
    logs = [
        snb.log_maps([snb.saliency(cond[i], uncond[i], 7) for i in range(2)], [1, 1]) for cond, uncond in steps[:2]
    ]
    expected = snb.winner(logs[0] + logs[1])
    assert torch.equal(s.records.masks[2].winner.long(), expected)
    assert torch.equal(s.records.masks[3].winner.long(), expected)


def test_counts():
    s = session(experts=1)
    s.count(0, 4)
    s.count(0, 2)
    s.count(1, 4)
    assert (s.calls, s.rows) == ([2, 1], [6, 4])


@given(cuts=st.sets(st.integers(1, 5)), seed=st.integers(0, 99))
def test_the_calls_that_the_rows_come_in_do_not_matter(cuts: set[int], seed: int) -> None:
    """Two pictures of two AND parts each: six rows, in any number of calls."""
    outputs = {i: torch.randn(6, 4, *SIZE, generator=torch.Generator().manual_seed(seed + i)) for i in range(2)}
    rows = Rows([[1.0, 0.5], [1.0, 0.5]])
    fused = []
    for edges in ([0, 6], [0, *sorted(cuts), 6]):
        s, models = session(), Models(outputs)
        step = Step(s, Level(500, 0.5), rows)
        for start, stop in itertools.pairwise(edges):
            first = step.run(range(start, stop), torch.zeros(stop - start, 4, *SIZE), models)
            assert torch.equal(first, outputs[0][start:stop])
        fused.append(step.fuse())
        assert s.calls == [len(edges) - 1] * 2
        assert s.rows == [6, 6]
    assert torch.equal(fused[0], fused[1])
    combined = [rows.combine(outputs[i]) for i in range(2)]
    mask = snb.expert_mask(*(snb.saliency(c, u, 7) for c, u in combined))
    expected = snb.blend(mask[[0, 0, 1, 1, 0, 1]], outputs[0], outputs[1])
    torch.testing.assert_close(fused[0], expected, rtol=0, atol=0)


def test_without_the_unconditional_half_the_last_mask_is_used() -> None:
    s = session()
    cond, uncond = predictions(2)
    models = halves(cond, uncond)

    def half() -> torch.Tensor | None:
        step = Step(s, Level(500, 0.5), Rows.plain(2))
        step.run(range(2), torch.zeros(2, 4, *SIZE), models)
        return step.fuse()

    assert half() is None  # no mask yet: the base's output stands
    c, _ = take(s, 500, cond, uncond)
    assert torch.equal(half(), c)


class EverySecond(Policy):
    """A policy that skips its second step and forecasts a number."""

    def __init__(self, forecast: float) -> None:
        super().__init__()
        self.value, self.steps, self.seen = forecast, 0, []

    def may_skip(self, log_sigma: float, stride: float = 1.0) -> bool:
        self.steps += 1
        return self.steps == 2

    def forecast(self, log_sigma: float, latent: torch.Tensor) -> torch.Tensor:
        self.latent = latent
        return torch.full((2, 4, *SIZE), self.value)

    def observe(self, log_sigma: float, noise: torch.Tensor, weights: torch.Tensor, latent: torch.Tensor) -> list:
        self.seen.append((log_sigma, noise.clone(), weights.flatten().tolist(), latent))
        return []


@pytest.mark.parametrize(
    ("kind", "a", "b"), [("noise", 1.0, 0.0), ("v", 0.5**0.5, 0.5**0.5), ("denoised", -1.0, 1.0)]
)
@pytest.mark.parametrize("splits", [[4], [2, 2], [3, 1]])
def test_rows_that_are_not_needed_are_forecast(kind: str, a: float, b: float, splits: list[int]) -> None:
    """Picture 1 is forecast in the second step, as noise, and put into the rows as the model's own prediction.

    The noise is ``a`` times that and ``b`` times the input: at the second step's alpha of 0.5 sigma is 1.
    """
    policies = {0: EverySecond(0.0), 1: EverySecond(0.25)}
    policies[0].steps = 5  # never skips
    s = session(experts=0, skipping="Forecast")
    s.skips = Skips(s.settings, make=lambda _model, picture: policies[picture])
    cond, uncond = predictions(1)
    models = halves(cond, uncond)
    x = torch.randn(4, 4, *SIZE, generator=torch.Generator().manual_seed(9))
    for alpha in (0.2, 0.5):
        level = Level(500, alpha)
        step = Step(s, level, Rows.plain(2), list(x[:2]), outputs=kind)
        models.calls.clear()
        start, outputs = 0, []
        for n in splits:
            outputs.append(step.run(range(start, start + n), x[start : start + n], models))
            start += n
        step.observe()
    output = torch.cat(outputs)
    assert [row for _, rows in models.calls for row in rows] == [0, 2]
    assert torch.equal(output[[0, 2]], models.outputs[0][[0, 2]])
    torch.testing.assert_close(a * output[[1, 3]] + b * x[[1, 3]], torch.full((2, 4, *SIZE), 0.25))
    assert s.rows == [4 + 2]
    assert s.skipped_rows == [2]
    log_sigma, noise, weights, _ = policies[0].seen[1]
    assert log_sigma == pytest.approx(0)
    torch.testing.assert_close(noise, a * models.outputs[0][[0, 2]] + b * x[[0, 2]])
    assert weights == [7, -6]
    assert len(policies[1].seen) == 1


def test_a_whole_model_runs_for_all_pictures_or_for_none() -> None:
    policies = {0: EverySecond(0.0), 1: EverySecond(0.0)}
    policies[0].steps = 5
    s = session(experts=0, skipping="Forecast")
    s.skips = Skips(s.settings, make=lambda _model, picture: policies[picture])
    models = halves(*predictions(1))
    for _ in range(2):
        step = Step(s, Level(500, 0.5), Rows.plain(2), list(torch.zeros(2, 4, *SIZE)), whole=True)
        step.run(range(4), torch.zeros(4, 4, *SIZE), models)
        step.observe()
    assert [rows for _, rows in models.calls] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_no_number_is_named(value: float) -> None:
    s = session(experts=2)
    cond, uncond = predictions(3)
    uncond[2][1, 0, 3, 3] = value
    take(s, 500, cond, uncond)
    with pytest.raises(FusionError, match=r"expert 2 \(1\) has predicted infinite values or NaN"):
        s.check_finite()
    s.check_finite()  # said once


def test_shares_are_parts_or_places() -> None:
    cond, uncond = predictions(2)
    for method, share in (("Average", 0.5), ("SNB", None)):
        s = session(method=method)
        step = Step(s, Level(500, 0.5), Rows.plain(2))
        step.run(range(4), torch.zeros(4, 4, *SIZE), halves(cond, uncond))
        step.fuse()
        for model in range(2):
            expected = share or (s.records.masks[0].winner[1] == model).float()
            assert torch.equal(torch.as_tensor(step.share(model, 1)), torch.as_tensor(expected))


def test_a_correction_changes_the_rows_of_its_picture() -> None:
    s = session()
    cond, uncond = predictions(2)
    step = Step(s, Level(500, 0.5), Rows.plain(2))
    step.run(range(4), torch.zeros(4, 4, *SIZE), halves(cond, uncond))
    change = torch.randn(2, 4, *SIZE)
    step.correct(1, 1, change)
    torch.testing.assert_close(step.output(1)[[1, 3]], torch.stack([cond[1][1], uncond[1][1]]) + change)
    assert torch.equal(step.output(1)[[0, 2]], torch.stack([cond[1][0], uncond[1][0]]))
    assert torch.equal(step.output(0), torch.cat([cond[0], uncond[0]]))


@given(weights=st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=3), min_size=1, max_size=3))
def test_the_table_of_rows(weights: list[list[float]]) -> None:
    rows = Rows(weights)
    flat = [(picture, part) for picture, parts in enumerate(weights) for part in range(len(parts))]
    assert rows.owners == [picture for picture, _ in flat] + list(range(len(weights)))
    assert rows.num_all == len(flat) + len(weights)
    seen = [rows.rows_of(picture) for picture in range(rows.num_pictures)]
    assert sorted(row for found in seen for row in found) == list(range(rows.num_all))
    values = torch.randn(rows.num_all, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond, uncond = rows.combine(values)
    for picture, found in enumerate(seen):
        assert all(rows.owners[row] == picture for row in found)
        assert found[0] == rows.first_rows()[picture]
        *parts, last = values[found]
        assert torch.equal(uncond[picture], last)
        expected = last + sum(w * (part - last) for w, part in zip(weights[picture], parts))
        torch.testing.assert_close(cond[picture], expected, rtol=1e-9, atol=1e-9)
        guided = (rows.guidance(3.0, values.device)[picture].double() * values[found]).sum(0)
        torch.testing.assert_close(guided, last + 3 * (expected - last), rtol=1e-5, atol=1e-5)


def test_a_level_in_its_three_ways() -> None:
    level = Level(500.0, 0.2)
    assert level.log_sigma == pytest.approx(math.log(2))  # sigma^2 = (1 - alpha) / alpha
    assert level.signal**2 + level.noise**2 == pytest.approx(1)
    schedule = Schedule([14.0, 6.0, 2.0, 0.0])
    levels = [schedule.level(value, 500, 0.2) for value in (14.0, 6.0, 4.0, 2.0)]
    assert [level.position for level in levels] == [0, 1, 1.5, 2]
    assert [level.is_last for level in levels] == [False, False, False, True]
    assert {level.stride for level in levels} == {1.0}
    assert replace(levels[0], position=0.0) == Level(500, 0.2)


def test_a_steps_stride_is_its_span_over_the_mean_span() -> None:
    """In log sigma; a level between two steps goes to the end of its step, and the last step ends without noise."""
    sigmas = [8.0, 4.0, 2.0, 0.25, 0.0]  # spans of 1, 1 and 3 times log 2
    schedule = Schedule(sigmas, sigmas)
    strides = [schedule.level(s, 500, 1 / (1 + s**2)).stride for s in (8.0, 4.0, 2.0, 0.5, 0.25)]
    assert strides == pytest.approx([0.6, 0.6, 1.8, 0.6, math.inf])


def test_the_saliency_of_v_predictions_is_that_of_their_noise() -> None:
    """Up to what both halves share the noise is sqrt(alpha) v; maps of unlike sharpness show the factor."""
    cond, uncond = predictions(2)
    step = Step(session(k_expert=3), Level(500, 0.1), Rows.plain(2), outputs="v")
    step.run(range(4), torch.zeros(4, 4, *SIZE), halves(cond, uncond))
    root = 0.1**0.5
    saliencies = [snb.saliency(root * cond[i], root * uncond[i], 7) for i in range(2)]
    expected = snb.winner(snb.log_maps(saliencies, [1, 3]))
    assert torch.equal(step.fuse()[:2], snb.select(expected, cond))


def test_models_in_lockstep_are_forecast_together() -> None:
    s = session(method="AFA", afa_maps="uniform", skipping="Forecast")
    s.skips = Skips(s.settings, make=lambda *_: EverySecond(0.5))
    s.lockstep = SimpleNamespace(totals=[torch.zeros(3)])
    models = halves(*predictions(2))
    for _ in range(2):
        step = Step(s, Level(500, 0.5), Rows.plain(2), list(torch.zeros(2, 4, *SIZE)))
        output = step.run(range(4), torch.zeros(4, 4, *SIZE), models)
        step.observe()
        assert step.fuse() is None
    assert [call for call, _ in models.calls] == [(0, 1)]
    assert torch.equal(output, torch.full_like(output, 0.5))
    assert (s.rows, s.skipped_rows) == ([4, 4], [4, 4])
    assert s.skips.paths == {0: ["#.", "#."]}


def test_rows_that_are_counted_are_computed_unless_said_otherwise() -> None:
    s = session(experts=0)
    s.count(0, 4)
    s.count(0, 0, 2)
    assert (s.calls, s.rows, s.skipped_rows) == ([1], [4], [2])


def test_another_base_begins_with_policies_of_its_own() -> None:
    s = session(experts=0, skipping="Forecast")
    before = s.skips
    s.forget()
    assert isinstance(s.skips, Skips)
    assert s.skips is not before
    plain = session(experts=0)
    plain.forget()
    assert plain.skips is None


def test_a_session_has_no_guidance_of_its_own() -> None:
    assert FusionSession(FusionSettings()).guidance_at(1000) == 1


@pytest.mark.parametrize(
    ("chosen", "kind", "version", "stages"),
    [("SD1.5", "sd1", "2", {4: Stage(1.5, 0.9), 2: Stage(1.6, 0.2)}),
     ("Auto", "sdxl", "1", {4: Stage(1.1, 0.6), 2: Stage(1.2, 0.4)})],
)  # fmt: skip
def test_freeus_published_factors(chosen: str, kind: str, version: str, stages: dict[int, Stage]) -> None:
    made = make_freeu(FusionSettings(freeu=chosen, freeu_version=version), kind)
    assert made.stages == stages
    assert made.version == int(version)


def test_freeu_acts_by_the_passs_schedule_in_models_of_one_kind() -> None:
    s = session(freeu="SD1.5", freeu_start=0.5, freeu_stop=0.75)
    s.begin([float(8 - i) for i in range(9)])  # eight steps: on from the fifth until the sixth
    on = []
    for position in range(8):
        with s.using_freeu(1, Level(500, 0.5, position)):
            on.append(s.freeu[1].strength)
        assert s.freeu[1].strength == 0
    assert on == [0, 0, 0, 0, 1, 1, 0, 0]


def test_freeu_may_not_stop_before_it_starts() -> None:
    levels = [3.0, 2.0, 1.0, 0.0]
    with pytest.raises(SettingError, match=r"freeu_stop: 0.5 .*freeu_start 1 in 3 steps"):
        session(freeu="SD1.5", freeu_start=1, freeu_stop=0.5).begin(levels)
    session(freeu="Off", freeu_start=1, freeu_stop=0.5).begin(levels)
    session(freeu="SD1.5", freeu_start=0.5, freeu_stop=0.5).begin(levels)


@pytest.mark.parametrize(
    ("values", "reach"),
    [({}, 1), ({"skip_max": 3}, 3), ({"skip_correct": False}, 0), ({"skipping": "Paper"}, 0)],
)
def test_how_far_back_corrections_go(values: dict, reach: int) -> None:
    assert Skips(FusionSettings.from_dict({"skipping": "Forecast", **values})).reach == reach


@pytest.mark.parametrize(
    ("before", "after", "begins_again"),
    [
        ({}, {}, False),
        ({}, {"is_joint": True}, True),
        ({"is_joint": True}, {"is_joint": True}, False),
        ({"is_joint": True}, {}, True),
        ({}, {"spares_uncond": True}, False),
        ({"spares_uncond": True}, {"spares_uncond": True}, False),
        ({"spares_uncond": True}, {}, True),
    ],
)
def test_a_step_keeps_the_history_unless_it_is_of_another_sort(before: dict, after: dict, begins_again: bool) -> None:
    made: list[EverySecond] = []
    skips = Skips(FusionSettings(skipping="Forecast"), make=lambda *_: made.append(EverySecond(0.0)) or made[-1])
    for options in (before, after):
        skips.begin_step([torch.zeros(4, *SIZE)], **options)
        skips.needed(0, Level(500, 0.5))
    assert len(made) == 1 + begins_again


def test_the_record_of_skips() -> None:
    policy = EverySecond(0.0)
    policy.errors = [0.1234567]
    skips = Skips(FusionSettings(skipping="Forecast"), make=lambda *_: policy)
    for _ in range(3):
        skips.begin_step([torch.zeros(4, *SIZE)])
        skips.needed(0, Level(500, 0.5))
    assert skips.record() == {
        "computed": {0: [2]}, "skipped": {0: [1]}, "paths": {0: ["#.#"]}, "errors": {0: [[0.12346]]},
    }  # fmt: skip


def test_freeu_that_was_due_and_did_not_act_is_an_error() -> None:
    s = session(experts=0, freeu="Custom", freeu_b3=1.5)
    s.begin([900.0, 500.0, 100.0])
    s.check_acted()  # nothing was due yet
    step = Step(s, s.schedule.level(900.0, 900.0, 0.1), Rows.plain(2))
    step.run(range(4), torch.zeros(4, 4, *SIZE), halves(*predictions(1)))
    with pytest.raises(FusionError, match="FreeU could not act: another extension"):
        s.check_acted()
    s.freeu[0].strength = 1.0
    s.freeu[0].edit_(torch.ones(1, 8, 4, 4), 4, 1)
    s.check_acted()


def test_freeus_schedule_is_checked_against_the_pass() -> None:
    late = session(experts=0, freeu="Custom", freeu_b3=1.5, freeu_start=8, freeu_stop=10)
    late.begin([1.0])  # img2img may have no step to take
    late.begin([])
    with pytest.raises(FusionError, match=r"freeu_start: 8.0 is not allowed; allowed in a pass of 4 steps: at most 4"):
        late.begin([5.0, 4.0, 3.0, 2.0, 1.0])


@pytest.mark.parametrize(("policy", "needed"), [("Forecast", [0]), ("Paper", [])])
def test_the_last_step_is_never_forecast(policy: str, needed: list[int]) -> None:
    skips = Skips(FusionSettings(skipping=policy), make=lambda *_: EverySecond(0.0))
    skips.begin_step([torch.zeros(4, *SIZE)])
    assert skips.needed(0, Level(500, 0.5)) == [0]
    assert skips.needed(0, Level(20, 0.9, 1, is_last=True)) == needed
    assert skips.paths == {0: ["##" if needed else "#."]}


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"snb_hold": 500}, "#####.#.##"),
        ({"snb_hold": 0}, "###.#.#.##"),
        ({"snb_hold": 500, "own": {"place": "columns 1:1 2"}}, "###.#.#.##"),
        ({"snb_hold": 500, "method": "Average"}, "###.#.#.##"),
    ],
)
def test_nothing_is_forecast_while_a_mask_is_decided_that_is_held(values: dict, path: str) -> None:
    s = session(skipping="Forecast", skip_tolerance=10, skip_warmup=3, **values)
    models = halves(*predictions(2))
    for i in range(10):
        timestep = 950 - 100 * i
        level = Level(timestep, 1 - timestep / 1000, i, is_last=i == 9)
        step = Step(s, level, Rows.plain(2), list(torch.zeros(2, 4, *SIZE)))
        step.run(range(4), torch.zeros(4, 4, *SIZE), models)
        step.observe()
        step.fuse()
    assert s.skips.paths == {model: [path] * 2 for model in (0, 1)}


def test_of_models_in_lockstep_each_has_the_common_record() -> None:
    settings = FusionSettings.from_dict({"experts": [{"checkpoint": "a"}], "method": "AFA", "skipping": "Forecast"})
    skips = Skips(settings, timeline=[])
    for is_joint in (True, False):
        skips.begin_step([torch.zeros(4, *SIZE)], 1.0, is_joint, spares_uncond=False)
        skips.needed(0, Level(500, 0.5))
    assert skips.timeline == [{0: [("#", None)], 1: [("#", None)]}, {0: [("#", None)]}]


def test_a_step_says_whether_its_models_are_in_lockstep() -> None:
    begun = []
    s = session(method="AFA", afa_maps="uniform", snb_window="600:0", snb_outside="average", skipping="Forecast",
                guidance="always", guidance_until=400, guidance_after=1)  # fmt: skip
    s.skips = SimpleNamespace(begin_step=lambda _latents, _signal, *options: begun.append(options))
    for t in (700, 500, 400):
        Step(s, Level(t, 0.5), Rows.plain(2), list(torch.zeros(2, 4, *SIZE)))
    assert begun == [(False, False), (True, False), (True, True)]


def test_pictures_are_judged_one_by_one_unless_they_are_a_whole() -> None:
    for options, needed in (({}, [0]), ({"whole": True}, [0, 1])):
        policies = [EverySecond(0.0), EverySecond(0.0)]
        policies[1].steps = 1  # skips the first
        skips = Skips(FusionSettings(skipping="Forecast"), make=lambda _model, i, made=policies: made[i])
        skips.begin_step(list(torch.zeros(2, 4, *SIZE)))
        assert skips.needed(0, Level(500, 0.5), **options) == needed


@pytest.mark.parametrize("sigma_scaled", [False, True])
def test_policies_get_latents_as_the_sampler_holds_them_and_as_picture_and_noise(sigma_scaled: bool) -> None:
    policy = EverySecond(0.0)
    watched = []
    policy.watch = watched.append
    s = session(experts=0, skipping="Forecast")
    s.skips = Skips(s.settings, make=lambda *_: policy)
    x = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(1))
    held = x / 0.2**0.5 if sigma_scaled else x
    for _ in range(2):
        step = Step(s, Level(500, 0.2), Rows.plain(1), list(held), sigma_scaled=sigma_scaled)
        step.run(range(2), torch.cat([x, x]), Models({0: torch.zeros(2, 4, *SIZE)}))
        step.observe()
    assert torch.equal(watched[0], held[0])
    for latent in (policy.seen[0][3], policy.latent):
        torch.testing.assert_close(latent, x[0] / 0.2**0.5)


def test_decisions_wait_for_the_device_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models, three pictures: one transfer a step brings all that they have measured."""
    transfers = []
    for name in ("tolist", "item", "__float__", "__bool__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real: transfers.append(self) or real(self))
    s = session(skipping="Forecast", skip_tolerance=10, skip_max=1)
    cond = {i: torch.randn(3, 4, *SIZE) for i in range(2)}
    models = halves(cond, {i: torch.randn(3, 4, *SIZE) for i in range(2)})
    for i in range(8):
        transfers.clear()
        level = Level(900 - 100 * i, 0.1 * (i + 1))
        step = Step(s, level, Rows.plain(3), list(torch.zeros(3, 4, *SIZE)))
        step.run(range(6), torch.zeros(6, 4, *SIZE), models)
        step.observe()
        assert len(transfers) <= 1
    assert s.skips.paths == {0: ["####.#.#"] * 3, 1: ["####.#.#"] * 3}
