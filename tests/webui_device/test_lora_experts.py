"""LoRA experts where the host moves the model's parts between GPU and RAM: ``--medvram`` and ``--lowvram``.

On the CPU, where the host hooks and moves as ever, and in half precision on the stand-in for a GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fake_cuda
from tests.webui_live.client import Client, expert
from tests.webui_live.conftest import ON_FAKE_CUDA, SETTINGS
from tests.webui_live.host import Host, make_checkpoints, prepare_data
from tests.webui_live.needs import the_host
from tests.webui_live.test_loras import AT_EACH_CALL, SAME, alone, named

#: (checkpoint, LoRA on it)
CASES = {"sd1": ("tiny_a", "tiny_lora:1"), "locon": ("tiny_a", "lora_locon:0.7"), "norm": ("tiny_a", "lora_norm:1"),
         "sdxl": ("tiny_xl", "lora_xl:1")}  # fmt: skip


@pytest.fixture(scope="module", params=["cpu medvram", "cpu lowvram", "stand-in medvram", "stand-in lowvram"])
def little(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    device, mode = request.param.split()
    if device == "stand-in" and (sentence := fake_cuda.obstacle()):
        pytest.skip(sentence)
    folder, python = the_host()
    data = tmp_path_factory.mktemp("little")
    prepare_data(data, SETTINGS | ON_FAKE_CUDA | {"live_previews_enable": False})
    make_checkpoints(data, python, folder)
    probe = data / "extensions/fusion-probe/scripts"
    probe.mkdir(parents=True)
    shutil.copy(Path(__file__).parents[1] / "webui_live/probe.py", probe)
    extra = (f"--{mode}",) if device == "cpu" else ()
    running = Host(data, "tiny_a", extra=extra, device="" if device == "cpu" else mode)
    yield running
    running.stop()
    shutil.rmtree(data / "models")


@pytest.mark.parametrize("place", [{}, AT_EACH_CALL], ids=["kept", "at each call"])
@pytest.mark.parametrize("case", CASES)
def test_an_expert_alone_is_the_host_with_its_lora(little: Host, case: str, place: dict[str, Any]) -> None:
    """The expert draws before the host has ever merged its LoRA; afterwards the base is as it was."""
    client, (model, lora) = Client(little.url), CASES[case]
    with client.settings(place):
        plain = client.draw(model=model)
        state, weights = client.state(), client.ask("/probe/weights")
        on = client.draw(alone(lora), model=model)
        assert (client.state(), client.ask("/probe/weights")) == (state, weights)
        assert client.draw(model=model).same_as(plain)
        picture = client.draw(model=model, prompt=named(lora))
        assert on.same_as(picture)
        assert not on.same_as(plain)
        afa = expert(SAME, prompt=named(lora), method="AFA", afa_maps="only expert 1")
        assert client.draw(afa, model=model).same_as(picture)
        assert client.draw(model=model).same_as(plain)
        assert client.ask("/probe/weights") == weights


def test_beside_the_pictures_own_lora(little: Host) -> None:
    client, picture = Client(little.url), {"prompt": named("lora_lora:1")}
    for place in ({}, AT_EACH_CALL):
        with client.settings(place):
            drawn = client.draw(alone("tiny_lora:1"), model="tiny_a", **picture)
            assert drawn.same_as(client.draw(model="tiny_a", prompt=named("tiny_lora:1")))
            base = client.draw(alone("tiny_lora:1", snb_outside="base"), model="tiny_a", **picture)
            assert base.same_as(client.draw(model="tiny_a", **picture))


def test_two_experts(little: Host) -> None:
    client = Client(little.url)
    two = {"experts": [{"checkpoint": SAME, "prompt": named(lora)} for lora in ("tiny_lora:1", "lora_locon:1")]}
    client.draw(model="tiny_a")
    weights = client.ask("/probe/weights")
    first = client.draw(two, model="tiny_a")
    assert client.draw(two, model="tiny_a").same_as(first)
    assert client.ask("/probe/weights") == weights
