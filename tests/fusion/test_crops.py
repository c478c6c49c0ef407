"""Models that are run on the boxes of their places, and not on the whole picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_fusion.fusion.crops import LARGEST, MARGIN, Box, Crops, box_around
from lib_fusion.fusion.level import Level
from lib_fusion.fusion.places import draw_boxes, make_places
from lib_fusion.fusion.rows import Rows
from lib_fusion.fusion.session import FusionSession
from lib_fusion.fusion.step import Step
from lib_fusion.requests.settings import FusionSettings
from tests.helpers import PLAIN

SIZE = (32, 64)
LEFT, RIGHT = "columns 1:1 1", "columns 1:1 2"


def session(*places: str, kind: str = "sd1", **values) -> FusionSession:
    """Experts with these places and sharp edges, cropped unless ``values`` say otherwise."""
    own = values.pop("own", {})
    experts = [{"checkpoint": str(i), "place": place, **own.get(i, {})} for i, place in enumerate(places, start=1)]
    read = FusionSettings.from_dict({"experts": experts, **PLAIN, "place_feather": 0, "place_crop": True, **values})
    return FusionSession(read, make_places(read, {}), kinds=[kind], guidance_scale=7)


class Networks:
    """Models whose prediction at a position depends on all that they see; ``seen`` are the boxes of their calls."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.seen = x, {}

    def __call__(self, models: Sequence[int], rows: Sequence[int], box: Box | None) -> torch.Tensor:
        (model,) = models
        self.seen.setdefault(model, []).append(box)
        x = self.x[list(rows)]
        return network(model, x if box is None else box.cut(x))


def network(model: int, x: torch.Tensor) -> torch.Tensor:
    return torch.roll(x, model + 1, dims=-1) * (model + 1) + x.mean((-2, -1), keepdim=True)


def step_of(s: FusionSession, x: torch.Tensor, t: float = 500, alpha: float = 0.5, **options) -> tuple[Step, Networks]:
    step, models = Step(s, Level(t, alpha), Rows.plain(len(x) // 2), **options), Networks(x)
    step.run(range(len(x)), x, models)
    return step, models


def noise(pictures: int = 2, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(2 * pictures, 4, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "margin_left"), [("sd1", 24), ("sd2", 24), ("sdxl", 24)])
def test_two_halves_are_drawn_by_models_that_see_their_halves_and_a_margin(kind: str, margin_left: int) -> None:
    s, x = session(RIGHT, kind=kind), noise()
    step, models = step_of(s, x)
    assert models.seen == {0: [Box(0, 0, 32, 40)], 1: [Box(0, margin_left, 32, 40)]}
    expected = torch.cat([network(0, x[..., :40])[..., :32], network(1, x[..., 24:])[..., 8:]], dim=-1)
    torch.testing.assert_close(step.fuse(), expected, rtol=0, atol=1e-6)
    assert s.rows == [2.5, 2.5]
    assert s.calls == [1, 1]
    assert s.skipped_rows == [1.5, 1.5]


def test_a_feathered_place_is_drawn_in_full() -> None:
    """Its soft edge lies within the box: what is pasted in equals the models' own predictions mixed by the place."""
    s, x = session(RIGHT, place_feather=2), noise()
    step, _ = step_of(s, x)
    soft = s.places.at(SIZE, torch.device("cpu"))[1]
    own = [torch.zeros_like(x) for _ in range(2)]
    own[0][..., :40], own[1][..., 24:] = network(0, x[..., :40]), network(1, x[..., 24:])
    assert bool((soft[..., :24] == 0).all())
    torch.testing.assert_close(step.fuse(), (1 - soft) * own[0] + soft * own[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("places", "values"),
    [
        ([RIGHT], {"place_crop": False}),
        (["0,0,0.9,0.9"], {}),  # the expert's box is too large, and what is left surrounds it
        (["auto"], {}),
        ([RIGHT, "auto"], {}),
        ([RIGHT], {"place_strength": 0.5}),
        ([RIGHT], {"snb_window": "400:0", "snb_outside": "average"}),
    ],
)
def test_where_places_do_not_divide_the_picture_into_parts_all_is_as_without(places: list, values: dict) -> None:
    x = noise()
    step, models = step_of(session(*places, **values), x)
    plain, _ = step_of(session(*places, **{**values, "place_crop": False}), x)
    assert all(box is None for boxes in models.seen.values() for box in boxes)
    assert torch.equal(step.fuse(), plain.fuse())


def test_places_that_cover_the_picture_leave_the_base_out() -> None:
    s, x = session(LEFT, RIGHT), noise()
    step, models = step_of(s, x)
    assert models.seen == {1: [Box(0, 0, 32, 40)], 2: [Box(0, 24, 32, 40)]}
    expected = torch.cat([network(1, x[..., :40])[..., :32], network(2, x[..., 24:])[..., 8:]], dim=-1)
    torch.testing.assert_close(step.fuse(), expected, rtol=0, atol=1e-6)


def test_under_an_expert_of_less_than_full_weight_the_base_draws_too() -> None:
    _, models = step_of(session(RIGHT, own={1: {"weight": 0.5}}), noise())
    assert models.seen == {0: [None], 1: [Box(0, 24, 32, 40)]}


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    x = noise(3)
    together, _ = step_of(session(RIGHT), x)
    alone, _ = step_of(session(RIGHT), x[[1, 4]])
    assert torch.equal(together.fuse()[[1, 4]], alone.fuse())


@settings(max_examples=50, deadline=None)
@given(
    left=st.floats(0, 0.9), top=st.floats(0, 0.9), width=st.floats(0.02, 1), height=st.floats(0.02, 1),
    feather=st.sampled_from([0, 1, 3]), rows=st.integers(2, 12), columns=st.integers(2, 12),
    kind=st.sampled_from(["sd1", "sdxl"]),
)  # fmt: skip
def test_boxes_hold_all_that_is_drawn(left, top, width, height, feather, rows, columns, kind) -> None:
    """Of any rectangle: the box has every position with a share, begins at a multiple, ends at one or at the edge."""
    values = FusionSettings.from_dict({
        "experts": [{"checkpoint": "a", "place": f"{left},{top},{min(width, 1 - left)},{min(height, 1 - top)}"}],
        "place_feather": feather,
    })  # fmt: skip
    places, size, step = make_places(values, {}), (rows * 4, columns * 4), 4 if kind == "sdxl" else 8
    boxes = Crops(places, [1.0, 1.0], [kind, kind]).of((0, 1), size)
    shares = places.at(size, torch.device("cpu"))[1][0, 0]
    for model, share in ((0, 1 - shares), (1, shares)):
        box = boxes.get(model)
        if box is None:
            continue
        outside = share.clone()
        box.cut(outside).zero_()
        assert float(outside.max()) < 1e-6
        assert box.height * box.width <= LARGEST * rows * columns * 16
        for start, length, side in ((box.top, box.height, size[0]), (box.left, box.width, size[1])):
            assert start % step == 0
            assert (start + length) % step == 0 or start + length == side
            assert 0 < length <= side


def test_a_box_is_its_region_grown_by_the_margin_to_multiples() -> None:
    region = torch.zeros(64, 70, dtype=torch.bool)
    region[20:30, 33] = True
    assert box_around(region, 4, 8) == Box(16, 24, 24, 16)  # 16..34 and 29..38
    assert box_around(region, 4, 4) == Box(16, 28, 20, 12)
    region[:, 60] = True
    assert box_around(region, MARGIN, 8) == Box(0, 24, 64, 46)  # to the edge at 70
    region[0, 0] = True
    assert box_around(region, MARGIN, 8) is None
    assert box_around(torch.zeros(8, 8, dtype=torch.bool), MARGIN, 8) is None


def run_pass(s: FusionSession, outputs: str, levels: Sequence[Level], width: slice | None = None) -> list[torch.Tensor]:
    """Each step's fused rows; the latents (1,4,H,W) of a step are made of its number alone, and cut where ``width``."""
    fused = []
    for i, level in enumerate(levels):
        x = noise(1, seed=i) * 0.05 + noise(1, seed=99)
        x = torch.cat([x[:1], x[:1]])
        x = x if width is None else x[..., width]
        step = Step(s, level, Rows.plain(1), list(x[:1] * level.signal), outputs=outputs)
        step.run(range(2), x, Networks(x))
        step.observe()
        fused.append((step.output(), step.fuse()))
    return fused


LEVELS = [Level(950 - 100 * i, 0.05 + 0.1 * i, i) for i in range(9)]


@pytest.mark.parametrize("adds_noise", [False, True])
@pytest.mark.parametrize("outputs", ["noise", "denoised"])
def test_forecasts_are_those_of_the_crop(outputs: str, adds_noise: bool) -> None:
    """An expert's history, decisions and errors are those of a pass over its box alone."""
    values = {"skipping": "Forecast", "skip_tolerance": 0.6, "skip_max": 2}
    s = session(RIGHT, **values)
    alone = FusionSession(FusionSettings.from_dict(values), guidance_scale=7)
    for one in (s, alone):
        one.skips.adds_noise = adds_noise
    whole = run_pass(s, outputs, LEVELS)
    part = run_pass(alone, outputs, LEVELS, slice(0, 40))  # the base's box
    record, own = s.skips.record(), alone.skips.record()
    assert record["paths"][0] == own["paths"][0]
    assert "." in own["paths"][0][0]
    torch.testing.assert_close(torch.tensor(record["errors"][0]), torch.tensor(own["errors"][0]), rtol=1e-3, atol=1e-5)
    for (output, fused), (expected, _) in zip(whole, part):
        torch.testing.assert_close(output[..., :40], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused[..., :32], expected[..., :32], rtol=1e-4, atol=1e-4)


def test_outside_the_box_nothing_is_left_to_chance() -> None:
    x = noise(1)
    for outputs in ("noise", "v", "denoised"):
        step = Step(session(RIGHT), Level(1000, 1e-12), Rows.plain(1), outputs=outputs)  # there a v is all noise
        step.run(range(2), x, Networks(x))
        assert not bool(step.output(1)[..., :24].any())
        assert bool(step.fuse().isfinite().all())


def test_corrections_concern_the_box() -> None:
    s = session(RIGHT, skipping="Forecast", skip_tolerance=10, skip_warmup=3)
    run_pass(s, "noise", LEVELS[:5])
    found = {correction.model: correction.change for correction in s.skips.take_corrections()}
    assert found.keys() == {0, 1}
    for model, box in {0: Box(0, 0, 32, 40), 1: Box(0, 24, 32, 40)}.items():
        change = found[model]
        assert change.shape[-2:] == SIZE
        assert bool(box.cut(change).abs().min() > 0)
        box.cut(change).zero_()
        assert not bool(change.any())


def test_with_another_box_a_model_begins_anew() -> None:
    """Where the expert's window ends, the base draws everywhere; what it predicted before was its half's."""
    s = session(RIGHT, own={1: {"window": [1000, 500]}}, skipping="Forecast", skip_tolerance=10, skip_warmup=3)
    run_pass(s, "noise", LEVELS)
    assert s.skips.paths[1] == ["###.#"]
    assert s.skips.paths[0] == ["###.####."]


def test_maps_of_several_pictures_are_not_cropped() -> None:
    read = FusionSettings.from_dict({"experts": [{"checkpoint": "a", "place": "mask"}], **PLAIN, "place_crop": True})
    halves = torch.cat([draw_boxes([(0.5, 0, 0.5, 1)]), draw_boxes([(0, 0, 0.5, 1)])])
    s = FusionSession(read, make_places(read, {1: halves}), guidance_scale=7)
    _, models = step_of(s, noise())
    assert models.seen == {0: [None], 1: [None]}


def test_which_settings_crop() -> None:
    def crops(place: str = RIGHT, **values: object) -> bool:
        experts: list[Mapping[str, object]] = [{"checkpoint": "a", "place": place}]
        return FusionSettings.from_dict({"experts": experts, "place_crop": True, **values}).crops

    assert crops()
    assert not crops(place_crop=False)
    assert not crops("auto")
    assert not crops(place_strength=0.9)
