"""LoRAs of the picture's prompt on the expert: only when asked for, and gone without a trace."""

from __future__ import annotations

import pytest

from tests.webui_live.client import PICTURE, Client, expert

ALONE = {"snb_window": [0, 0], "snb_outside": "expert"}
PROMPT = f"{PICTURE['prompt']} <lora:tiny_lora:1>"


@pytest.fixture
def plain(client: Client) -> dict:
    """What the host draws without this extension, by (checkpoint, whether with the LoRA)."""
    return {
        (name, lora): client.draw(model=name, prompt=PROMPT if lora else PICTURE["prompt"])
        for name in ("tiny_a", "tiny_b") for lora in (False, True)
    }  # fmt: skip


def test_loras_on_request(client: Client, plain: dict) -> None:
    assert not plain["tiny_b", True].same_as(plain["tiny_b", False])
    for lora in (False, True, False):
        alone = client.draw(expert("tiny_b", loras=lora, **ALONE), model="tiny_a", prompt=PROMPT)
        assert alone.same_as(plain["tiny_b", lora])
    # Where the prompt has none, an expert that had one is as it was.
    client.draw(expert("tiny_b", loras=True), model="tiny_a", prompt=PROMPT)
    assert client.draw(expert("tiny_b", loras=True, **ALONE), model="tiny_a").same_as(plain["tiny_b", False])
    assert client.draw(model="tiny_a").same_as(plain["tiny_a", False])
    assert client.draw(model="tiny_a", prompt=PROMPT).same_as(plain["tiny_a", True])


def test_the_base_as_expert_without_its_loras(client: Client, plain: dict) -> None:
    shared = client.draw(expert("tiny_a", loras=True), model="tiny_a", prompt=PROMPT)
    assert shared.same_as(plain["tiny_a", True])
    without = client.draw(expert("tiny_a", **ALONE), model="tiny_a", prompt=PROMPT)
    assert without.same_as(plain["tiny_a", False])
