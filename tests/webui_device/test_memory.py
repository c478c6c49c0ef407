"""What stays on a device, with a limit to its memory, in the real WebUI in half precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.webui_live.client import Client, RefusedError, expert

#: The demo's checkpoints at this size need 12.1 MB while the VAE decodes; an expert is 4.1 MB more.
SIZE = {"prompt": "a fox left of a tractor, flat drawing", "negative_prompt": "", "width": 256, "height": 128,
        "steps": 2}  # fmt: skip
BASE = "animals"
TWO = {"experts": [{"checkpoint": "vehicles.safetensors"}, {"checkpoint": "food.safetensors"}]}


@pytest.fixture(autouse=True)
def _no_limit_stays(half: Client) -> Iterator[None]:
    half.draw(model=BASE, **SIZE)
    half.ask("/device/free", collect=True)
    half.ask("/device/memory", reset=True)
    yield
    half.ask("/device/memory", limit=0)


def base_alone(client: Client) -> dict:
    """Bytes after a picture of the base alone, and its peak."""
    client.draw(model=BASE, **SIZE)
    return client.ask("/device/memory", reset=True)


def test_two_experts_are_switched_ten_times_where_the_base_alone_just_fits(half: Client) -> None:
    """An expert makes room for the next, and for decoding; *Free memory* then gives back all but the base's."""
    alone = base_alone(half)
    half.ask("/device/memory", limit=int(1.02 * alone["peak"]))
    for i in range(10):
        half.draw(expert(("vehicles", "food")[i % 2]), model=BASE, **SIZE)
    assert half.ask("/device/free")["now"] <= 1.01 * alone["now"]


def test_freed_memory_is_free_at_once(half: Client) -> None:
    """Without waiting for Python's collector."""
    alone = base_alone(half)["now"]
    half.draw(TWO, model=BASE, **SIZE)
    assert half.ask("/device/memory")["now"] > 1.5 * alone
    assert half.ask("/device/free")["now"] <= 1.01 * alone


def test_after_an_out_of_memory_the_next_picture_is_drawn(half: Client) -> None:
    """The refusal says what to do, nothing stays of the pass that failed, and the picture is the same as ever."""
    alone = base_alone(half)
    wanted = half.draw(expert("vehicles"), model=BASE, **SIZE)
    half.ask("/device/free", collect=True)
    half.ask("/device/memory", limit=int(alone["now"] + 3e6))
    with pytest.raises(RefusedError, match="do not fit into memory together, so the experts have been unloaded"):
        half.draw(TWO, model=BASE, **SIZE)
    half.ask("/device/memory", limit=0)
    assert half.ask("/device/memory")["now"] <= 1.05 * alone["now"]
    half.ask("/device/memory", limit=int(1.02 * alone["peak"]))
    assert half.draw(expert("vehicles"), model=BASE, **SIZE).same_as(wanted)


@pytest.mark.parametrize("fusion", [TWO, TWO | {"method": "AFA", "afa_maps": "uniform"}], ids=["SNB", "AFA"])
def test_ram_between_calls_holds_one_model_at_a_time(half: Client, fusion: dict) -> None:
    """While loading, too; and the picture is that of experts which stay on the device."""
    alone = base_alone(half)
    peaks, pictures = {}, {}
    for place in ("GPU", "RAM between U-Net calls"):
        half.ask("/device/free", collect=True)
        half.ask("/device/memory", reset=True)
        with half.settings({"denoiser_fusion_place": place}):
            pictures[place] = half.draw(fusion, model=BASE, **SIZE)
        peaks[place] = half.ask("/device/memory", reset=True)["peak"]
    assert pictures["GPU"].same_as(pictures["RAM between U-Net calls"])
    assert peaks["GPU"] >= 1.3 * alone["peak"]
    assert peaks["RAM between U-Net calls"] <= 1.02 * alone["peak"]
