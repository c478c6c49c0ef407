"""LoRAs of one expert alone, named in its own prompt, and of the picture's: as the host draws with them; gone after.

Where an expert draws all (its window is empty, and outside it acts alone), the picture is the host's own with its LoRA.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.webui_live.client import PICTURE, PLAIN, Client, Pictures, RefusedError, decode, expert
from tests.webui_live.host import Host
from tests.webui_live.test_requests import without_seconds
from tests.webui_live.test_xyz import plot

BASE, OTHER, XL = "tiny_a", "tiny_b", "tiny_xl"
SAME = "same as base"
ALONE = {"snb_window": [0, 0], "snb_outside": "expert"}
WORDS = PICTURE["prompt"]
LORA = "tiny_lora:1"
#: What the panel's memory line calls the layers that LoRA experts keep.
KEPT = "LoRAs of experts"
KINDS = ("lora", "dora", "loha", "lokr", "full", "ia3", "glora", "oft", "locon", "norm")
AT_EACH_CALL = {"denoiser_fusion_place": "RAM between U-Net calls"}
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}


def named(*loras: str, words: str = WORDS) -> str:
    return " ".join([words, *(f"<lora:{lora}>" for lora in loras)])


def alone(*loras: str, checkpoint: str = SAME, **more: Any) -> dict[str, Any]:
    """One expert with these LoRAs of its own, which draws all."""
    return expert(checkpoint, **{"prompt": named(*loras), **ALONE, **more})


@pytest.fixture(scope="module", autouse=True)
def _base(client: Client) -> Iterator[None]:
    with client.settings({"sd_model_checkpoint": f"{BASE}.safetensors"}):
        yield


@pytest.fixture(scope="module")
def plain(client: Client) -> Pictures:
    return client.draw(model=BASE)


@pytest.fixture
def unhurt(client: Client, plain: Pictures) -> Iterator[None]:
    """Afterwards the base has the same tensors, of the same values, and draws as ever."""
    client.draw(model=BASE)
    state, weights = client.state(), client.ask("/probe/weights")
    yield
    assert client.draw(model=BASE).same_as(plain)
    assert client.state() == state
    assert client.ask("/probe/weights") == weights


def same(client: Client, fusion: dict, loras: tuple[str, ...], **more: Any) -> None:
    """What an expert draws is what the host draws with these LoRAs in the picture's prompt, and they are seen."""
    model = more.pop("model", BASE)
    on = client.draw(fusion, model=model, **more)
    assert on.same_as(client.draw(model=model, prompt=named(*loras), **more))
    assert not on.same_as(client.draw(model=model, **more))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(client: Client, unhurt: None, kind: str) -> None:
    same(client, alone(f"lora_{kind}:0.8"), (f"lora_{kind}:0.8",))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_sdxl(client: Client, kind: str) -> None:
    client.draw(model=XL)
    state, weights = client.state(), client.ask("/probe/weights")
    same(client, alone(f"xl_{kind}:0.8"), (f"xl_{kind}:0.8",), model=XL)
    assert client.state() == state
    assert client.ask("/probe/weights") == weights


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_merged_at_each_call(client: Client, unhurt: None, kind: str) -> None:
    with client.settings(AT_EACH_CALL):
        on = client.draw(alone(f"lora_{kind}:0.8"), model=BASE)
        assert KEPT not in client.fusion()["experts"]
    assert on.same_as(client.draw(model=BASE, prompt=named(f"lora_{kind}:0.8")))


@pytest.mark.parametrize("functional", [False, True])
def test_sdxl_with_both_text_encoders(client: Client, functional: bool) -> None:
    same(client, alone("lora_xl:1"), ("lora_xl:1",), model=XL, settings={"lora_functional": functional})


@pytest.mark.parametrize("weights", ["0.7:0", "0:0.7", "unet=0.5", "1:0.8:te=0:dyn=2", "1:1:2"])
def test_weights_of_text_encoder_and_unet(client: Client, unhurt: None, weights: str) -> None:
    same(client, alone(f"tiny_lora:{weights}"), (f"tiny_lora:{weights}",))


def test_several_loras(client: Client, unhurt: None) -> None:
    two = ("tiny_lora:0.6", "lora_locon:0.5")
    same(client, alone(*two), two)


def test_with_loras_of_the_picture(client: Client, unhurt: None) -> None:
    """They act on the base, and on an expert where it asks for them; a LoRA of both has the expert's weight there."""
    picture = {"prompt": named("lora_lora:1")}
    with_picture = client.draw(model=BASE, **picture)
    assert client.draw(alone(LORA, snb_outside="base"), model=BASE, **picture).same_as(with_picture)
    assert client.draw(alone(LORA), model=BASE, **picture).same_as(client.draw(model=BASE, prompt=named(LORA)))
    both = client.draw(alone(LORA, loras=True), model=BASE, **picture)
    assert both.same_as(client.draw(model=BASE, prompt=named("lora_lora:1", LORA)))
    weaker = client.draw(alone("lora_lora:0.3", loras=True), model=BASE, **picture)
    assert weaker.same_as(client.draw(model=BASE, prompt=named("lora_lora:0.3")))
    assert client.draw(expert(SAME, loras=True), model=BASE, **picture).same_as(with_picture)


def test_the_base_without_the_pictures_loras_is_not_loaded_again(
    client: Client, plain: Pictures, unhurt: None
) -> None:
    for name in (SAME, BASE):
        assert client.draw(expert(name, **ALONE), model=BASE, prompt=named(LORA)).same_as(plain)
        assert KEPT in client.fusion()["experts"]
        assert BASE not in client.fusion()["experts"]


def test_loras_of_the_picture_on_another_checkpoint(client: Client) -> None:
    """On request, in the one copy of its weights; where the prompt has none, it is as it was."""
    theirs = {lora: client.draw(model=OTHER, prompt=named(LORA) if lora else WORDS) for lora in (False, True)}
    assert not theirs[True].same_as(theirs[False])
    for lora in (False, True, False):
        drawn = client.draw(expert(OTHER, loras=lora, **ALONE), model=BASE, prompt=named(LORA))
        assert drawn.same_as(theirs[lora])
    client.draw(expert(OTHER, loras=True), model=BASE, prompt=named(LORA))
    assert client.draw(expert(OTHER, loras=True, **ALONE), model=BASE).same_as(theirs[False])


def test_another_checkpoint_with_a_lora_of_its_own(client: Client) -> None:
    for lora in (LORA, "lora_locon:0.7"):
        drawn = client.draw(alone(lora, checkpoint=OTHER), model=BASE)
        assert drawn.same_as(client.draw(model=OTHER, prompt=named(lora)))


@pytest.mark.parametrize("more", [{}, {"cache_fp16_weight": True}])
def test_a_copy_of_the_base_with_a_lora_in_fp8(client: Client, more: dict) -> None:
    """With the base's own weights, loaded in FP8 once: into a rounded model the host loads in half precision first."""
    with client.settings(more), client.settings({"fp8_storage": "Enable"}):
        for lora in ("lora_lora:1", LORA):
            drawn = client.draw(alone(lora, checkpoint="tiny_copy"), model=BASE)
            assert drawn.same_as(client.draw(model=BASE, prompt=named(lora)))
    client.draw(model=XL)  # another object, so that fp8's rounding goes
    client.draw(model=BASE)


def test_a_prompt_of_loras_alone_takes_the_pictures_words(client: Client, unhurt: None) -> None:
    same(client, alone(prompt=f"<lora:{LORA}>"), (LORA,))


@pytest.mark.parametrize("checkpoint", [SAME, OTHER])
def test_textual_inversion_that_a_lora_brings(client: Client, checkpoint: str) -> None:
    words = "a tinyword, in a hat"
    model = BASE if checkpoint == SAME else checkpoint
    without = client.draw(model=BASE, prompt=words)
    wanted = client.draw(model=model, prompt=named("lora_bundled:1", words=words))
    drawn = client.draw(alone(checkpoint=checkpoint, prompt=named("lora_bundled:1", words=words)), model=BASE)
    assert drawn.same_as(wanted)
    assert client.draw(model=BASE, prompt=words).same_as(without)
    # The picture's is not the expert's.
    of_picture = {"prompt": named("lora_bundled:1", words=words)}
    assert client.draw(expert(SAME, **ALONE), model=BASE, **of_picture).same_as(without)


def test_two_experts(client: Client, plain: Pictures, unhurt: None) -> None:
    """Each with its own LoRA; in the other order the picture is the same, since each has its part of it."""
    experts = [{"checkpoint": SAME, "prompt": named(lora)} for lora in (LORA, "lora_locon:1")]
    placed = [own | {"place": f"columns 1:1 {i + 1}"} for i, own in enumerate(experts)]
    for pair in (experts, placed):
        first, second = (client.draw({"experts": order, **PLAIN}, model=BASE) for order in (pair, pair[::-1]))
        assert np.abs(first.pixels[0].astype(int) - second.pixels[0]).max() <= 1  # sums in another order
        for other in (plain, client.draw(alone(LORA), model=BASE), client.draw(alone("lora_locon:1"), model=BASE)):
            assert not first.same_as(other)
    assert KEPT in client.fusion()["experts"]


def test_less_memory_than_checkpoints(client: Client) -> None:
    with client.settings({"denoiser_fusion_cache": 0}):
        two = [{"checkpoint": SAME, "prompt": named(lora)} for lora in (LORA, "lora_loha:1")]
        client.draw({"experts": two}, model=BASE)
        loras = client.fusion()["bytes"]
        client.draw({"experts": [{"checkpoint": OTHER}, {"checkpoint": "tiny_c"}]}, model=BASE)
        assert 0 < 4 * loras < client.fusion()["bytes"]


@pytest.mark.parametrize("saliency", ["own", "divergence"])
def test_base_and_expert_under_one_lora(client: Client, unhurt: None, saliency: str) -> None:
    picture = {"prompt": named("lora_lora:1")}
    one = {"experts": [{"checkpoint": SAME, "prompt": named("lora_lora:1")}], "guidance": "off"}
    drawn = client.draw({**one, "snb_saliency": saliency}, model=BASE, **picture)
    assert drawn.same_as(client.draw(model=BASE, **picture))


@pytest.mark.parametrize("place", [{}, AT_EACH_CALL])
def test_afa(client: Client, plain: Pictures, unhurt: None, place: dict) -> None:
    fusion = {"prompt": named(LORA, "lora_locon:1", "lora_full:0.3"), "method": "AFA"}
    with client.settings(place):
        one = client.draw(expert(SAME, afa_maps="only expert 1", **fusion), model=BASE)
        assert one.same_as(client.draw(model=BASE, prompt=fusion["prompt"]))
        assert client.draw(expert(SAME, afa_maps="only base", **fusion), model=BASE).same_as(plain)


def test_afa_with_sdxl(client: Client) -> None:
    fusion = {"prompt": named("lora_xl:1", "xl_full:0.3"), "method": "AFA", "afa_maps": "only expert 1"}
    drawn = client.draw(expert(SAME, **fusion), model=XL)
    assert drawn.same_as(client.draw(model=XL, prompt=fusion["prompt"]))


def test_hires(client: Client, unhurt: None) -> None:
    """Also where the second pass has LoRAs of its own."""
    wanted = client.draw(model=BASE, prompt=named(LORA), **HIRES)
    assert client.draw(alone(LORA), model=BASE, **HIRES).same_as(wanted)
    other = client.draw(alone(LORA), model=BASE, hr_prompt=named("lora_lora:1"), **HIRES)
    assert other.same_as(wanted)


@pytest.mark.parametrize("lora", [LORA, "lora_locon:1", "lora_loha:1"])
def test_the_hosts_functional_mode(client: Client, lora: str) -> None:
    """Also right after pictures in which the host has merged LoRAs into its layers."""
    client.draw(model=BASE, prompt=named("lora_full:1"))
    with client.settings({"lora_functional": True}):
        first = client.draw(expert(SAME, **ALONE), model=BASE, prompt=named(lora))
        drawn = client.draw(alone(lora), model=BASE)
        assert drawn.same_as(client.draw(model=BASE, prompt=named(lora)))
        assert first.same_as(client.draw(model=BASE))


@pytest.mark.parametrize("more", [{}, {"cache_fp16_weight": True}])
def test_fp8(client: Client, more: dict) -> None:
    with client.settings({"fp8_storage": "Enable", **more}):
        for place in ({}, AT_EACH_CALL):
            with client.settings(place):
                same(client, alone("lora_lora:1"), ("lora_lora:1",))
    client.draw(model=XL)


MERGING = {"token_merging_ratio": 0.5}
TILES = {"hypertile_enable_unet": True, "hypertile_max_tile_unet": 64, "hypertile_swap_size_unet": 1}


@pytest.mark.parametrize("settings", [MERGING, TILES], ids=["merging", "tiles"])
def test_token_merging_and_hypertile(client: Client, settings: dict) -> None:
    large = {"width": 256, "height": 256, "steps": 2}
    same(client, alone("lora_lora:1"), ("lora_lora:1",), settings=settings, **large)


def test_tiling(client: Client) -> None:
    same(client, alone("lora_locon:1"), ("lora_locon:1",), tiling=True)


@pytest.mark.parametrize("place", [{}, AT_EACH_CALL])
@pytest.mark.parametrize("what", ["fail", "nan", "interrupt", "skip"])
def test_nothing_stays_after_a_fault(client: Client, unhurt: None, what: str, place: dict) -> None:
    fusion = expert(SAME, prompt=named(LORA, "lora_locon:1"))
    with client.settings(place):
        whole = client.draw(fusion, model=BASE)
        weights = client.ask("/probe/weights")
        client.ask("/probe/arm", what=what, step=1)
        if what in ("fail", "nan"):
            with pytest.raises(RefusedError):
                client.draw(fusion, model=BASE)
        else:
            client.draw(fusion, model=BASE)
        assert client.ask("/probe/weights") == weights
        assert client.draw(fusion, model=BASE).same_as(whole)


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("a <lora:tiny_lore:1>", "no such LoRA; near it: tiny_lora"),
        ("a <lora:zzzz:1>", "no such LoRA; there are: "),
        ("a <lora:tiny_lora:x>", "allowed: <lora:NAME:WEIGHT>"),
        ("a <hypernet:x:1>", "<hypernet:..> can't act on one model alone"),
        ("a <lora:tiny_lora:1:lbw=XYZ>", "lbw= can't act on one model alone"),
        ("a <lora:tiny_lora:1> <lora:tiny_lora:0.5>", "each LoRA once"),
        ("a <lora:lora_nothing:1>", "only 0 of the 1 layers"),
        ("a <lora:lora_wrong:1>", "of its layers do not fit"),
        ("a <lora:lora_xl:1>", "LoRA for the base's kind of model"),
    ],
)  # fmt: skip
def test_refused_before_sampling(client: Client, unhurt: None, prompt: str, problem: str) -> None:
    with pytest.raises(RefusedError) as caught:
        client.draw(expert(SAME, prompt=prompt), model=BASE)
    assert caught.value.status == 422
    assert caught.value.answer["detail"].startswith("experts[0].prompt: ")
    assert problem in caught.value.answer["detail"]


def test_refused_of_another_kind(client: Client) -> None:
    with pytest.raises(RefusedError, match="the host reads them for the base's kind only"):
        client.draw(expert("tiny_2", prompt=named(LORA)), model=BASE)
    with pytest.raises(RefusedError, match="LoRA for the base's kind of model"):
        client.draw(expert(SAME, prompt=named("lora_lora:1")), model=XL)


def test_infotext_comes_back(client: Client) -> None:
    """With the checkpoint's and the LoRAs' hashes, the host's first, where sites look."""
    experts = [{"checkpoint": SAME, "prompt": named("tiny_lora:0.8")}, {"checkpoint": OTHER, "prompt": "a dog"}]
    drawn = client.draw({"experts": experts}, model=BASE, prompt=named("lora_lora:0.5"))
    text = drawn.infotexts[0]
    assert f"Fusion expert 1 checkpoint: {SAME}," in text
    assert "<lora:tiny_lora:0.8>" in text
    assert re.search(r'Lora hashes: "lora_lora: [0-9a-f]{12}, tiny_lora: [0-9a-f]{12}"', text)
    assert re.search(r"Fusion expert 2 hash: [0-9a-f]{10}", text)
    assert "Fusion expert 1 hash" not in text
    answer = client.ask("/sdapi/v1/txt2img", {"infotext": text})
    assert np.array_equal(decode(answer["images"][0]), drawn.pixels[0])
    without = client.draw(model=BASE)
    assert "Lora hashes" not in without.infotexts[0]


def test_a_pasted_lora_is_found_by_its_hash(client: Client) -> None:
    drawn = client.draw(expert(SAME, prompt=named("lora_lokr:0.8")), model=BASE)
    text = drawn.infotexts[0].replace("lora_lokr", "someones_name")
    answer = client.ask("/sdapi/v1/txt2img", {"infotext": text})
    assert np.array_equal(decode(answer["images"][0]), drawn.pixels[0])


def test_plots(client: Client) -> None:
    """Each cell is what the same request draws alone; hashes do not go on into cells without the LoRA."""
    prompts = ["a cat <lora:tiny_lora:0.3>", "a cat"]
    axes = ("[Fusion] Expert 1 checkpoint", SAME), ("[Fusion] Expert 1 prompt", ",".join(prompts))
    pictures, texts = plot(client, *axes, expert(SAME, **ALONE))
    for picture, text, prompt in zip(pictures, texts, prompts, strict=True):
        single = client.draw(expert(SAME, prompt=prompt, **ALONE))
        assert np.array_equal(picture, single.pixels[0])
        assert without_seconds(text) == without_seconds(single.infotexts[0])
    assert ["Lora hashes" in text for text in texts] == [True, False]


def test_a_preset_with_loras(client: Client, host: Host) -> None:
    """As an axis of a plot: the cell is the picture that its settings make."""
    own = {"experts": [{"checkpoint": SAME, "prompt": named("tiny_lora:0.5")}], **PLAIN, **ALONE}
    file = host.data / "denoiser-fusion-presets.json"
    file.write_text(json.dumps({"mine": own}), "utf-8")
    try:
        pictures, texts = plot(client, ("[Fusion] Preset", "mine"), ("[Fusion] Expert mask sharpness", "1"))
    finally:
        file.unlink()
    single = client.draw(own)
    assert np.array_equal(pictures[0], single.pixels[0])
    assert without_seconds(texts[0]) == without_seconds(single.infotexts[0])
