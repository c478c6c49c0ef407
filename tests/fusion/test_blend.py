"""Who draws where: the phases of SNB, weights and windows of experts, places, and the guidance interval."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_fusion.errors import SettingError
from lib_fusion.fusion.level import Level
from lib_fusion.fusion.places import Places, make_places, read_boxes
from lib_fusion.fusion.policies import Skips
from lib_fusion.fusion.rows import Rows
from lib_fusion.fusion.session import FusionSession
from lib_fusion.fusion.step import Step
from lib_fusion.methods import snb
from lib_fusion.requests.settings import FusionSettings
from tests.fusion.test_step import SIZE, EverySecond, Models, halves, models_at, predictions, session, take

PHASES = {"snb_hold": 900, "snb_from": 300}


def log_maps(cond: dict, uncond: dict, models: int = 2) -> torch.Tensor:
    return snb.log_maps([snb.saliency(cond[i], uncond[i], 7) for i in range(models)], [1] * models)


def test_decided_then_averaged_then_placed() -> None:
    """While the mask is decided each step has its own; then the average draws; then the mask of all maps is used."""
    s, total = session(**PHASES), 0
    for t, seed in ((981, 0), (901, 1)):
        cond, uncond = predictions(2, seed)
        maps = log_maps(cond, uncond)
        total = total + maps
        c, u = take(s, t, cond, uncond)
        own = snb.winner(maps)
        assert torch.equal(c, snb.select(own, cond))
        assert torch.equal(u, snb.select(own, uncond))
    for t, seed in ((900, 2), (301, 3)):
        cond, uncond = predictions(2, seed)
        c, _ = take(s, t, cond, uncond)
        assert torch.equal(c, snb.average([cond[0], cond[1]]))
    held = snb.winner(total)
    for t, seed in ((300, 4), (1, 5)):
        cond, uncond = predictions(2, seed)
        c, _ = take(s, t, cond, uncond)
        assert torch.equal(c, snb.select(held, cond))
    assert [record.timestep for record in s.records.masks] == [981, 901, 300, 1]


def test_used_at_once_is_the_held_mask_of_before() -> None:
    s = session(snb_hold=900, snb_from=1000)
    first, second = predictions(2, 0), predictions(2, 1)
    take(s, 981, *first)
    c, _ = take(s, 900, *second)
    assert torch.equal(c, snb.select(snb.winner(log_maps(*first)), second[0]))


def test_a_timestep_that_is_evaluated_again_counts_once() -> None:
    """As by samplers of second order, and by corrections that take a step again."""
    s = session(**PHASES)
    first, again, later = (predictions(2, seed) for seed in range(3))
    take(s, 981, *first)
    take(s, 981, *again)
    take(s, 950, *later)
    take(s, 500, *later)
    c, _ = take(s, 250, *later)
    assert torch.equal(c, snb.select(snb.winner(log_maps(*first) + log_maps(*later)), later[0]))


def test_a_pass_that_begins_below_decides_in_its_first_step() -> None:
    s = session(**PHASES)
    first, later = predictions(2, 0), predictions(2, 1)
    mask = snb.winner(log_maps(*first))
    c, _ = take(s, 700, *first)
    assert torch.equal(c, snb.select(mask, first[0]))
    c, _ = take(s, 600, *later)
    assert torch.equal(c, snb.average(later[0].values()))
    c, _ = take(s, 200, *later)
    assert torch.equal(c, snb.select(mask, later[0]))


def test_saliency_is_gathered_outside_the_window_where_all_models_run() -> None:
    s = session(snb_window=[500, 0], snb_outside="average", snb_hold=900, snb_from=1000)
    early, late = predictions(2, 0), predictions(2, 1)
    c, _ = take(s, 981, *early)
    assert torch.equal(c, snb.average(early[0].values()))
    c, _ = take(s, 400, *late)
    assert torch.equal(c, snb.select(snb.winner(log_maps(*early)), late[0]))


def test_divergence_of_two_experts_leaves_the_base_out() -> None:
    s = session(experts=2, snb_saliency="divergence", **PHASES)
    cond, uncond = predictions(3)
    maps = snb.log_maps([snb.saliency(cond[i], cond[0], 7) for i in (1, 2)], [1, 1])
    expected = 1 + snb.winner(maps)
    c, _ = take(s, 981, cond, uncond)
    assert torch.equal(c, snb.select(expected, cond))
    c, _ = take(s, 600, {i: cond[i] for i in (1, 2)}, {i: uncond[i] for i in (1, 2)})
    assert torch.equal(c, snb.average([cond[1], cond[2]]))
    assert 0 not in models_at(s, 600)
    c, _ = take(s, 200, {i: cond[i] for i in (1, 2)}, {i: uncond[i] for i in (1, 2)})
    assert torch.equal(c, snb.select(expected, cond))


def test_divergence_of_one_expert_has_otsus_threshold() -> None:
    s = session(snb_saliency="divergence", snb_hold=0)
    cond, uncond = predictions(2)
    cond[1] = cond[0].clone()
    cond[1][..., 5:] += 3.0
    c, _ = take(s, 981, cond, uncond)
    distance = snb.saliency(cond[1], cond[0], 7)
    assert torch.equal(c, torch.where(distance > snb.otsu(distance), cond[1], cond[0]))
    assert torch.equal(c[..., :3], cond[0][..., :3])
    assert torch.equal(c[..., 7:], cond[1][..., 7:])


@given(seed=st.integers(0, 99), share=st.floats(0.2, 0.8), apart=st.floats(4, 9))
def test_otsu_parts_two_heaps(seed: int, share: float, apart: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    is_high = torch.rand(1, 1, 16, 16, generator=generator) < share
    values = torch.randn(1, 1, 16, 16, generator=generator) * 0.3 + apart * is_high
    assert torch.equal(values > snb.otsu(values), is_high)


# Weights and windows


def test_a_weight_of_nothing_is_the_base_alone() -> None:
    s = session(own={"weight": 0}, **PHASES)
    for t in (981, 600, 200):
        assert models_at(s, t) == (0,)
    assert models_at(session(method="Average", own={"weight": 0}), 500) == (0,)


def test_a_weight_draws_the_expert_towards_the_base() -> None:
    cond, uncond = predictions(2)
    index = snb.winner(log_maps(cond, uncond))
    c, _ = take(session(own={"weight": 0.25}), 500, cond, uncond)
    expected = torch.where(index == 1, 0.75 * cond[0] + 0.25 * cond[1], cond[0])
    torch.testing.assert_close(c, expected)
    c, _ = take(session(method="Average", own={"weight": 0.25}), 500, cond, uncond)
    torch.testing.assert_close(c, (cond[0] + 0.25 * cond[1]) / 1.25)


def test_an_expert_takes_part_in_its_own_window_only() -> None:
    s = session(experts=2, own={"window": [800, 400]})
    assert models_at(s, 900) == models_at(s, 400) == (0, 2)
    assert models_at(s, 800) == models_at(s, 401) == (0, 1, 2)
    cond, uncond = predictions(3)
    s = session(experts=2, own={"window": [1000, 500]}, snb_hold=900, snb_from=1000)
    take(s, 981, cond, uncond)
    mask = snb.winner(log_maps(cond, uncond, 3))
    c, _ = take(s, 300, {i: cond[i] for i in (0, 2)}, {i: uncond[i] for i in (0, 2)})
    assert torch.equal(c, torch.where(mask == 2, cond[2], cond[0]))  # its positions are the base's


@pytest.mark.parametrize("row", [{"weight": 0.5}, {"window": [900, 0]}, {"place": "columns 1:1 2"}])
def test_afa_refuses_rows_of_experts(row: dict) -> None:
    with pytest.raises(SettingError, match=f"experts.0..{next(iter(row))}: .*allowed with method AFA"):
        session(method="AFA", own=row)


# Places


@pytest.mark.parametrize(
    ("text", "boxes"),
    [("auto", None), ("", None), ("mask", None), ("mask 1f", None), ("columns 1:1 2", [(0.5, 0, 0.5, 1)]),
     ("Rows 1:2:1  2", [(0, 0.25, 1, 0.5)]), ("0,0,0.25,1; .5,.5,.5,.5", [(0, 0, 0.25, 1), (0.5, 0.5, 0.5, 0.5)])],
)  # fmt: skip
def test_places_are_read(text: str, boxes: list | None) -> None:
    assert read_boxes(text, "place") == boxes


@pytest.mark.parametrize("text", ["left", "columns 1:1", "columns 1:1 3", "columns 1:0 1", "rows 1:1 0", "0,0,2,1", ";",
                                  "0.5,0,0.6,1", "1,2,3", "nan,0,1,1"])  # fmt: skip
def test_wrong_places_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="allowed: auto; mask; rectangles"):
        make_places(FusionSettings.from_dict({"experts": [{"checkpoint": "a", "place": text}]}), {})


@pytest.mark.parametrize("feather", [0, 2])
def test_an_empty_place_never_runs_the_expert_and_a_full_one_never_the_base(feather: float) -> None:
    black, white = torch.zeros(1, 1, 48, 80), torch.ones(1, 1, 48, 80)
    for mask, models in ((black, (0,)), (white, (1,))):
        s = session(own={"place": "mask"}, masks={1: mask}, place_feather=feather, **PHASES)
        assert all(models_at(s, t) == models for t in (981, 600, 200))


def test_places_of_two_experts_and_the_base() -> None:
    cond, uncond = predictions(3)
    own = {"place": "0,0,0.3,1"}
    settings = FusionSettings.from_dict({"experts": [{"checkpoint": "a", **own}, {"checkpoint": "b",
                                         "place": "columns 4:1 2"}], "place_feather": 0})  # fmt: skip
    s = FusionSession(settings, make_places(settings, {}), guidance_scale=7)
    c, _ = take(s, 500, cond, uncond)
    expected = torch.cat([cond[1][..., :3], cond[0][..., 3:8], cond[2][..., 8:]], dim=-1)
    assert torch.equal(c, expected)


def test_a_feathered_edge_is_soft_and_the_parts_add_up_to_one() -> None:
    half = torch.zeros(1, 1, 6, 10)
    half[..., 5:] = 1
    places = Places({1: half}, feather=1.0)
    soft = places.at((6, 10), torch.device("cpu"))[1]
    line = soft[0, 0, 2]
    assert line[0] < 0.01
    assert line[-1] > 0.99
    assert (line[1:] >= line[:-1]).all()
    assert 0.2 < line[4] < 0.5 < line[5] < 0.8
    cond, uncond = predictions(2)
    s = session(own={"place": "mask"}, masks={1: half}, place_feather=1)
    c, _ = take(s, 500, cond, uncond)
    torch.testing.assert_close(c, (1 - soft) * cond[0] + soft * cond[1])


def test_the_strength_of_places_runs_from_saliency_to_the_place() -> None:
    cond, uncond = predictions(2)
    half = torch.zeros(1, 1, 6, 10)
    half[..., 5:] = 1
    how = {"own": {"place": "mask"}, "masks": {1: half}, "place_feather": 0}
    plain = take(session(), 500, cond, uncond)[0]
    assert torch.equal(take(session(**how, place_strength=0), 500, cond, uncond)[0], plain)
    alone = take(session(**how, place_strength=1), 500, cond, uncond)[0]
    assert torch.equal(alone, torch.cat([cond[0][..., :5], cond[1][..., 5:]], dim=-1))
    maps, beta = log_maps(cond, uncond), 0.6 / 0.4
    maps[:, :1] += beta * (1 - half + 1e-3).log()
    maps[:, 1:] += beta * (half + 1e-3).log()
    between = take(session(**how, place_strength=0.6), 500, cond, uncond)[0]
    assert torch.equal(between, snb.select(snb.winner(maps), cond))


def test_saliency_decides_what_places_leave_over() -> None:
    cond, uncond = predictions(3)
    own = {"place": "columns 1:1 1"}
    s = session(experts=2, own=own, place_feather=0)
    c, _ = take(s, 500, cond, uncond)
    maps = snb.log_maps([snb.saliency(cond[i], uncond[i], 7) for i in (0, 2)], [1, 1])
    rest = torch.where(snb.winner(maps) == 1, cond[2], cond[0])
    assert torch.equal(c, torch.cat([cond[1][..., :5], rest[..., 5:]], dim=-1))


@given(left=st.floats(0, 0.9), width=st.floats(0.05, 1), feather=st.floats(0, 3), seed=st.integers(0, 9))
def test_equal_models_give_that_model_in_any_places(left: float, width: float, feather: float, seed: int) -> None:
    cond, uncond = predictions(1, seed)
    place = f"{left:.3f},0,{min(width, 1 - left):.3f},1"
    s = session(experts=1, own={"place": place, "weight": 0.7}, place_feather=feather)
    outputs = Models({i: torch.cat([cond[0], uncond[0]]) for i in range(2)})
    step = Step(s, Level(500, 0.5), Rows.plain(2))
    step.run(range(4), torch.zeros(4, 4, *SIZE), outputs)
    fused = step.fuse()
    assert torch.equal(step.output() if fused is None else fused, outputs.outputs[0])


# The guidance interval


@pytest.mark.parametrize(
    ("when", "experts", "scale"),
    [("off", 1, 7), ("with experts", 1, 2), ("with experts", 0, 7), ("always", 0, 2), ("always", 1, 2)],
)
def test_when_the_guidance_is_lowered(when: str, experts: int, scale: float) -> None:
    s = session(experts=experts, guidance=when, guidance_until=500, guidance_after=2)
    assert s.guidance_at(501) == 7
    assert s.guidance_at(500) == scale
    assert session(guidance="always", guidance_after=9).guidance_at(100) == 7  # never raised
    assert session(guidance="always", guidance_until=0).guidance_at(0) == 7  # a last step at timestep 0 is not below 0


@pytest.mark.parametrize("splits", [[4], [2, 2], [1, 3], [3, 1], [1, 1, 1, 1]])
def test_without_guidance_unconditional_rows_are_copies(splits: list[int]) -> None:
    s = session(guidance="always", guidance_until=500, guidance_after=1)
    cond, uncond = predictions(2)
    take(s, 600, cond, uncond)  # a mask to use
    mask = s.records.masks[-1].winner
    models, step, start = halves(cond, uncond), Step(s, Level(400, 0.5), Rows.plain(2)), 0
    for n in splits:
        step.run(range(start, start + n), torch.zeros(n, 4, *SIZE), models)
        start += n
    step.observe()
    assert step.scale == 1
    assert all(row < 2 for _, rows in models.calls for row in rows)
    c, u = step.fuse().chunk(2)
    assert torch.equal(c, snb.select(mask, cond))
    assert torch.equal(u, c)
    assert s.rows == [6, 6]
    assert s.skipped_rows == [0, 0]


def test_composed_prompts_keep_their_unconditional_rows() -> None:
    s = session(experts=0, guidance="always", guidance_after=1)
    step = Step(s, Level(400, 0.5), Rows([[1.0, 0.5]]))
    models = Models({0: torch.randn(3, 4, *SIZE)})
    step.run(range(3), torch.zeros(3, 4, *SIZE), models)
    assert models.calls == [((0,), range(3))] or models.calls == [((0,), [0, 1, 2])]
    assert not step.spares_uncond


def test_skipping_goes_on_where_the_unconditional_rows_end() -> None:
    """Both savings count: half rows there, of which the forecast ones are spared, too."""
    s = session(experts=0, skipping="Forecast", guidance="always", guidance_until=500, guidance_after=1)
    made = [EverySecond(0.5), EverySecond(0.5)]
    ended = []
    for policy in made:
        policy.end_guidance = lambda policy=policy: ended.append(policy)
    s.skips = Skips(s.settings, make=lambda _model, picture: made[picture])
    models = halves(*predictions(1))
    outputs = []
    for t in (700, 400, 300):
        step = Step(s, Level(t, 0.5), Rows.plain(2), list(torch.zeros(2, 4, *SIZE)))
        outputs.append(step.run(range(4), torch.zeros(4, 4, *SIZE), models))
        step.observe()
        assert ended == (made if t <= 400 else [])
    assert [rows for _, rows in models.calls] == [[0, 1, 2, 3], [0, 1]]
    assert torch.equal(outputs[1], torch.full_like(outputs[1], 0.5))
    _, noise, weights, *_ = made[0].seen[1]
    assert weights == [1, 0]
    assert torch.equal(noise[0], noise[1])
    assert s.rows == [6]
    assert s.skipped_rows == [2]


def test_the_saliency_keeps_the_full_scale() -> None:
    """So that a mask does not depend on the interval."""
    cond, uncond = predictions(2)
    plain = take(session(k_expert=3), 400, cond, uncond)[0]
    lower = session(k_expert=3, guidance="always", guidance_until=1000, guidance_after=2)
    assert torch.equal(take(lower, 400, cond, uncond)[0], plain)


def test_divergence_below_otsus_threshold_is_the_bases() -> None:
    """Also where the expert's noise differs from the base's."""
    s = session(snb_saliency="divergence", snb_hold=0)
    cond, uncond = predictions(2)
    cond[1] = cond[0] + 0.1
    cond[1][..., 5:] += 3.0
    c, _ = take(s, 981, cond, uncond)
    assert torch.equal(c[..., :3], cond[0][..., :3])
    assert torch.equal(c[..., 7:], cond[1][..., 7:])


def test_the_base_is_averaged_too_unless_it_is_only_the_reference() -> None:
    cond, uncond = predictions(3)
    s = session(experts=2, snb_saliency="own", **PHASES)
    take(s, 981, cond, uncond)
    assert models_at(s, 600) == (0, 1, 2)


def test_outside_the_window_the_base_acts_where_the_expert_does_not() -> None:
    values = {"experts": 2, "snb_window": [600, 300], "snb_outside": "expert"}
    assert models_at(session(**values), 700) == (1,)
    assert models_at(session(**values, own={"weight": 0}), 700) == (0,)
    assert models_at(session(**values, own={"place": "0,0,1,1"}), 700) == (1,)


def test_beside_a_feathered_place_saliency_decides_about_what_is_left() -> None:
    cond, uncond = predictions(3)
    s = session(experts=2, own={"place": "columns 1:1 1"}, place_feather=1)
    c, _ = take(s, 500, cond, uncond)
    place = s.blend.places.at(SIZE, torch.device("cpu"))[1]
    maps = snb.log_maps([snb.saliency(cond[i], uncond[i], 7) for i in (0, 2)], [1, 1])
    wins = (snb.winner(maps) == 1) & (place <= 0.5)
    second = (1 - place) * wins
    assert (second[wins] < 0.99).any()  # some of it is in the soft edge
    torch.testing.assert_close(c, (1 - place - second) * cond[0] + place * cond[1] + second * cond[2])


def test_a_place_rules_in_full_unless_said_otherwise() -> None:
    half = torch.zeros(1, 1, 6, 10)
    half[..., 5:] = 1
    assert Places({1: half}).rules(1)
    assert not Places({1: half}).rules(2)
    assert not Places({1: half}, strength=0.5).rules(1)
    assert torch.equal(Places({1: half}).at((6, 10), torch.device("cpu"))[1], half)  # nor is it feathered


# Models that cannot predict in the first steps, which have no signal


def test_a_model_without_signal_is_left_out_and_the_mask_is_decided_later() -> None:
    s = session(**PHASES)
    s.blend.limits = {1: 930}
    first, later = predictions(2, 0), predictions(2, 1)
    assert s.blend.models_at(981) == (0,)
    c, _ = take(s, 901, *first)  # the first step that all run in counts
    mask = snb.winner(log_maps(*first))
    assert torch.equal(c, snb.select(mask, first[0]))
    take(s, 500, *later)
    c, _ = take(s, 250, *later)
    assert torch.equal(c, snb.select(mask, later[0]))


@pytest.mark.parametrize(("limits", "alone"), [({1: 930}, 0), ({0: 930}, 1)])
@pytest.mark.parametrize("changes", [{"method": "Average"}, {"snb_outside": "expert", "snb_window": [500, 0]},
                                     {"snb_outside": "base", "snb_window": [500, 0]}, {}])  # fmt: skip
def test_the_other_draws_alone_whatever_is_asked_for(limits: dict, alone: int, changes: dict) -> None:
    s = session(**{**PHASES, **changes})
    s.blend.limits = limits
    assert s.blend.models_at(981) == (alone,)


def test_of_three_the_two_that_can_predict_draw_and_gather_nothing() -> None:
    """The third would have no map to compete with."""
    s = session(2, **PHASES)
    s.blend.limits = {2: 930}
    early, first = predictions(3, 0), predictions(3, 1)
    assert s.blend.models_at(981) == (0, 1)
    c, _ = take(s, 981, {i: early[0][i] for i in (0, 1)}, {i: early[1][i] for i in (0, 1)})
    assert torch.equal(c, early[0][0])  # there is no mask yet
    c, _ = take(s, 901, *first)
    assert torch.equal(c, snb.select(snb.winner(log_maps(*first, models=3)), first[0]))


def test_where_nobody_can_predict_all_do_as_before() -> None:
    s = session(**PHASES)
    s.blend.limits = {0: 930, 1: 930}
    assert s.blend.models_at(981) == (0, 1)
