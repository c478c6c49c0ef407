"""What two different models give together."""

from __future__ import annotations

import numpy as np
import pytest

from tests.webui_live.client import PLAIN, Client, Pictures, expert
from tests.webui_live.conftest import Names

HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
ALONE = {"snb_window": [0, 0], "snb_outside": "expert"}


@pytest.mark.parametrize("sampler", ["Euler a", "DDIM", "DPM++ 2M", "LCM"])
def test_a_fused_picture_is_neither_models(client: Client, names: Names, sampler: str) -> None:
    fused = client.draw(expert(names.expert), sampler_name=sampler)
    base = client.draw(sampler_name=sampler)
    alone = client.draw(expert(names.expert, **ALONE), sampler_name=sampler)
    assert not fused.same_as(base)
    assert not fused.same_as(alone)
    assert not base.same_as(alone)
    assert client.draw(expert(names.expert), sampler_name=sampler).same_as(fused)


@pytest.mark.parametrize(("base", "other"), [("tiny_a", "tiny_b"), ("tiny_v", "tiny_v_b"), ("tiny_xl", "tiny_xl_b")])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_an_expert_alone_draws_what_the_host_draws_with_it(
    client: Client, base: str, other: str, sampler: str
) -> None:
    """The checkpoints of a pair share one VAE, so the pictures show the U-Net and the text encoder alone."""
    prompt = "a (red:1.3) cat AND a [cow:dog:0.5]"
    alone = client.draw(expert(other, **ALONE), model=base, sampler_name=sampler, prompt=prompt)
    assert alone.same_as(client.draw(model=other, sampler_name=sampler, prompt=prompt))
    assert "base 0" in alone.params["Fusion U-Net calls"]


def test_empty_window_is_the_base(client: Client, names: Names) -> None:
    on = client.draw(expert(names.expert, snb_window=[0, 0]))
    assert on.same_as(client.draw())
    assert on.params["Fusion U-Net calls"] == "base 4, expert 1 0"


def test_window_runs_the_expert_inside_only(client: Client, names: Names) -> None:
    on = client.draw(expert(names.expert, snb_window=[1000, 500]), sampler_name="DDIM", steps=10)
    calls = [int(part.split()[-1]) for part in on.params["Fusion U-Net calls"].split(", ")]
    assert calls[0] == 9  # the host's DDIM takes one step fewer where 1000 is divisible by the steps
    assert 0 < calls[1] < calls[0]


@pytest.mark.parametrize(
    ("settings", "turned"),
    [
        ({"method": "Average"}, {}),
        ({}, {}),
        ({"k_general": 2, "k_expert": 50}, {"k_general": 50, "k_expert": 2}),
        ({"snb_hold": 700, "snb_from": 1000}, {}),
        ({"snb_hold": 700, "snb_from": 400}, {}),
    ],
    ids=str,
)
def test_base_and_expert_are_peers(client: Client, settings: dict, turned: dict) -> None:
    """Either may be the base: each reads the prompt with its own encoder, and they share one VAE."""
    one = client.draw(expert("tiny_b", **settings), model="tiny_a", steps=6)
    other = client.draw(expert("tiny_a", **settings | turned), model="tiny_b", steps=6)
    assert np.abs(one.pixels[0].astype(int) - other.pixels[0]).max() <= 1


def test_passes(client: Client, names: Names) -> None:
    drawn = {which: client.draw(expert(names.expert, passes=which), **HIRES) for which in ("both", "first", "hires")}
    off = client.draw(**HIRES)
    pictures = [*drawn.values(), off]
    for i, one in enumerate(pictures):
        assert not any(one.same_as(other) for other in pictures[:i])
    calls = {which: picture.params["Fusion U-Net calls"] for which, picture in drawn.items()}
    assert calls == {"both": "base 8, expert 1 8", "first": "base 4, expert 1 4", "hires": "base 4, expert 1 4"}


def test_own_prompt_and_encoder(client: Client) -> None:
    """On checkpoints whose text encoders differ; the demo's share one."""
    base, other = "tiny_a", "tiny_b"

    def draw(**settings: object) -> Pictures:
        return client.draw(expert(other, **settings), model=base)

    plain = draw()
    assert draw(prompt="a (red:1.2) cat, in a hat", negative_prompt="dog").same_as(plain)
    for own in ({"prompt": "a house"}, {"negative_prompt": "a house"}):
        assert draw(**own, **ALONE).same_as(client.draw(model=other, **own))
        assert not draw(**own).same_as(plain)
    assert not draw(text_encoder="base").same_as(plain)
    copy = {"text_encoder": "base", **ALONE}
    assert client.draw(expert("tiny_copy", **copy), model=base).same_as(client.draw(model=base))


def test_the_base_with_another_prompt(client: Client, names: Names) -> None:
    on = client.draw(expert(names.base, prompt="a house"))
    assert not on.same_as(client.draw())
    assert client.draw(expert(names.base, prompt="a house", **ALONE)).same_as(client.draw(prompt="a house"))


def test_pictures_do_not_depend_on_their_batch(client: Client, names: Names) -> None:
    together = client.draw(expert(names.expert), batch_size=2, steps=3)
    second = client.draw(expert(names.expert), seed=2, steps=3)
    assert abs(together.pixels[1].astype(int) - second.pixels[0]).max() <= 2  # batches round differently


def test_two_experts(client: Client, names: Names) -> None:
    both = client.draw({"experts": [{"checkpoint": names.expert}, {"checkpoint": names.other}], **PLAIN})
    assert set(client.fusion()["experts"]) == {names.expert, names.other}
    assert both.params["Fusion U-Net calls"] == "base 4, expert 1 4, expert 2 4"
    one = client.draw(expert(names.expert))
    assert client.fusion()["experts"] == [names.expert]  # beyond those in use, one is kept
    assert not both.same_as(one)
    silent = {"experts": [{"checkpoint": names.expert}, {"checkpoint": names.other, "window": [0, 0]}], **PLAIN}
    assert client.draw(silent).same_as(one)


def test_without_the_unconditional_half_the_mask_is_held(client: Client, names: Names) -> None:
    """Only the first step has that half, so its mask serves all steps, as if it were held at once."""
    way = {"s_min_uncond": 14.0, "steps": 6}
    with client.settings({"s_min_uncond_all": True}):
        on = client.draw(expert(names.expert), **way)
        assert on.same_as(client.draw(expert(names.expert, snb_hold=990, snb_from=1000), **way))
        assert not on.same_as(client.draw(**way))


def test_before_there_is_a_mask_the_base_draws(client: Client, names: Names) -> None:
    """The first two of four steps lack the unconditional half: timesteps 999 and 666."""
    with client.settings({"skip_early_cond": 0.4}):
        on = client.draw(expert(names.expert))
        assert on.same_as(client.draw(expert(names.expert, snb_window=[500, 0])))
        assert not on.same_as(client.draw())
