"""AFA in the real host: identities, the panel, API and infotext agree, and nothing stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.webui_live.client import PICTURE, TITLE, Client, RefusedError, decode, expert
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host
from tests.webui_live.pages import PANEL, SECONDS, choose, generate, prepare
from tests.webui_live.test_requests import panel_args, without_seconds

ALONE = {"snb_window": [0, 0], "snb_outside": "expert"}
UNIFORM = {"method": "AFA", "afa_maps": "uniform"}
LONG = "a " * 90
SAMPLERS = ("Euler", "DDIM", "DPM++ 2M", "Heun", "UniPC")


@pytest.fixture(scope="module")
def files(host: Host) -> Iterator[Path]:
    """Aggregators with random weights in the host's folder: for two demo models, for SDXL, and a broken file."""
    import torch

    from lib_fusion.fusion.aggregator_files import Card, identify_model, save_aggregators
    from lib_fusion.fusion.lockstep import sizes_for
    from lib_fusion.unet.model import load_unet
    from tests.methods.test_afa import randomize

    checkpoints = host.data / "models/Stable-diffusion"
    folder = host.data / "models/denoiser-fusion"
    ensembles = {"pair": ("tiny_a", "tiny_b"), "copies": ("tiny_a", "tiny_copy"), "gone": ("tiny_a", "nobody"),
                 "xl": ("tiny_xl", "tiny_xl_b"), "xl_copies": ("tiny_xl", "tiny_xl_copy")}  # fmt: skip
    for name, models in ensembles.items():
        paths = [checkpoints / f"{model}.safetensors" for model in models]
        unet = load_unet(paths[0])
        sizes = sizes_for(unet, 2, hidden=8, layers=1, heads=2)
        known = tuple(identify_model(path if path.is_file() else paths[0]) for path in paths)
        known = tuple(type(m)(path.stem, m.unet) for m, path in zip(known, paths))
        card = Card(unet.kind, "epsilon", sizes, known)
        save_aggregators(folder / f"{name}.safetensors", card, randomize(sizes.make()).state_dict(), torch.float32)
    loras = {name: host.data / f"models/Lora/{name}.safetensors" for name in ("tiny_lora", "lora_lora")}
    base, trained = checkpoints / "tiny_a.safetensors", {
        "plain_and_lora": ("", f"+{loras['tiny_lora']}:0.8"),
        "two_loras": (f"+{loras['lora_lora']}", f"+{loras['tiny_lora']}:0.8+{loras['lora_lora']}:-0.5"),
    }  # fmt: skip
    for name, models in trained.items():
        unet = load_unet(base)
        sizes = sizes_for(unet, 2, hidden=8, layers=1, heads=2)
        card = Card(unet.kind, "epsilon", sizes, tuple(identify_model(f"{base}{more}") for more in models))
        save_aggregators(folder / f"{name}.safetensors", card, randomize(sizes.make()).state_dict(), torch.float32)
    whole = (folder / "pair.safetensors").read_bytes()
    (folder / "broken.safetensors").write_bytes(whole[: len(whole) // 2])
    yield folder
    shutil.rmtree(folder)


def afa(name: str, **more: object) -> dict:
    """By one guidance scale, as published."""
    return {"method": "AFA", "afa_aggregator": name, "guidance": "off", **more}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_uniform_with_a_copy_is_the_base(client: Client, names: Names, sampler: str) -> None:
    """Half and half of the same is the same, bit for bit."""
    off = client.draw(sampler_name=sampler)
    assert client.draw(expert(names.copy, **UNIFORM), sampler_name=sampler).same_as(off)


@pytest.mark.parametrize("sampler", ["DDIM", "DPM++ 2M"])
def test_the_average_outside_the_window(client: Client, names: Names, sampler: str) -> None:
    """Before AFA takes over each model is called for itself, as the method Average does it."""
    average = client.draw(expert(names.expert, method="Average"), sampler_name=sampler, steps=6)
    for method in ({}, UNIFORM):
        never = expert(names.expert, **method, snb_window=[0, 0], snb_outside="average")
        assert client.draw(never, sampler_name=sampler, steps=6).same_as(average)
    half = client.draw(expert(names.expert, **UNIFORM, snb_window=[500, 0], snb_outside="average"),
                       sampler_name=sampler, steps=6)  # fmt: skip
    assert half.params["Fusion U-Net calls"] == "base 6, expert 1 6"
    assert half.params["Fusion outside"] == "average"
    assert not half.same_as(average)
    assert not half.same_as(client.draw(expert(names.expert, **UNIFORM), sampler_name=sampler, steps=6))


CASES = {
    "AND, long, batch 2": ({"prompt": f"a cat AND {LONG}:0.7 AND x", "batch_size": 2}, {}),
    "one half at a time": ({}, {"batch_cond_uncond": False}),
    "padded": ({"prompt": LONG}, {"pad_cond_uncond": True}),
    "NGMS": ({"s_min_uncond": 4.0, "steps": 6}, {}),
    "hires": ({"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}, {}),
    "odd size": ({"width": 136, "height": 72}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_hot_is_the_model_alone(client: Client, case: str) -> None:
    """The whole chain: own text encoder, own time embedding, own blocks, against the host with that checkpoint."""
    changes, settings = CASES[case]
    for i, name in enumerate(("tiny_a", "tiny_b")):
        maps = "only base" if i == 0 else "only expert 1"
        on = client.draw(expert("tiny_b", method="AFA", afa_maps=maps), model="tiny_a", settings=settings, **changes)
        assert on.same_as(client.draw(model=name, settings=settings, **changes))


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_one_hot_on_sdxl(client: Client, sampler: str) -> None:
    fusion = expert("tiny_xl_b", method="AFA", afa_maps="only expert 1")
    on = client.draw(fusion, model="tiny_xl", sampler_name=sampler)
    assert on.same_as(client.draw(model="tiny_xl_b", sampler_name=sampler))


@pytest.mark.parametrize(("base", "name"), [("tiny_a", "copies"), ("tiny_xl", "xl_copies")])
def test_copies_are_the_base_whatever_the_weights(client: Client, files: Path, base: str, name: str) -> None:
    off, on = client.draw(model=base), client.draw(afa(name), model=base)
    assert abs(on.pixels[0].astype(int) - off.pixels[0]).max() <= 1


def test_experts_come_from_the_file(client: Client, files: Path) -> None:
    on = client.draw(afa("pair"), model="tiny_a")
    assert on.params["Fusion expert 1 checkpoint"] == "tiny_b.safetensors"
    assert on.params["Fusion aggregator"] == "pair"
    assert on.params["Fusion U-Net calls"] == "base 4, expert 1 4"
    assert on.same_as(client.draw(expert("tiny_b", **afa("pair.safetensors")), model="tiny_a"))
    others = [client.draw(expert("tiny_b", **more), model="tiny_a") for more in ({}, UNIFORM, ALONE)]
    assert not any(on.same_as(other) for other in [*others, client.draw(model="tiny_a")])
    assert not client.draw(afa("xl"), model="tiny_xl").same_as(client.draw(model="tiny_xl"))


def test_window_and_off(client: Client, files: Path) -> None:
    off = client.draw(model="tiny_a")
    before = client.state()
    half = client.draw(afa("pair", snb_window=[1000, 500]), model="tiny_a", steps=6)
    calls = [int(part.split()[-1]) for part in half.params["Fusion U-Net calls"].split(", ")]
    assert 0 < calls[1] < calls[0] == 6
    assert client.draw(model="tiny_a").same_as(off)
    assert client.state() == before


def test_error_in_the_unet_leaves_nothing(client: Client, files: Path) -> None:
    on = client.draw(afa("pair"), model="tiny_a")
    client.ask("/probe/arm", what="fail")
    with pytest.raises(RefusedError, match="the probe made the U-Net fail"):
        client.draw(afa("pair"), model="tiny_a")
    assert client.draw(afa("pair"), model="tiny_a").same_as(on)


def test_panel_dict_and_infotext_agree(client: Client, files: Path) -> None:
    with client.settings({"sd_model_checkpoint": "tiny_a.safetensors"}):
        by_dict = client.draw(afa("pair", snb_window=[900, 100]))
        by_panel = client.draw(args=panel_args(client, **{
            TITLE: True, "Method": "AFA", "Aggregator": "pair", "Expert 1 checkpoint": "tiny_b.safetensors",
            "Starting timestep": 900, "Ending timestep": 100, "Guidance interval": "off",
        }))  # fmt: skip
        assert by_panel.same_as(by_dict)
        text = by_dict.infotexts[0]
        answer = client.ask("/sdapi/v1/txt2img", {"infotext": text, "width": 128, "height": 128})
        assert without_seconds(json.loads(answer["info"])["infotexts"][0]) == without_seconds(text)
        assert without_seconds(by_panel.infotexts[0]) == without_seconds(text)
        assert np.array_equal(decode(answer["images"][0]), by_dict.pixels[0])


def test_force_is_told(client: Client, files: Path) -> None:
    with pytest.raises(RefusedError, match=r"afa_aggregator: .*tiny_c in the place of tiny_b"):
        client.draw(expert("tiny_c", **afa("pair")), model="tiny_a")
    forced = client.draw(expert("tiny_c", **afa("pair", afa_force=True)), model="tiny_a")
    assert forced.params["Fusion force aggregator"] == "True"


def test_an_aggregator_of_loras_brings_them(client: Client, files: Path) -> None:
    """And is the same as with all of it said; by the weight for the U-Net alone, whatever the LoRA's name."""
    on = client.draw(afa("plain_and_lora"), model="tiny_a")
    assert on.params["Fusion expert 1 checkpoint"] == "tiny_a.safetensors"
    assert on.params["Fusion expert 1 prompt"] == "<lora:tiny_lora:0.8>"
    said = expert("same as base", prompt=f"{PICTURE['prompt']} <lora:tiny_lora:0.8>", **afa("plain_and_lora"))
    assert client.draw(said, model="tiny_a").same_as(on)
    other_text = expert("same as base", prompt="<lora:tiny_lora:0.2:0.8>", **afa("plain_and_lora"))
    assert not client.draw(other_text, model="tiny_a").same_as(on)
    assert not client.draw(model="tiny_a").same_as(on)


def test_the_pictures_loras_under_an_aggregator(client: Client, files: Path) -> None:
    """Those that it was trained with are needed, in any order; others are a style, on the models that they act on."""
    needed = {"prompt": f"{PICTURE['prompt']} <lora:lora_lora:1>"}
    on = client.draw(afa("two_loras"), model="tiny_a", **needed)
    assert on.params["Fusion expert 1 prompt"] == "<lora:tiny_lora:0.8> <lora:lora_lora:-0.5>"
    other_order = expert("same as base", prompt="<lora:lora_lora:-0.5> <lora:tiny_lora:0.8>", **afa("two_loras"))
    near = client.draw(other_order, model="tiny_a", **needed)
    assert abs(near.pixels[0].astype(int) - on.pixels[0]).max() <= 1
    styled = {"prompt": f"{PICTURE['prompt']} <lora:lora_loha:0.5> <lora:lora_lora:1>"}
    assert not client.draw(afa("two_loras"), model="tiny_a", **styled).same_as(on)
    client.draw(afa("pair"), model="tiny_a", **styled)
    ticked = expert("same as base", prompt="<lora:tiny_lora:0.8>", loras=True, **afa("plain_and_lora"))
    client.draw(ticked, model="tiny_a", **styled)


@pytest.mark.parametrize(
    ("name", "picture", "prompt", "says"),
    [
        ("plain_and_lora", "", "a cat", r"tiny_a in the place of tiny_a \+ tiny_lora:0.8 .*; "
         "write <lora:tiny_lora:0.8> into expert 1's prompt$"),
        ("plain_and_lora", "", "<lora:tiny_lora:0.7>", r"tiny_a \+ tiny_lora:0.7 in the place of .*into expert 1's"),
        ("plain_and_lora", "", "<lora:tiny_lora:0.8> <lora:lora_lora:1>", "in the place of .*into expert 1's prompt"),
        ("plain_and_lora", "<lora:tiny_lora:0.8>", "a cat", "tiny_a in the place of"),
        ("plain_and_lora", "", "<lora:lora_loha:1>", "experts.0..prompt: .*this is LoHa .*; allowed: afa_maps uniform"),
        ("plain_and_lora", "", "<lora:tiny_lora:0.8:0.8:2>", "cut to a rank"),
        ("pair", "", "<lora:tiny_lora:0.8>", "take the LoRAs out of expert 1's prompt$"),
        ("two_loras", "", "<lora:tiny_lora:0.8> <lora:lora_lora:-0.5>", "tiny_a in the place of tiny_a . lora_lora:1 "
         ".*; write <lora:lora_lora:1> into the picture's prompt$"),
        ("two_loras", "<lora:lora_lora:0.9>", "<lora:tiny_lora:0.8> <lora:lora_lora:-0.5>",
         "tiny_a . lora_lora:0.9 in the place of"),
    ],
)  # fmt: skip
def test_other_loras_than_an_aggregators(
    client: Client, files: Path, name: str, picture: str, prompt: str, says: str
) -> None:
    one = expert("tiny_b" if name == "pair" else "same as base", prompt=prompt, **afa(name))
    words = {"prompt": f"{PICTURE['prompt']} {picture}"}
    with pytest.raises(RefusedError, match=says) as caught:
        client.draw(one, model="tiny_a", **words)
    assert caught.value.status == 422
    assert "\n" not in caught.value.answer["detail"]
    client.draw(one | {"afa_force": True}, model="tiny_a", **words)


@pytest.mark.parametrize(
    ("fusion", "says"),
    [
        (afa("nothing"), "no such aggregator; allowed: broken, copies"),
        (afa("../../config"), "no such aggregator"),
        (expert("tiny_b", **afa("")), "afa_aggregator"),
        (afa("broken"), "truncated"),
        (afa("gone"), "nobody is not among the checkpoints"),
        (expert("tiny_a", **afa("pair")), "tiny_a in the place of tiny_b"),
        ({"experts": [{"checkpoint": "tiny_b"}, {"checkpoint": "tiny_c"}], **afa("pair")}, "for 2 models"),
        (expert("tiny_b", method="AFA", afa_maps="only expert 2"), "afa_maps"),
        ({"method": "AFA", "afa_maps": "uniform"}, "experts"),
    ],
)
def test_refused(client: Client, files: Path, fusion: dict, says: str) -> None:
    with pytest.raises(RefusedError, match=says) as caught:
        client.draw(fusion, model="tiny_a")
    assert caught.value.status == 422
    assert "\n" not in caught.value.answer["detail"]


def test_wrong_order(client: Client, files: Path) -> None:
    with pytest.raises(RefusedError, match=r"in the order tiny_a, tiny_b \(base first\), not tiny_b, tiny_a"):
        client.draw(expert("tiny_a", **afa("pair")), model="tiny_b")


def test_choosing_a_file_chooses_method_and_experts(page: Any, client: Client, files: Path) -> None:
    with client.settings({"sd_model_checkpoint": "tiny_a.safetensors"}):
        panel = PANEL.format(tab="txt2img")
        prepare(page, "a cat")
        page.locator(f"{panel}_enable .label-wrap").first.click()
        page.locator(f"{panel}_tabs button", has_text="AFA").click()
        page.locator(f"{panel}_afa_refresh").click()
        page.wait_for_timeout(SECONDS)
        choose(page, f"{panel}_afa_aggregator", "pair")
        card = f"document.querySelector('{panel}_afa_told').innerText"
        page.wait_for_function(f"{card}.startsWith('tiny_a + tiny_b (sd1')")
        chosen = f"document.querySelector('{panel}_expert1_checkpoint input').value"
        page.wait_for_function(f"{chosen}.startsWith('tiny_b')")  # an event of its own
        page.wait_for_timeout(SECONDS)
        text = generate(page)
        assert "Fusion method: AFA" in text
        assert "Fusion aggregator: pair" in text
        assert "Fusion expert 1 checkpoint: tiny_b.safetensors" in text

        prompt = page.locator(f"{panel}_expert1_prompt textarea")
        page.locator(f"{panel}_tabs button", has_text="Experts").click()
        prompt.fill("a dog <lora:lora_loha:1>")
        page.locator(f"{panel}_tabs button", has_text="AFA").click()
        choose(page, f"{panel}_afa_aggregator", "two_loras")
        page.wait_for_function(f"{card}.endsWith(\"Write <lora:lora_lora:1> into the picture's prompt.\")")
        page.wait_for_function(f"{chosen}.startsWith('tiny_a')")
        assert prompt.input_value() == "a dog <lora:tiny_lora:0.8> <lora:lora_lora:-0.5>"
        choose(page, f"{panel}_afa_aggregator", "pair")
        page.wait_for_function(f"{chosen}.startsWith('tiny_b')")
        page.wait_for_timeout(SECONDS)
        assert prompt.input_value() == "a dog"
