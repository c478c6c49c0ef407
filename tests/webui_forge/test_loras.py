"""An expert with LoRAs draws what the fork draws with them in the picture's prompt; nothing of them stays."""

from __future__ import annotations

from typing import Any

import pytest

from tests.webui_forge.drawing import ALONE, BASE, CASES, OTHER, allowed, apart, calls, draw, host_draws
from tests.webui_live.client import PICTURE, Client, RefusedError, expert

WORDS = PICTURE["prompt"]
ANIMALS, VEHICLES = "<lora:demo-animals:1>", "<lora:demo-vehicles:0.6>"
FIRST, SECOND = ("txt2img", "img2img", "inpaint"), ("hires", "DDIM", "batch")
ONE = {"SNB": ALONE, "AFA": {"method": "AFA", "afa_maps": "only expert 1"}}


def same(prompt: str, **more: Any) -> dict[str, Any]:
    return expert("same as base", prompt=prompt, **more)


@pytest.mark.where(lambda fork, method, case: fork == "neo" or (method == "AFA") == (case in SECOND))
@pytest.mark.parametrize("method", ONE)
@pytest.mark.parametrize("case", FIRST + SECOND)
def test_alone_it_is_the_host_with_that_lora(client: Client, method: str, case: str) -> None:
    changes = CASES[case]
    off = host_draws(client, **changes)
    with_it = host_draws(client, **changes, prompt=f"{WORDS} {ANIMALS}")
    assert apart(with_it, off) > 20
    assert apart(draw(client, same(ANIMALS, **ONE[method]), **changes), with_it) <= allowed(case)
    if case in ("txt2img", "hires"):
        assert apart(draw(client, **changes), off) <= allowed(case)


def test_words_of_its_own(client: Client) -> None:
    with_it = host_draws(client, prompt=f"a car {ANIMALS}")
    assert apart(draw(client, same(f"a car {ANIMALS}", **ALONE)), with_it) == 0


@pytest.mark.parametrize("weights", ["1:0", "0:1", "0.5", "te=0.3:unet=1"])
def test_weights_of_text_encoder_and_unet(client: Client, weights: str) -> None:
    lora = f"<lora:demo-animals:{weights}>"
    assert apart(draw(client, same(lora, **ALONE)), host_draws(client, prompt=f"{WORDS} {lora}")) == 0


def test_several_loras(client: Client) -> None:
    both = f"{ANIMALS}{VEHICLES}"
    assert apart(draw(client, same(both, **ALONE)), host_draws(client, prompt=f"{WORDS} {both}")) == 0


@pytest.mark.parametrize("checkpoint", ["same as base", f"{OTHER}.safetensors"])
def test_loras_of_the_picture(client: Client, checkpoint: str) -> None:
    """They act on an expert where that is asked for, before its own, and nowhere else."""
    model = BASE if checkpoint == "same as base" else OTHER
    words = f"{WORDS} {VEHICLES}"
    plain, one, two = (host_draws(client, model=model, prompt=f"{WORDS} {loras}")
                       for loras in ("", VEHICLES, VEHICLES + ANIMALS))  # fmt: skip
    for more, alone in (({}, plain), ({"loras": True}, one), ({"loras": True, "prompt": ANIMALS}, two)):
        drawn = draw(client, expert(checkpoint, **ALONE, **more), prompt=words)
        assert apart(drawn, alone) == 0, more


def test_another_checkpoint_with_a_lora_of_its_own(client: Client) -> None:
    alone = host_draws(client, model=OTHER, prompt=f"{WORDS} {VEHICLES}")
    assert apart(draw(client, expert(OTHER, prompt=VEHICLES, **ALONE)), alone) == 0


def test_the_bases_text_encoder_with_the_experts_lora(client: Client) -> None:
    """Of a LoRA for text encoders alone nothing but the text is left, which either encoder may have read."""
    lora = "<lora:demo-animals:1:0>"
    drawn = draw(client, same(lora, text_encoder="base", **ALONE))
    assert apart(drawn, host_draws(client, prompt=f"{WORDS} {lora}")) == 0


def test_two_experts_on_the_base(client: Client) -> None:
    """Each half of the picture is the one's that it is said to be, and the third model is loaded beside them."""
    left, right = (host_draws(client, prompt=f"{WORDS} {lora}") for lora in (ANIMALS, VEHICLES))
    experts = [{"checkpoint": "same as base", "prompt": lora, "place": "0,0,1,1"} for lora in (ANIMALS, VEHICLES)]
    fusion = {"experts": experts, "guidance": "off"}
    assert apart(draw(client, fusion), left) <= 1  # places are mixed in parts
    experts.reverse()
    assert apart(draw(client, fusion), right) <= 1
    for one in experts:
        one["place"] = "auto"
    both = draw(client, fusion)
    assert calls(both) == [4, 4, 4]
    assert min(apart(both, left), apart(both, right)) > 20


@pytest.mark.parametrize(
    ("prompt", "told"),
    [("<lora:nix:1>", "no such LoRA"), ("<lora:demo-animals:x>", "is not allowed"),
     ("<hypernet:a:1>", "is not allowed")],
)  # fmt: skip
def test_refused_before_sampling(client: Client, prompt: str, told: str) -> None:
    with pytest.raises(RefusedError, match=rf"422: experts\[0\].prompt.*{told}"):
        draw(client, same(prompt))
    assert apart(draw(client), host_draws(client)) == 0
