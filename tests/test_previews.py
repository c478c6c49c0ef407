"""What a pass keeps of itself, and that the pictures drawn from it show it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from lib_fusion.errors import SettingError
from lib_fusion.fusion.level import Level
from lib_fusion.fusion.policies import COMPUTED, SKIPPED
from lib_fusion.fusion.records import AfaWatch, Keep, PictureRecords, Records
from lib_fusion.fusion.session import FusionSession
from lib_fusion.previews import MODEL_COLOURS, attention_maps, draw_previews, skip_timeline, weight_bars
from lib_fusion.requests.settings import PREVIEWS, FusionSettings

POINTS = ("input_blocks.0", "middle_block", "output_blocks.0", "out")
PICTURE = Image.new("RGB", (128, 64), (120, 130, 140))


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default()


def part(image: Image.Image, model: int) -> float:
    """How much of a picture has a model's colour."""
    return float((np.asarray(image) == MODEL_COLOURS[model]).all(-1).mean())


@pytest.mark.parametrize(
    ("kinds", "values", "field"),
    [(["mask"], {}, "previews"), ([], {"map_timesteps": "0"}, "map_timesteps"), ([], {"map_timesteps": ""},
     "map_timesteps"), ([], {"map_timesteps": "100 2000"}, "map_timesteps"), ([], {"map_steps": "1"}, "map_steps")],
)  # fmt: skip
def test_what_is_wanted_is_checked(kinds: list[str], values: dict, field: str) -> None:
    with pytest.raises(SettingError) as caught:
        Keep.read(kinds, values)
    assert caught.value.field == field


def test_nothing_is_kept_where_nothing_is_wanted() -> None:
    settings = FusionSettings.from_dict({"experts": [{"checkpoint": "b"}], "skipping": "Forecast"})
    session = FusionSession(settings)
    session.skips.begin_step([torch.zeros(4, 2, 2)])
    session.skips.needed(0, Level(900.0, 0.1))
    session.begin_call(900.0, [0, 0])
    assert session.records == Records()


def watch(keep: Keep) -> tuple[Records, AfaWatch]:
    records = Records()
    return records, AfaWatch(records, keep, POINTS)


def maps_of(first: float, rows: int = 2) -> torch.Tensor:
    """Maps (rows,2,2,2) in which the first model has this weight in the left half, and all of it in the right."""
    left = torch.tensor([first, 1 - first]).view(1, 2, 1, 1).expand(rows, 2, 2, 1)
    right = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(rows, 2, 2, 1)
    return torch.cat([left, right], dim=-1)


def test_weights_are_means_over_the_rows_of_a_picture_whatever_the_calls() -> None:
    records, watched = watch(Keep.read(["weights"]))
    watched.begin(900.0, [0, 1, 0, 1])  # both halves of two pictures at once
    watched.take(0, torch.cat([maps_of(0.5, 1), maps_of(0.0, 1)] * 2))
    watched.begin(800.0, [0, 1])  # the halves one after the other
    watched.take(0, maps_of(0.2))
    watched.begin(800.0, [0, 1])
    watched.take(0, maps_of(0.4))
    first, second = records.of(0), records.of(1)
    assert [t for t, _ in first.weights] == [900, 800]
    assert first.weights[0][1][0].tolist() == pytest.approx([0.75, 0.25])
    assert second.weights[0][1][0].tolist() == pytest.approx([0.5, 0.5])
    assert first.weights[1][1][0].tolist() == pytest.approx([0.65, 0.35])
    assert first.maps == []


def test_maps_of_the_chosen_blocks_at_the_first_step_below_each_timestep() -> None:
    keep = Keep.read(["maps"], {"map_blocks": "middle_block, out", "map_timesteps": "100 950 940 500"})
    records, watched = watch(keep)
    for timestep, owners in ((980, [0, 1]), (930, [0]), (910, [1]), (480, [0, 1]), (450, [0, 1])):
        watched.begin(float(timestep), owners)
        for point in range(4):
            watched.take(point, maps_of(timestep / 1000, len(owners)))
    first, second = records.of(0), records.of(1)
    assert [(t, sorted(found)) for t, found in first.maps] == [(930, [1, 3]), (480, [1, 3])]
    assert [t for t, _ in second.maps] == [910, 480]  # it was not computed at 930
    assert torch.allclose(first.maps[0][1][3][0, :, 0], torch.full((2,), 0.93))
    with pytest.raises(SettingError, match=r"allowed with these models: input_blocks\.0"):
        watch(Keep.read(["maps"], {"map_blocks": "middle"}))


def test_passes_are_joined() -> None:
    first, second = Records(), Records(skips=[{0: [(COMPUTED, None)]}], points=POINTS)
    first.add(second)
    assert first.of(0).skips == [{0: (COMPUTED, None)}]
    assert first.points == POINTS


def level_at(log_sigma: float) -> Level:
    return Level(500.0, 1 / (1 + math.exp(2 * log_sigma)))


def test_a_timeline_is_kept_with_the_estimates_and_models() -> None:
    settings = FusionSettings.from_dict({"experts": [{"checkpoint": "b"}], "skipping": "Forecast", "skip_warmup": 3,
                                         "skip_max": 1})
    session = FusionSession(settings, keep=Keep.read(["skips"]))
    for step in range(6):
        session.skips.begin_step([torch.zeros(1, 2, 2)] * 2)
        level = level_at(2.0 - 0.1 * step)
        for model in (0, 1) if step else (0,):
            needed = session.skips.needed(model, level)
            for picture in needed:
                noise = torch.full((2, 1, 2, 2), 1.0 + step)  # a line: forecasts are right
                session.skips.observe(model, picture, level, noise, torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
            for picture in {0, 1} - set(needed):
                session.skips.forecast(model, picture, level)
    skips = session.records.of(1).skips
    assert [sorted(step) for step in skips] == [[0]] + [[0, 1]] * 5
    assert "".join(step[0][0] for step in skips) == session.skips.paths[0][1] == "###.#."
    assert skips[0][0][1] is None
    assert skips[3][0][1] == pytest.approx(0, abs=1e-4)
    # in lockstep the base's decision is that of all
    session.skips.begin_step([torch.zeros(1, 2, 2)] * 2, is_joint=True)
    session.skips.needed(0, level_at(1.0))
    assert set(session.records.of(0).skips[-1]) == {0, 1}


def test_a_timeline_shows_what_was_run() -> None:
    run = [{0: (COMPUTED, 0.5), 1: (COMPUTED, 0.01)}] * 10
    skipped = [{0: (SKIPPED, 0.5), 1: (COMPUTED, 0.01)}] * 10
    full, hollow = (skip_timeline(steps, 0.15, ["a", "b"], font, 14) for steps in (run, skipped))
    assert part(full, 0) > 1.5 * part(hollow, 0)
    assert part(full, 1) == part(hollow, 1)
    assert skip_timeline(run * 50, 0.15, ["a", "b"], font, 14).width > full.width


def test_bars_are_as_long_as_the_weights() -> None:
    table = torch.tensor([[0.25, 0.75]]).expand(4, 2)
    bars = weight_bars([(900.0, table), (100.0, table)], POINTS, ["a", "b"], font, 14)
    assert part(bars, 1) == pytest.approx(3 * part(bars, 0), rel=0.1)


def test_maps_show_where() -> None:
    image = attention_maps(PICTURE, [(900.0, {1: maps_of(0.0, 1)[0]})], POINTS, ["a", "b"], font)
    pixels = np.asarray(image).astype(int)
    orange = pixels[..., 0] - pixels[..., 2] > 60
    columns = np.flatnonzero(orange[25:80].any(0))
    assert columns.max() - columns.min() == pytest.approx(PICTURE.width / 2, abs=4)


def test_each_kind_is_drawn_where_there_is_something_to_show() -> None:
    records = PictureRecords(
        masks=[(900.0, torch.zeros(2, 4, dtype=torch.int64))], skips=[{0: (COMPUTED, None)}],
        weights=[(900.0, torch.full((4, 2), 0.5))], maps=[(900.0, {0: torch.full((2, 2, 4), 0.5)})], points=POINTS,
    )  # fmt: skip
    settings = FusionSettings.from_dict({"skipping": "Paper"})
    drawn = dict(draw_previews(PREVIEWS, PICTURE, records, ["a", "b"], settings, font))
    assert list(drawn) == list(PREVIEWS)
    assert all(image.mode == "RGB" and image.getpixel((0, 0)) == (250, 250, 250) for image in drawn.values())
    assert not list(draw_previews(PREVIEWS, PICTURE, PictureRecords(), ["a", "b"], settings, font))
    assert [kind for kind, _ in draw_previews(["maps"], PICTURE, records, ["a"], settings, font)] == ["maps"]
