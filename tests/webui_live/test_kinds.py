"""Models of other kinds together: SD1 with SD2, and models that predict v with models that predict the noise."""

from __future__ import annotations

import numpy as np
import pytest

from tests.webui_live.client import Client, Pictures, RefusedError, expert

ALONE = {"snb_window": [0, 0], "snb_outside": "expert"}
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
#: An SD1 and an SD2 checkpoint, which share a VAE.
ONE, TWO = "tiny_a", "tiny_2"
DIRECTIONS = [(ONE, TWO), (TWO, ONE)]
PROMPT = "a (red:1.3) cat tiny_ti, wide_ti AND a [cow:dog:0.5]"

CASES = {
    "batch 2x2": ({"batch_size": 2, "n_iter": 2}, {}),
    "one half at a time": ({"prompt": PROMPT, "batch_size": 2}, {"batch_cond_uncond": False}),
    "clip skip 2": ({}, {"CLIP_stop_at_last_layers": 2}),
    "padded": ({"prompt": "a " * 90}, {"pad_cond_uncond": True}),
    "long": ({"prompt": "a " * 90, "negative_prompt": "a " * 80}, {}),
    "tiling": ({"tiling": True}, {}),
    "FreeU": ({}, {}),
    "hires": (HIRES, {}),
    "NGMS": ({"s_min_uncond": 4.0, "steps": 6}, {}),
}


@pytest.mark.parametrize(("base", "other"), DIRECTIONS)
def test_sd1_and_sd2_alone_draw_what_the_host_draws(client: Client, base: str, other: str) -> None:
    ways = [{"sampler_name": name, "prompt": PROMPT} for name in ("Euler", "DDIM", "DPM++ SDE")]
    with client.settings({"sd_model_checkpoint": f"{other}.safetensors"}):
        theirs = [client.draw(**way) for way in ways]
    with client.settings({"sd_model_checkpoint": f"{base}.safetensors"}):
        off = client.draw(**ways[0])
        before = client.state()
        for way, alike in zip(ways, theirs):
            alone = client.draw(expert(other, **ALONE), **way)
            assert alone.same_as(alike)
            assert alone.params["Fusion U-Net calls"].startswith("base 0")
        assert client.state() == before
        assert client.draw(**ways[0]).same_as(off)
        assert not off.same_as(theirs[0])


@pytest.mark.parametrize(("base", "other"), DIRECTIONS)
def test_the_built_text_encoder_is_the_hosts(client: Client, base: str, other: str) -> None:
    """Bit for bit, with each kind's own textual inversions."""
    texts = ["", "a cat", PROMPT, "tiny_ti", "wide_ti", "a " * 90]
    client.draw(model=base)
    built = [client.ask("/probe/encode", text=text, expert=f"{other}.safetensors") for text in texts]
    client.draw(model=other)
    assert built == [client.ask("/probe/encode", text=text) for text in texts]
    digests = {answer["digest"] for answer in built}
    assert len(digests) == len(texts)
    assert all(answer["random"] for answer in built)


def test_layouts(client: Client) -> None:
    told = {case: {"freeu": "Auto"} if case == "FreeU" else {} for case in CASES}
    theirs = {}
    with client.settings({"sd_model_checkpoint": f"{TWO}.safetensors"}):
        for case, (changes, settings) in CASES.items():
            theirs[case] = client.draw(told[case] or None, settings=settings, **changes)
    with client.settings({"sd_model_checkpoint": f"{ONE}.safetensors"}):
        for case, (changes, settings) in CASES.items():
            alone = client.draw(expert(TWO, **told[case], **ALONE), settings=settings, **changes)
            assert alone.same_as(theirs[case]), case


@pytest.mark.parametrize(("base", "other"), DIRECTIONS)
def test_fused(client: Client, base: str, other: str) -> None:
    with client.settings({"sd_model_checkpoint": f"{base}.safetensors"}):
        drawn = [client.draw(), client.draw(expert(other, **ALONE))]
        for told in ({}, {"method": "Average"}, {"snb_hold": 700}, {"prompt": "a house"}):
            drawn.append(client.draw(expert(other, **told)))
            assert drawn[-1].params["Fusion U-Net calls"] == "base 4, expert 1 4"
        both = {"experts": [{"checkpoint": "tiny_b"}, {"checkpoint": other}]}
        moved = client.draw(both, settings={"denoiser_fusion_place": "RAM between U-Net calls"})
        assert client.draw(both).same_as(moved)
    assert not any(one.same_as(two) for i, one in enumerate(drawn) for two in drawn[:i])


V_PAIRS = [("tiny_a", "tiny_v"), ("tiny_v", "tiny_a"), ("tiny_a", "tiny_2_v"), ("tiny_xl", "tiny_xl_v")]


@pytest.mark.parametrize(("base", "other"), V_PAIRS)
def test_v_and_epsilon(client: Client, base: str, other: str) -> None:
    """Alone, the expert draws what the host draws with it, but for rounding: its output is restated for the base."""
    ways = [{"sampler_name": name, "steps": 6} for name in ("Euler", "DDIM")]
    with client.settings({"sd_model_checkpoint": f"{other}.safetensors"}):
        theirs = [client.draw(**way) for way in ways]
        turned = client.draw(expert(base, method="Average"), **ways[0])
    with client.settings({"sd_model_checkpoint": f"{base}.safetensors"}):
        for way, alike in zip(ways, theirs):
            off, alone, fused = (client.draw(told, **way) for told in (None, expert(other, **ALONE), expert(other)))
            assert distance(alone, alike) <= 1
            assert distance(alone, off) > 8
            assert not fused.same_as(off)
            assert not fused.same_as(alone)
        averaged = client.draw(expert(other, method="Average"), **ways[0])
    if "_2" not in other:  # one VAE
        assert distance(averaged, turned) <= 1


def first_with_signal() -> int:
    """Under *Zero Terminal SNR*, the timestep whose signal is the least that the models were trained with."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    roots = np.sqrt(alphas)
    rescaled = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return int(np.flatnonzero(rescaled >= alphas[-1])[-1])


@pytest.mark.parametrize("way", [{"sampler_name": "Euler", "steps": 12}, {"sampler_name": "DDIM", "steps": 12}])
def test_a_model_of_the_noise_is_kept_out_of_steps_without_signal(client: Client, way: dict) -> None:
    """There its output as v is a division by nothing; the picture is that of a window that leaves these steps out."""
    window = [first_with_signal(), 0]
    noise, v = "tiny_a", "tiny_v_b"
    with client.settings({"sd_noise_schedule": "Zero Terminal SNR"}):
        for method in ("SNB", "Average"):
            out = client.draw(expert(noise, method=method), model=v, **way)
            assert out.same_as(client.draw(expert(noise, method=method, snb_window=window), model=v, **way))
            assert out.params["Fusion U-Net calls"] == "base 12, expert 1 10"
            alone = {"snb_outside": "expert", "snb_window": window}
            out = client.draw(expert(v, method=method), model=noise, **way)
            assert out.same_as(client.draw(expert(v, method=method, **alone), model=noise, **way))
            assert out.params["Fusion U-Net calls"] == "base 10, expert 1 12"
    usual = client.draw(expert(noise), model=v, **way)
    assert usual.params["Fusion U-Net calls"] == "base 12, expert 1 12"


def distance(one: Pictures, other: Pictures) -> int:
    return int(np.abs(one.pixels[0].astype(int) - other.pixels[0]).max())


@pytest.mark.parametrize(
    ("base", "fusion", "told"),
    [
        (ONE, expert(TWO, text_encoder="base"), "experts[0].text_encoder: 'base' is not allowed; the expert is sd2"),
        (TWO, expert(ONE, text_encoder="base"), "experts[0].text_encoder: 'base' is not allowed; the expert is sd1"),
        (ONE, expert(TWO, loras=True), "experts[0].loras: True is not allowed; the expert is sd2"),
        (ONE, expert(TWO, method="AFA", afa_maps="uniform"), "experts[0].checkpoint: "),
        (ONE, expert("tiny_v", method="AFA", afa_maps="uniform"), "experts[0].checkpoint: "),
        (TWO, expert("tiny_xl"), "experts[0].checkpoint: "),
        ("tiny_xl", expert(TWO), "experts[0].checkpoint: "),
        (TWO, expert("tiny_inpaint"), "experts[0].checkpoint: "),
        (TWO, expert("tiny_unet"), "experts[0].text_encoder: 'own' is not allowed; "),
    ],
)
def test_refused(client: Client, base: str, fusion: dict, told: str) -> None:
    with pytest.raises(RefusedError) as caught:
        client.draw(fusion, model=base)
    assert caught.value.status == 422
    assert caught.value.answer["detail"].startswith(told)
