"""What the host itself brings: token merging, hypertile, textual inversion. LoRAs: test_loras.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.webui_live.client import Client, Pictures, expert

BASE, COPY, OTHER = "tiny_a", "tiny_copy", "tiny_b"
ALONE = {"snb_window": [0, 0], "snb_outside": "expert"}
NEUTRAL = {"freeu": "Custom", "freeu_offset1": 0.5}
UNIFORM = expert(COPY, method="AFA", afa_maps="uniform")
#: Large enough that both have something to merge or to cut.
LARGE = {"width": 256, "height": 256, "steps": 3}
OPTIONS = {
    "token merging": {"token_merging_ratio": 0.5},
    # Of one swap size, for then it cuts alike at every call.
    "hypertile": {"hypertile_enable_unet": True, "hypertile_max_tile_unet": 128, "hypertile_swap_size_unet": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _base(client: Client) -> Iterator[None]:
    with client.settings({"sd_model_checkpoint": f"{BASE}.safetensors"}):
        yield


@pytest.mark.parametrize("what", OPTIONS)
def test_acts_on_the_base_alone(client: Client, what: str) -> None:
    plain = client.draw(**LARGE)
    before = client.state()
    with client.settings(OPTIONS[what]):
        own = client.draw(**LARGE)
        assert not own.same_as(plain)
        assert client.draw(expert(OTHER, snb_window=[0, 0]), **LARGE).same_as(own)
        assert client.draw(expert(BASE), **LARGE).same_as(own)
        assert client.draw(NEUTRAL, **LARGE).same_as(own)
        assert client.draw(expert(COPY, **ALONE), **LARGE).same_as(plain)
        assert 0 < distance(client.draw(UNIFORM, **LARGE), plain) < distance(own, plain)
        assert client.draw(**LARGE).same_as(own)
    assert client.draw(**LARGE).same_as(plain)
    assert client.state() == before


def distance(one: Pictures, other: Pictures) -> float:
    return float(np.abs(one.pixels[0].astype(int) - other.pixels[0]).mean())


def test_textual_inversion(client: Client) -> None:
    """In the picture's prompt for all models, in an expert's own for that one."""
    prompt = "a cat, tiny_ti"
    with_it, without = client.draw(prompt=prompt), client.draw(prompt="a cat")
    assert not with_it.same_as(without)
    theirs = client.draw(prompt=prompt, model=OTHER)
    assert client.draw(expert(COPY), prompt=prompt).same_as(with_it)
    assert client.draw(expert(OTHER, **ALONE), prompt=prompt).same_as(theirs)
    assert client.draw(expert(OTHER, prompt=prompt, **ALONE), prompt="a cat").same_as(theirs)
    assert client.draw(prompt="a cat").same_as(without)
