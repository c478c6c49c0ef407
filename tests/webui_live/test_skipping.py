"""Skipping in the host: what is not run is told, off is off, and the picture stays what it was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import official_skips
from tests.webui_live.client import PICTURE, TITLE, Client, Pictures, decode, encode, expert
from tests.webui_live.conftest import Names
from tests.webui_live.test_identity import HIRES, picture
from tests.webui_live.test_requests import panel_args, without_seconds

ON = {"skipping": "Forecast"}
#: All of skipping's bookkeeping, and no skip.
NO_SKIP = ON | {"skip_warmup": 1000}
STEPS = {"steps": 20, "prompt": "a fox, flat drawing", "negative_prompt": ""}
SAMPLERS = (
    "Euler", "Euler a", "LMS", "Heun", "DPM2", "DPM2 a", "DPM++ 2S a", "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE",
    "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "DPM fast", "DPM adaptive", "LCM", "Restart", "DDIM", "DDIM CFG++", "PLMS",
    "UniPC",
)  # fmt: skip
#: Those that evaluate a noise level twice, or go back to a higher one, too often for a forecast.
SKIPPING_NOTHING = ("Heun", "DPM2 a", "DPM++ 2S a", "DPM fast", "DPM adaptive", "Restart")


@pytest.fixture(scope="module", autouse=True)
def _base(client: Client, names: Names) -> Iterator[None]:
    with client.settings({"sd_model_checkpoint": f"{names.base}.safetensors"}):
        yield


def rows(pictures: Pictures) -> list[tuple[int, int]]:
    """(computed, of all) U-Net rows of each model, as the infotext tells them."""
    return [(int(a), int(b)) for a, b in re.findall(r"(\d+) of (\d+)", pictures.params["Fusion U-Net rows"])]


def psnr(a: Pictures, b: Pictures) -> float:
    errors = [np.mean((x.astype(float) - y) ** 2) for x, y in zip(a.pixels, b.pixels, strict=True)]
    return float(10 * np.log10(255**2 / max(*errors, 1e-3)))


def test_these_are_all_of_the_hosts_samplers(client: Client) -> None:
    assert sorted(SAMPLERS) == sorted(sampler["name"] for sampler in client.ask("/sdapi/v1/samplers"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_tolerance_it_is_off_bit_for_bit(client: Client, sampler: str) -> None:
    off = client.draw(sampler_name=sampler, **STEPS)
    for fusion in (ON | {"skip_tolerance": 0}, {"skipping": "Paper", "skip_threshold": 0}):
        assert client.draw(fusion, sampler_name=sampler, **STEPS).same_as(off)
    assert client.draw(NO_SKIP, sampler_name=sampler, **STEPS).same_as(off)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_nearly_the_same_picture(client: Client, sampler: str) -> None:
    """Of two in a batch, each as far as its own error lets it; one that skips nothing is off."""
    changes = STEPS | {"sampler_name": sampler, "batch_size": 2, "steps": 30}
    off, on = client.draw(**changes), client.draw(ON, **changes)
    computed, of_all = rows(on)[0]
    assert psnr(on, off) > 30
    assert on.same_as(off) == (computed == of_all)
    assert (computed == of_all) == (sampler in SKIPPING_NOTHING)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DDIM", "UniPC", "LMS", "Euler a"])
def test_calls_are_spared_and_counted(client: Client, sampler: str) -> None:
    changes = STEPS | {"sampler_name": sampler, "batch_size": 2}
    off = client.draw(**changes)
    before = client.state()
    client.ask("/probe/count", on=True)
    on = client.draw(ON, **changes)
    calls, run = client.ask("/probe/count", on=False)
    (computed, of_all), = rows(on)
    assert run == computed < of_all * 0.95
    assert on.params["Fusion U-Net calls"] == f"base {calls}"
    assert psnr(on, off) > 35
    assert client.draw(**changes).same_as(off)
    assert client.state() == before


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DDIM"])
def test_corrections_bring_the_picture_nearer(client: Client, sampler: str) -> None:
    off = client.draw(sampler_name=sampler, **STEPS)
    for most in (1, 2):
        near, far = (client.draw(ON | {"skip_correct": c, "skip_max": most}, sampler_name=sampler, **STEPS)
                     for c in (True, False))  # fmt: skip
        assert psnr(near, off) > psnr(far, off)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DDIM", "UniPC", "Euler a", "DPM++ 2M SDE", "LCM"])
def test_a_picture_does_not_depend_on_its_neighbour(client: Client, sampler: str) -> None:
    changes = STEPS | {"sampler_name": sampler}
    both = client.draw(ON, batch_size=2, **changes)
    alone = [client.draw(ON, **changes, seed=PICTURE["seed"] + i) for i in range(2)]
    assert sum(rows(one)[0][0] for one in alone) == rows(both)[0][0]
    for i, one in enumerate(alone):
        assert np.abs(both.pixels[i].astype(int) - one.pixels[0]).max() <= 2


@pytest.mark.parametrize(
    "sampler", ["Euler", "DPM++ 2M", "DDIM", "UniPC", "PLMS", "LMS", "Heun", "DPM2", "Euler a", "DPM++ SDE"]
)
def test_the_papers_policy_is_the_official_one_for_the_latents_that_the_sampler_holds(
    client: Client, sampler: str
) -> None:
    client.ask("/probe/trace", on=True)
    paper = {"skipping": "Paper", "skip_threshold": 0.05}
    pictures = client.draw(paper, sampler_name=sampler, **STEPS)
    steps = client.ask("/probe/trace", on=False)
    latents = [torch.tensor(latent) for latent, _ in steps[1:]]
    skipped = [not ran for _, ran in steps]
    assert skipped == [False, *official_skips(latents, 0.05, 4)]
    assert rows(pictures)[0] == (2 * skipped.count(False), 2 * len(skipped))
    assert any(skipped) or sampler in ("Heun", "Euler a", "DPM++ SDE")  # whose latents go to and fro


CASES = {
    "AND, batch 2": ({"prompt": "a fox, flat drawing AND a cow, flat drawing :0.5", "batch_size": 2}, {}),
    "one half at a time": ({}, {"batch_cond_uncond": False}),
    "NGMS": ({"s_min_uncond": 1.0}, {}),
    "skip early": ({}, {"skip_early_cond": 0.2}),
    "hires": (HIRES | {"hr_second_pass_steps": 12}, {}),
    "long": ({"prompt": "a fox, " * 50}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_layouts(client: Client, case: str) -> None:
    changes, settings = CASES[case]
    off = client.draw(settings=settings, **STEPS | changes)
    on = client.draw(ON, settings=settings, **STEPS | changes)
    assert rows(on)[0][0] < rows(on)[0][1]
    assert psnr(on, off) > 30
    assert client.draw(NO_SKIP, settings=settings, **STEPS | changes).same_as(off)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_img2img(client: Client, sampler: str, masked: bool) -> None:
    changes: dict = STEPS | {"sampler_name": sampler, "denoising_strength": 0.8}
    if masked:
        mask = Image.new("L", (128, 128))
        mask.paste(255, (32, 32, 96, 96))
        changes |= {"mask": encode(mask), "inpainting_fill": 1}
    off = client.draw(img2img=picture(), **changes)
    on = client.draw(ON, img2img=picture(), **changes)
    assert rows(on)[0][0] < rows(on)[0][1]
    assert psnr(on, off) > 30
    assert client.draw(NO_SKIP, img2img=picture(), **changes).same_as(off)


@pytest.mark.parametrize("kind", ["tiny_xl", "tiny_v", "tiny_inpaint"])
def test_other_architectures(client: Client, kind: str) -> None:
    off = client.draw(model=kind, **STEPS)
    on = client.draw(ON, model=kind, **STEPS)
    assert rows(on)[0][0] < rows(on)[0][1]
    assert psnr(on, off) > 30


@pytest.mark.parametrize("passes", ["both", "first", "hires"])
def test_passes(client: Client, passes: str) -> None:
    changes = STEPS | HIRES | {"hr_second_pass_steps": 12}
    counted = {}
    on = client.draw(ON | {"skip_passes": passes}, **changes)
    counted = rows(on)[0]
    both = rows(client.draw(ON, **changes))[0]
    assert counted[1] == both[1]
    assert (counted[0] == both[0]) == (passes == "both")


def test_fused_models_are_skipped_each_by_its_own_error(client: Client, names: Names) -> None:
    off = client.draw(expert(names.expert), **STEPS)
    on = client.draw(expert(names.expert, **ON), **STEPS)
    for computed, of_all in rows(on):
        assert computed < of_all == 40
    assert psnr(on, off) > 20


def test_with_freeu(client: Client) -> None:
    freeu = {"freeu": "Custom", "freeu_b3": 1.2, "freeu_s3": 0.9}
    off = client.draw(freeu, **STEPS)
    on = client.draw(freeu | ON, **STEPS)
    assert rows(on)[0][0] < 40
    assert psnr(on, off) > 30


def test_refiner(client: Client) -> None:
    changes = STEPS | {"refiner_checkpoint": "tiny_b.safetensors", "refiner_switch_at": 0.5}
    off = client.draw(model="tiny_a", **changes)
    counts = []
    for follows in (False, True):
        on = client.draw(ON | {"refiner": follows}, model="tiny_a", **changes)
        counts += rows(on)
        assert psnr(on, off) > 25
        assert client.draw(NO_SKIP | {"refiner": follows}, model="tiny_a", **changes).same_as(off)
    (early, early_all), (computed, of_all) = counts
    assert early < early_all < of_all == 40
    assert early + 2 * 4 <= computed < of_all  # after the switch it begins anew


@pytest.mark.parametrize("what", ["interrupt", "skip"])
def test_interrupt(client: Client, what: str) -> None:
    off = client.draw(**STEPS)
    before = client.state()
    client.ask("/probe/arm", what=what, step=9)
    client.draw(ON, **STEPS)
    assert client.state() == before
    assert client.draw(**STEPS).same_as(off)


def test_error_in_the_unet(client: Client) -> None:
    on = client.draw(ON, **STEPS)
    before = client.state()
    client.ask("/probe/arm", what="fail", step=8)
    with pytest.raises(Exception, match="the probe made the U-Net fail"):
        client.draw(ON, **STEPS)
    assert client.state() == before
    assert client.draw(ON, **STEPS).same_as(on)


def test_panel_dict_and_infotext_agree(client: Client) -> None:
    by_dict = client.draw(ON | {"skip_tolerance": 0.2, "skip_max": 2}, **STEPS)
    labels = {"Skipping": "Forecast", "Skip tolerance": 0.2, "Most skips in a row": 2}
    by_panel = client.draw(args=panel_args(client, **{TITLE: True}, **labels), **STEPS)
    assert by_panel.same_as(by_dict)
    answer = client.ask("/sdapi/v1/txt2img", {"infotext": by_dict.infotexts[0], "width": 128, "height": 128})
    assert np.array_equal(decode(answer["images"][0]), by_dict.pixels[0])
    assert without_seconds(json.loads(answer["info"])["infotexts"][0]) == without_seconds(by_dict.infotexts[0])
