"""The strip that shows who drew what, in the host's gallery and folders."""

from __future__ import annotations

import numpy as np
import pytest

from tests.webui_live.client import Client, expert
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host

PREVIEW = {"denoiser_fusion_preview": True}
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


def test_no_strip_without_masks(client: Client, names: Names) -> None:
    for fusion in (None, expert(names.expert, method="Average"), expert(names.expert, snb_window=[0, 0])):
        assert len(client.draw(fusion, settings=PREVIEW).pixels) == 1


def test_strips_are_saved_beside_the_pictures(client: Client, host: Host, names: Names) -> None:
    settings = PREVIEW | {"samples_save": True}
    client.draw(expert(names.expert), settings=settings, save_images=True)
    assert list(host.data.rglob("*-fusion-masks.png"))


def test_hires_alone_counts_each_picture_apart(client: Client, names: Names) -> None:
    drawn = client.draw(expert(names.expert, passes="hires"), n_iter=2, **HIRES)
    for text in drawn.infotexts:
        assert "base 4, expert 1 4" in text
