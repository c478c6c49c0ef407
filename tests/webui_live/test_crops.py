"""Models that are run on their places only, in the real host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.webui_live.client import Client, Pictures, RefusedError, expert
from tests.webui_live.conftest import Names
from tests.webui_live.test_places import HIRES, LATENTS, apart

#: 48 latent pixels wide; the place in the middle is 16 of them, and its box 32.
WIDE = {"width": 384, "height": 128}
MIDDLE = "columns 1:1:1 2"
#: The place's box as a picture of its own: the host puts the noise of a smaller picture into the middle of a larger.
BOX, AS_BOX = {"width": 256, "height": 128}, {"seed_resize_from_w": 256, "seed_resize_from_h": 128}


def cropped(name: str, place: str = MIDDLE, **more: Any) -> dict[str, Any]:
    return expert(name, **{"place": place, "place_feather": 0, "place_crop": True, **more})


def rows(drawn: Pictures) -> list[list[float]]:
    """Of each model: the rows that were computed, and all."""
    told = drawn.params["Fusion U-Net rows"].split(", ")
    return [[float(number) for number in (part.split()[-3], part.split()[-1])] for part in told]


def test_a_place_is_what_its_model_draws_on_its_box_alone(client: Client, names: Names) -> None:
    """After one step, in the latents, in a batch; the base, whose box would be the whole picture, draws the rest."""
    changes = {"steps": 1, "batch_size": 2}
    with client.settings(LATENTS):
        alone = client.draw(model=names.expert, **BOX, **changes)
        base = client.draw(model=names.base, **WIDE, **AS_BOX, **changes)
        fused = client.draw(cropped(names.expert), **WIDE, **AS_BOX, **changes)
        whole = client.draw(cropped(names.expert, place_crop=False), **WIDE, **AS_BOX, **changes)
    for ours, theirs, others, seen in zip(fused.pixels, alone.pixels, base.pixels, whole.pixels):
        assert apart(ours[:, 16:32], theirs[:, 8:24]) <= 1
        assert apart(seen[:, 16:32], theirs[:, 8:24]) > 1
        outside = [*range(16), *range(32, 48)]
        assert apart(ours[:, outside], others[:, outside]) <= 1
    assert rows(fused) == [[4, 4], [2.7, 4]]
    assert "Fusion place crop: True" in fused.infotexts[0]
    assert "place crop" not in whole.infotexts[0]


def test_a_place_of_more_than_three_quarters_is_not_cropped(client: Client, names: Names) -> None:
    large = client.draw(cropped(names.expert, "0,0,0.9,0.9"))
    assert large.same_as(client.draw(cropped(names.expert, "0,0,0.9,0.9", place_crop=False)))
    assert rows(large)[1][0] == rows(large)[1][1]


@pytest.mark.parametrize(
    ("fusion", "changes"),
    [
        ({}, {"steps": 12, "sampler_name": "DPM++ 2M"}),
        ({"place_feather": 2, "guidance": "always"}, {"steps": 12, **HIRES}),
    ],
)
def test_with_skipping_each_picture_is_as_alone(client: Client, names: Names, fusion: dict, changes: dict) -> None:
    """Forecasts go by the boxes' own history: two models on boxes, some steps left out, in each pass of hires fix."""
    halves = cropped(names.expert, "columns 1:1 2", skipping="Forecast", skip_tolerance=0.5, **fusion)
    wide = {"width": 256, "height": 128, **changes}
    both = client.draw(halves, batch_size=2, **wide)
    alone = client.draw(halves, seed=2, **wide)
    assert apart(both.pixels[1], alone.pixels[0]) <= 2
    skipped = rows(both)
    unskipped = rows(client.draw({**halves, "skipping": "Off"}, batch_size=2, **wide))
    for (some, of_all), (every, of_every) in zip(skipped, unskipped):
        assert some < every < of_every == pytest.approx(of_all, abs=1)
    if not fusion:
        assert [count for count, _ in unskipped] == [36, 36]  # three quarters of 48


def test_other_kinds(client: Client) -> None:
    """SDXL's boxes begin at multiples of 4; an inpainting model's own pictures are cut like the latents."""
    sdxl = client.draw(cropped("tiny_xl_b", "columns 12:8:12 2"), model="tiny_xl", steps=2, width=256)
    assert rows(sdxl) == [[4, 4], [3, 4]]
    inpaint = client.draw(cropped("same as base", prompt="a dog"), model="tiny_inpaint", steps=2, **WIDE)
    assert rows(inpaint) == [[4, 4], [2.7, 4]]
    assert all(np.ptp(drawn.pixels[0]) > 0 for drawn in (sdxl, inpaint))


@pytest.mark.parametrize(
    ("changes", "settings", "told"),
    [
        ({"tiling": True}, {}, "place_crop: True is not allowed; allowed without Tiling"),
        ({}, {"hypertile_enable_unet": True}, "place_crop: True is not allowed; allowed without Hypertile"),
        ({**HIRES}, {"hypertile_enable_unet_secondpass": True}, "allowed without Hypertile"),
    ],
)
def test_what_counts_on_whole_pictures_refuses_crops(
    client: Client, names: Names, changes: dict, settings: dict, told: str
) -> None:
    with client.settings(settings):
        with pytest.raises(RefusedError, match=told):
            client.draw(cropped(names.expert), **WIDE, **changes)
        client.draw(cropped(names.expert, "auto"), **WIDE, **changes)
