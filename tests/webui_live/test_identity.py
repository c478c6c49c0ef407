"""An expert with the base's own weights changes nothing, bit for bit, however the host samples."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.webui_live.client import Client, expert
from tests.webui_live.conftest import Names

SAMPLERS = ("Euler", "Euler a", "DDIM", "DPM++ 2M", "Heun", "UniPC", "LCM", "PLMS", "DPM++ SDE", "DDIM CFG++",
            "DPM2", "Restart")  # fmt: skip
#: More than one chunk of 75 tokens, and as many in every tokenizer.
LONG = "a " * 90
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
#: What the host does otherwise: (request, settings of the host).
CASES = {
    "batch 2x2": ({"batch_size": 2, "n_iter": 2}, {}),
    "AND": ({"prompt": "a cat AND a dog :0.7"}, {}),
    "AND, long, batch 2": ({"prompt": f"a cat AND {LONG}:0.7 AND x", "batch_size": 2}, {}),
    "AND, one half at a time": ({"prompt": "a cat AND a dog :0.7", "batch_size": 2}, {"batch_cond_uncond": False}),
    "one half at a time": ({}, {"batch_cond_uncond": False}),
    "long prompt": ({"prompt": f"a cat [red:blue:0.5] BREAK {LONG}"}, {}),
    "padded": ({"prompt": LONG}, {"pad_cond_uncond": True}),
    "padded, one half at a time": ({"prompt": LONG}, {"pad_cond_uncond": True, "batch_cond_uncond": False}),
    "padded negative": ({"negative_prompt": LONG}, {"pad_cond_uncond": True}),
    "padded the old way": ({"prompt": LONG}, {"pad_cond_uncond_v0": True}),
    "cut the old way": ({"negative_prompt": LONG}, {"pad_cond_uncond_v0": True}),
    "NGMS": ({"s_min_uncond": 4.0, "steps": 6}, {}),
    "skip early": ({}, {"skip_early_cond": 0.3}),
    "clip skip 2": ({}, {"CLIP_stop_at_last_layers": 2}),
    "no emphasis": ({}, {"emphasis": "None"}),
    "hires": (HIRES | {"hr_prompt": "a cow", "hr_second_pass_steps": 3}, {}),
    "hires, pixels, batch 2": (HIRES | {"hr_upscaler": "Lanczos", "batch_size": 2}, {}),
    "hires, another sampler": (HIRES | {"hr_sampler_name": "DDIM"}, {}),
    "tiling": ({"tiling": True}, {}),
    "no guidance": ({"cfg_scale": 1}, {}),
    "variation": ({"subseed": 3, "subseed_strength": 0.4}, {}),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(client: Client, names: Names, sampler: str) -> None:
    off = client.draw(sampler_name=sampler)
    on = client.draw(expert(names.copy), sampler_name=sampler)
    assert on.same_as(off)
    assert off.pixels[0].std() > 1


@pytest.mark.parametrize("case", CASES)
def test_layouts(client: Client, names: Names, case: str) -> None:
    changes, settings = CASES[case]
    off = client.draw(settings=settings, **changes)
    assert client.draw(expert(names.copy), settings=settings, **changes).same_as(off)


def test_the_base_itself_is_not_loaded_twice(client: Client, names: Names) -> None:
    client.ask("/probe/fusion")
    off = client.draw()
    before = client.fusion()["experts"]
    assert client.draw(expert(names.base)).same_as(off)
    assert client.fusion()["experts"] == before


def picture(size: int = 128) -> Image.Image:
    rows = np.linspace(0, 255, size, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(rows, (size, 1)), np.tile(rows[:, None], (1, size)),
                                     np.full((size, size), 128, np.uint8)], axis=-1))  # fmt: skip


@pytest.mark.parametrize("sampler", ["Euler a", "DDIM"])
@pytest.mark.parametrize("masked", [False, True])
def test_img2img(client: Client, names: Names, sampler: str, masked: bool) -> None:
    from tests.webui_live.client import encode

    changes: dict = {"sampler_name": sampler, "denoising_strength": 0.6, "steps": 6}
    if masked:
        mask = Image.new("L", (128, 128))
        mask.paste(255, (32, 32, 96, 96))
        changes |= {"mask": encode(mask), "inpainting_fill": 1}
    off = client.draw(img2img=picture(), **changes)
    on = client.draw(expert(names.copy), img2img=picture(), **changes)
    assert on.same_as(off)
    assert not client.draw(expert(names.expert), img2img=picture(), **changes).same_as(off)


@pytest.mark.parametrize("kind", ["tiny_xl", "tiny_v", "tiny_inpaint"])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_other_architectures(client: Client, kind: str, sampler: str) -> None:
    for changes in ({}, {"prompt": f"a cat AND {LONG}", "negative_prompt": "", "batch_size": 2}):
        off = client.draw(model=kind, sampler_name=sampler, **changes)
        assert client.draw(expert(f"{kind}_copy"), model=kind, sampler_name=sampler, **changes).same_as(off)


def test_sdxl_hires(client: Client) -> None:
    off = client.draw(model="tiny_xl", **HIRES)
    assert client.draw(expert("tiny_xl_copy"), model="tiny_xl", **HIRES).same_as(off)


def test_fp8_weights(client: Client, names: Names) -> None:
    """An expert is rounded as the host rounds it, and one that was loaded before is not used as it was."""
    alone = expert(names.expert, snb_window=[0, 0], snb_outside="expert")
    whole = client.draw(alone)
    with client.settings({"fp8_storage": "Enable"}):
        rounded = client.draw(model=names.expert)
        assert client.draw(alone, model=names.base).same_as(rounded)
    assert not rounded.same_as(whole)
    client.draw(model="tiny_a")  # the host rounds more than the weights, and mends it only by building a model anew
    assert client.draw(alone, model=names.base).same_as(whole)


def test_half_precision_with_upcast(client: Client, names: Names) -> None:
    whole = client.draw(model=names.base)
    client.ask("/probe/half", on=True)
    try:
        off = client.draw()
        assert client.draw(expert(names.copy)).same_as(off)
    finally:
        client.ask("/probe/half", on=False)
    assert not off.same_as(whole)
