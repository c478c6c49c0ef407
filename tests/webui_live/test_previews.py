"""The pictures that show how a picture came about, in the host's gallery and folders."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.webui_live.client import Client, Pictures, RefusedError, expert
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host

PREVIEW = {"denoiser_fusion_preview_masks": True}
AFA = {"denoiser_fusion_preview_weights": True, "denoiser_fusion_preview_maps": True}
ALL = PREVIEW | AFA | {"denoiser_fusion_preview_skips": True}
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}


@pytest.mark.parametrize("changes", [{}, {"batch_size": 2, "n_iter": 2}, HIRES | {"n_iter": 2}])
def test_a_strip_after_each_picture(client: Client, names: Names, changes: dict) -> None:
    plain = client.draw(expert(names.expert), **changes)
    shown = client.draw(expert(names.expert), settings=PREVIEW, **changes)
    pictures, strips = shown.pixels[::2], shown.pixels[1::2]
    assert len(pictures) == len(strips) == len(plain.pixels)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, plain.pixels))
    assert shown.infotexts[::2] == shown.infotexts[1::2]
    height, width, _ = pictures[0].shape
    for strip in strips:
        assert strip.shape[1] > 4 * width
        assert strip.shape[0] > height
    assert not np.array_equal(strips[0], strips[-1]) or len(strips) == 1


@pytest.mark.parametrize("changes", [{}, {"batch_size": 2, "n_iter": 2}, HIRES | {"n_iter": 2}])
def test_skips_and_afa_after_each_picture(client: Client, names: Names, changes: dict) -> None:
    fusion = expert(names.expert, method="AFA", afa_maps="uniform", skipping="Forecast", skip_tolerance=10)
    plain = client.draw(fusion, steps=8, **changes)
    shown = client.draw(fusion, settings=ALL, steps=8, **changes)
    assert all(np.array_equal(a, b) for a, b in zip(shown.pixels[::4], plain.pixels, strict=True))
    assert shown.infotexts[::4] == shown.infotexts[1::4] == shown.infotexts[3::4]
    assert len(shown.pixels) == 4 * len(plain.pixels)


def test_weights_of_the_controls(client: Client, names: Names) -> None:
    """One model alone takes the whole of every bar, halves make halves."""
    from lib_fusion.previews import MODEL_COLOURS

    def part(shown: Pictures, model: int) -> float:
        return float((shown.pixels[1] == MODEL_COLOURS[model]).all(-1).mean())

    settings = {"denoiser_fusion_preview_weights": True}
    alone, half = (client.draw(expert(names.expert, method="AFA", afa_maps=maps), settings=settings)
                   for maps in ("only expert 1", "uniform"))  # fmt: skip
    assert part(alone, 1) > 0.3
    assert part(half, 1) == pytest.approx(part(half, 0), rel=0.1)
    assert part(half, 1) == pytest.approx(part(alone, 1) / 2, rel=0.1)


def test_a_request_says_which(client: Client, names: Names) -> None:
    """Before what the settings say."""
    asked = client.draw(expert(names.expert, previews=["masks"]))
    assert len(asked.pixels) == 2
    assert asked.same_as(client.draw(expert(names.expert), settings=PREVIEW))
    assert len(client.draw(expert(names.expert, previews=[]), settings=PREVIEW).pixels) == 1


def test_nothing_to_show(client: Client, names: Names) -> None:
    for fusion in (None, expert(names.expert, method="Average"), expert(names.expert, snb_window=[0, 0])):
        assert len(client.draw(fusion, settings=ALL).pixels) == 1


def test_chosen_maps_and_wrong_ones(client: Client, names: Names) -> None:
    fusion = expert(names.expert, method="AFA", afa_maps="uniform")
    maps = {"denoiser_fusion_preview_maps": True, "denoiser_fusion_preview_map_blocks": "middle_block",
            "denoiser_fusion_preview_map_timesteps": "900, 500"}  # fmt: skip
    few = client.draw(fusion, settings=maps).pixels[1]
    default = client.draw(fusion, settings={"denoiser_fusion_preview_maps": True}).pixels[1]
    assert few.shape[0] < default.shape[0]
    with pytest.raises(RefusedError, match="422: map_blocks: 'middle' is not allowed; allowed with these models: inp"):
        client.draw(fusion, settings=maps | {"denoiser_fusion_preview_map_blocks": "middle"})
    with pytest.raises(RefusedError, match="422: map_timesteps: 'early' is not allowed; allowed: numbers above 0"):
        client.draw(fusion, settings=maps | {"denoiser_fusion_preview_map_timesteps": "early"})
    assert client.draw(expert(names.expert)).pixels


def test_previews_are_saved_beside_the_pictures(client: Client, host: Host, names: Names) -> None:
    settings = ALL | {"samples_save": True}
    client.draw(expert(names.expert, skipping="Forecast"), settings=settings, save_images=True)
    client.draw(expert(names.expert, method="AFA", afa_maps="uniform"), settings=settings, save_images=True)
    for kind in ("masks", "skips", "weights", "maps"):
        assert list(host.data.rglob(f"*-fusion-{kind}.png")), kind


def test_hires_alone_counts_each_picture_apart(client: Client, names: Names) -> None:
    drawn = client.draw(expert(names.expert, passes="hires"), n_iter=2, **HIRES)
    for text in drawn.infotexts:
        assert "base 4, expert 1 4" in text


def test_nothing_is_added_to_a_scripts_pictures(client: Client, names: Names) -> None:
    """Prompt matrix lays its pictures out by place; SD upscale takes them for tiles, and pastes them."""
    fusion, matrix = expert(names.expert), {"script_name": "prompt matrix", "script_args": [
        False, False, "positive", "comma", 0]}  # fmt: skip
    plain = client.draw(fusion, prompt="a fox|red", **matrix)
    with_masks = client.draw(fusion, prompt="a fox|red", settings=PREVIEW, **matrix)
    assert len(plain.pixels) == 2
    assert with_masks.same_as(plain)
    with pytest.raises(RefusedError, match=r"compare: True is not allowed; allowed: false, or no script"):
        client.draw({**fusion, "compare": True}, prompt="a fox|red", **matrix)
    tiles = {"script_name": "sd upscale", "script_args": ["", 16, "Lanczos", 2.0], "width": 64, "height": 64,
             "img2img": Image.new("RGB", (64, 64), "orange")}  # fmt: skip
    (upscaled,), (again,) = (client.draw(fusion, settings=how, **tiles).pixels for how in (PREVIEW, {}))
    assert upscaled.shape == (128, 128, 3)
    # The host encodes with chance, so two equal requests differ by little; a pasted mask is of other colours.
    assert abs(upscaled.astype(int) - again).mean() < 8
