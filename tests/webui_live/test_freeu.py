"""FreeU in the host: with and without experts, on every kind of U-Net, and gone afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests.webui_live.client import PICTURE, TITLE, Client, Pictures, RefusedError, decode, expert
from tests.webui_live.test_identity import HIRES, picture
from tests.webui_live.test_requests import panel_args, without_seconds
from tests.webui_live.test_xyz import plot

BASE, OTHER = "tiny_a", "tiny_b"
AUTO = {"freeu": "Auto"}
CUSTOM = {"freeu": "Custom", "freeu_version": "1", "freeu_b1": 1.3, "freeu_s1": 0.5, "freeu_b2": 1.2, "freeu_s3": 0.8,
          "freeu_offset2": 0.25, "freeu_width2": 0.75, "freeu_high1": 1.1, "freeu_cutoff1": 0.5, "freeu_start": 0.25,
          "freeu_stop": 3.0, "freeu_smooth": 0.5}  # fmt: skip
NEUTRAL = {"freeu": "Custom", "freeu_offset1": 0.5, "freeu_smooth": 1}
ALONE = {"snb_window": [0, 0], "snb_outside": "expert"}


@pytest.fixture(scope="module", autouse=True)
def _base(client: Client) -> Iterator[None]:
    """Kept loaded, since the host would load a model anew for every request that names another."""
    with client.settings({"sd_model_checkpoint": f"{BASE}.safetensors"}):
        yield


def draw(client: Client, fusion: dict | None = None, model: str = BASE, **changes: object) -> Pictures:
    return client.draw(fusion, model=None if model == BASE else model, **changes)


@pytest.mark.parametrize("model", [BASE, "tiny_v", "tiny_xl", "tiny_inpaint"])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_alone_it_changes_the_picture_and_nothing_else(client: Client, model: str, sampler: str) -> None:
    off = draw(client, model=model, sampler_name=sampler)
    before = client.state()
    on = draw(client, AUTO, model, sampler_name=sampler)
    assert not on.same_as(off)
    assert on.params["Fusion FreeU"] == "Auto"
    assert "Fusion method" not in on.params
    assert draw(client, AUTO, model, sampler_name=sampler).same_as(on)
    assert draw(client, NEUTRAL, model, sampler_name=sampler).same_as(off)
    assert draw(client, model=model, sampler_name=sampler).same_as(off)
    assert client.state() == before


@pytest.mark.parametrize(("model", "name"), [(BASE, "SD1.5"), ("tiny_xl", "SDXL")])
@pytest.mark.parametrize("version", [1, 2])
def test_auto_goes_by_the_model(client: Client, model: str, name: str, version: int) -> None:
    auto = draw(client, {**AUTO, "freeu_version": version}, model)
    assert draw(client, {"freeu": name, "freeu_version": version}, model).same_as(auto)
    assert not draw(client, {"freeu": "SD2.1", "freeu_version": version}, model).same_as(auto)


def test_panel_dict_infotext_and_plot_agree(client: Client) -> None:
    by_dict = draw(client, CUSTOM)
    labels = {"FreeU": "Custom", "FreeU version": "1", "FreeU backbone b1": 1.3, "FreeU skip s1": 0.5,
              "FreeU backbone b2": 1.2, "FreeU skip s3": 0.8, "FreeU offset 2": 0.25, "FreeU width 2": 0.75,
              "FreeU high 1": 1.1, "FreeU cutoff 1": 0.5, "FreeU starting step": 0.25, "FreeU ending step": 3,
              "FreeU fade": 0.5}  # fmt: skip
    by_panel = draw(client, None, args=panel_args(client, **{TITLE: True}, **labels))
    assert by_panel.same_as(by_dict)
    assert without_seconds(by_panel.infotexts[0]) == without_seconds(by_dict.infotexts[0])
    answer = client.ask("/sdapi/v1/txt2img", {"infotext": by_dict.infotexts[0], "width": 128, "height": 128})
    assert np.array_equal(decode(answer["images"][0]), by_dict.pixels[0])
    assert without_seconds(json.loads(answer["info"])["infotexts"][0]) == without_seconds(by_dict.infotexts[0])


def test_hidden_controls_of_the_panel_do_not_count(client: Client) -> None:
    args = panel_args(client, **{TITLE: True, "FreeU": "SD1.5", "FreeU backbone b1": 2.5})
    assert draw(client, None, args=args).same_as(draw(client, {"freeu": "SD1.5"}))


def test_plot(client: Client) -> None:
    pictures, texts = plot(client, ("[Fusion] FreeU", "Off,SD1.5"), ("[Fusion] FreeU version", "1,2"))
    off = draw(client)
    for i in (0, 2):
        assert np.array_equal(pictures[i], off.pixels[0])
        assert "Fusion" not in texts[i]
    for i, version in ((1, 1), (3, 2)):
        single = draw(client, {"freeu": "SD1.5", "freeu_version": version})
        assert np.array_equal(pictures[i], single.pixels[0])
        assert without_seconds(texts[i]) == without_seconds(single.infotexts[0])


def test_factors_in_a_plot(client: Client) -> None:
    """A cell sets several; picture and infotext are those of the same factors in a request."""
    pictures, texts = plot(client, ("[Fusion] FreeU factors", "b1=1.4 s1=0.5, b2=1.3"))
    for cell, text, factors in zip(pictures, texts, ({"freeu_b1": 1.4, "freeu_s1": 0.5}, {"freeu_b2": 1.3})):
        single = draw(client, {"freeu": "Custom", **factors})
        assert np.array_equal(cell, single.pixels[0])
        assert without_seconds(text) == without_seconds(single.infotexts[0])


def test_infotext_of_the_other_extension(client: Client) -> None:
    """As ljleb's sd-webui-freeu writes it: JSON stages without what is the default, a schedule in parts or steps."""
    stages = [{"backbone_factor": 1.3, "skip_factor": 0.5, "skip_cutoff": 0.5}, {}, {"skip_high_end_factor": 0.9}]
    plain = draw(client).infotexts[0]
    told = f'FreeU Stages: {json.dumps(json.dumps(stages))}, FreeU Schedule: "1, 0.75, 0.5", FreeU Version: 1'
    theirs = f"{plain}, {told}"
    answer = client.ask("/sdapi/v1/txt2img", {"infotext": theirs, "width": 128, "height": 128})
    ours = {"freeu": "Custom", "freeu_version": 1, "freeu_b1": 1.3, "freeu_s1": 0.5, "freeu_cutoff1": 0.5,
            "freeu_high3": 0.9, "freeu_start": 0.25, "freeu_stop": 0.75, "freeu_smooth": 0.5}  # fmt: skip
    assert np.array_equal(decode(answer["images"][0]), draw(client, ours).pixels[0])


def test_an_expert_alone_is_the_host_with_freeu_on_that_checkpoint(client: Client) -> None:
    """The two checkpoints share one VAE, so this shows that the expert's own U-Net has its hooks."""
    alone = draw(client, expert(OTHER, **AUTO, **ALONE))
    assert alone.same_as(draw(client, AUTO, OTHER))


@pytest.mark.parametrize("other", [OTHER, BASE])
def test_which_models(client: Client, other: str) -> None:
    """Also where the expert is the base's own U-Net with another prompt."""
    fused = {which: draw(client, expert(other, prompt="a house", freeu_models=which, **AUTO))
             for which in ("all", "base", "experts")}  # fmt: skip
    off = draw(client, expert(other, prompt="a house"))
    pictures = [*fused.values(), off]
    assert not any(a.same_as(b) for i, a in enumerate(pictures) for b in pictures[:i])
    alone = {which: draw(client, expert(other, prompt="a house", freeu_models=which, **AUTO, **ALONE))
             for which in ("all", "base", "experts")}  # fmt: skip
    assert alone["all"].same_as(alone["experts"])
    assert alone["base"].same_as(draw(client, expert(other, prompt="a house", **ALONE)))


CASES = {
    "batch 2x2": ({"batch_size": 2, "n_iter": 2}, {}),
    "AND": ({"prompt": "a cat AND a dog :0.7"}, {}),
    "one half at a time": ({}, {"batch_cond_uncond": False}),
    "NGMS": ({"s_min_uncond": 4.0, "steps": 6}, {}),
    "hires": (HIRES, {}),
    "odd size": ({"width": 136, "height": 72}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_however_the_host_samples(client: Client, case: str) -> None:
    changes, settings = CASES[case]
    off = draw(client, settings=settings, **changes)
    on = draw(client, AUTO, settings=settings, **changes)
    assert not any(np.array_equal(a, b) for a, b in zip(on.pixels, off.pixels))
    fused = draw(client, expert("tiny_copy", **AUTO), settings=settings, **changes)
    assert fused.same_as(on)  # SNB with the base's own weights, FreeU on both
    if "n_iter" in changes:
        fourth = draw(client, AUTO, seed=4)
        assert abs(on.pixels[3].astype(int) - fourth.pixels[0]).max() <= 2  # batches round differently


def test_img2img(client: Client) -> None:
    changes = {"img2img": picture(), "denoising_strength": 0.6, "steps": 6}
    off, on = draw(client, **changes), draw(client, AUTO, **changes)
    assert not on.same_as(off)
    assert draw(client, expert("tiny_copy", **AUTO), **changes).same_as(on)


SAMPLERS = ("Heun", "DPM2", "DPM++ SDE", "DDIM", "UniPC", "DPM fast", "DPM adaptive", "Restart")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_schedule_means_steps(client: Client, sampler: str) -> None:
    """Its halves differ from each other, from the whole and from none, whatever the sampler's calls."""
    changes = {"sampler_name": sampler, "steps": 4}
    off, on = draw(client, **changes), draw(client, AUTO, **changes)
    assert draw(client, {**AUTO, "freeu_start": 0.5, "freeu_stop": 0.5}, **changes).same_as(off)
    first = draw(client, {**AUTO, "freeu_stop": 0.5}, **changes)
    second = draw(client, {**AUTO, "freeu_start": 0.5}, **changes)
    pictures = [off, on, first, second]
    assert not any(a.same_as(b) for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM++ 2M"])
def test_steps_and_parts_are_one_schedule(client: Client, sampler: str) -> None:
    changes = {"sampler_name": sampler, "steps": 8}
    parts = draw(client, {**AUTO, "freeu_start": 0.25, "freeu_stop": 0.75}, **changes)
    assert draw(client, {**AUTO, "freeu_start": 2, "freeu_stop": 6}, **changes).same_as(parts)


def test_the_schedule_starts_anew_at_hires_fix(client: Client) -> None:
    """The second pass alone, its first half: if steps were counted on, it would not act at all."""
    off = draw(client, **HIRES)
    half = draw(client, {**AUTO, "freeu_stop": 0.5, "passes": "hires"}, **HIRES)
    whole = draw(client, {**AUTO, "passes": "hires"}, **HIRES)
    assert not half.same_as(off)
    assert not half.same_as(whole)


@pytest.mark.parametrize("what", ["fail", "interrupt"])
def test_hooks_are_gone_after_an_end_of_any_kind(client: Client, what: str) -> None:
    off = draw(client)
    before = client.state()
    client.ask("/probe/arm", what=what, step=2)
    if what == "fail":
        with pytest.raises(RefusedError, match="the probe made the U-Net fail"):
            draw(client, expert(OTHER, **AUTO))
    else:
        draw(client, expert(OTHER, **AUTO))
    assert client.state() == before
    assert draw(client).same_as(off)


@pytest.mark.parametrize(
    ("fusion", "told"),
    [
        ({"freeu": "SD3"}, "freeu: "),
        ({"freeu": "Off"}, "experts: "),
        ({"freeu": "Auto", "freeu_b1": 1.2}, "freeu_b1: 1.2 is not allowed; allowed with freeu Auto: 1"),
        ({"freeu": "Auto", "freeu_start": 3, "freeu_stop": 2}, "freeu_stop: 2.0 is not allowed"),
        ({"freeu": "Custom", "freeu_cutoff2": 1.5}, "freeu_cutoff2: "),
    ],
)
def test_refused(client: Client, fusion: dict, told: str) -> None:
    with pytest.raises(RefusedError) as caught:
        draw(client, fusion)
    assert caught.value.status == 422
    assert caught.value.answer["detail"].startswith(told)


def test_a_model_without_such_stages_is_refused(client: Client, names: object) -> None:
    if names.base != "general":
        pytest.skip("the demo's checkpoints, whose features all have the same channels, are not here")
    with pytest.raises(RefusedError, match=r"freeu: .*factors for 4 x or 2 x.*features of 1 x"):
        client.draw(AUTO, model=names.base)
    on = client.draw({"freeu": "Custom", "freeu_b3": 1.2}, model=names.base, prompt=PICTURE["prompt"])
    assert not on.same_as(client.draw(model=names.base))
