"""Nothing stays: off is as absent after errors, interrupts, other models, and a reloaded UI."""

from __future__ import annotations

import pytest

from tests.webui_live.client import Client, RefusedError, expert
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host, HostDiedError

HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}


def test_off_on_off(client: Client, names: Names) -> None:
    off = client.draw()
    before = client.state()
    assert not client.draw(expert(names.expert)).same_as(off)
    assert client.draw().same_as(off)
    assert client.state() == before


def test_error_in_the_unet(client: Client, names: Names) -> None:
    off, on = client.draw(), client.draw(expert(names.expert))
    before = client.state()
    client.ask("/probe/arm", what="fail")
    with pytest.raises(RefusedError, match="the probe made the U-Net fail"):
        client.draw(expert(names.expert))
    assert client.state() == before
    assert client.draw().same_as(off)
    assert client.draw(expert(names.expert)).same_as(on)


@pytest.mark.parametrize("what", ["interrupt", "skip"])
@pytest.mark.parametrize("changes", [{}, HIRES, {"n_iter": 2}])
def test_interrupt(client: Client, names: Names, what: str, changes: dict) -> None:
    off = client.draw()
    before = client.state()
    client.ask("/probe/arm", what=what, step=2)
    client.draw(expert(names.expert), **changes)
    assert client.state() == before
    assert client.draw().same_as(off)


def test_hires_with_another_checkpoint(client: Client) -> None:
    changes = HIRES | {"hr_checkpoint_name": "tiny_b.safetensors"}
    off = client.draw(model="tiny_a", **changes)
    on = client.draw(expert("tiny_copy", passes="first"), model="tiny_a", **changes)
    assert on.same_as(off)
    shared = client.draw(expert("tiny_b", passes="hires"), model="tiny_a", **changes)
    assert shared.same_as(off)  # there the expert is the base itself


def test_hires_with_a_checkpoint_of_another_kind_is_refused(client: Client) -> None:
    changes = HIRES | {"hr_checkpoint_name": "tiny_xl.safetensors"}
    with pytest.raises(RefusedError, match="it is sd1; allowed with this base: sdxl"):
        client.draw(expert("tiny_b"), model="tiny_a", **changes)


def test_refiner_takes_over(client: Client) -> None:
    changes = {"refiner_checkpoint": "tiny_b.safetensors", "refiner_switch_at": 0.5, "steps": 6}
    off = client.draw(model="tiny_a", **changes)
    on = client.draw(expert("tiny_copy"), model="tiny_a", **changes)
    assert on.same_as(off)
    calls = [int(part.split()[-1]) for part in on.params["Fusion U-Net calls"].split(", ")]
    assert calls[0] == calls[1] < 6


@pytest.mark.parametrize("refiner", ["tiny_b", "tiny_c"])
@pytest.mark.parametrize("text_encoder", ["own", "base"])
def test_experts_on_the_refiner(client: Client, refiner: str, text_encoder: str) -> None:
    """An expert that draws alone draws on, also where it is the base that the refiner has replaced, or the refiner."""
    changes = {"refiner_checkpoint": f"{refiner}.safetensors", "refiner_switch_at": 0.5, "steps": 6}
    alone = {"snb_window": [0, 0], "snb_outside": "expert", "refiner": True}
    for name in ("tiny_a", "tiny_c") if text_encoder == "own" else ("tiny_a",):
        on = client.draw(expert(name, text_encoder=text_encoder, **alone), model="tiny_a", **changes)
        assert on.params["Fusion U-Net calls"] == "base 0, expert 1 6"
        assert on.same_as(client.draw(model=name, steps=6)) == (text_encoder == "own")
    with pytest.raises(RefusedError, match="it is sd1; allowed with this base: sdxl"):
        client.draw(expert("tiny_c", refiner=True), model="tiny_a", refiner_checkpoint="tiny_xl.safetensors",
                    refiner_switch_at=0.5)  # fmt: skip


def test_memory_is_freed(client: Client, names: Names) -> None:
    client.draw(expert(names.expert))
    loaded = client.fusion()
    assert loaded["experts"] == [names.expert]
    assert loaded["bytes"] > 0
    assert names.expert in loaded["told"]
    client.draw(expert(names.copy))
    assert client.fusion()["experts"] == [names.copy]  # one is kept
    press(client, "Free memory")
    assert client.fusion() == {"running": False, "experts": [], "bytes": 0, "text_bytes": 0,
                               "told": "No expert is loaded."}  # fmt: skip


@pytest.mark.parametrize("place", ["RAM between pictures", "RAM between U-Net calls"])
def test_places(client: Client, names: Names, place: str) -> None:
    on = client.draw(expert(names.expert))
    assert client.draw(expert(names.expert), settings={"denoiser_fusion_place": place}).same_as(on)


def test_other_kind_of_base_frees_experts(client: Client, names: Names) -> None:
    client.draw(expert(names.expert))
    client.draw(expert("tiny_xl_b"), model="tiny_xl")
    assert client.fusion()["experts"] == ["tiny_xl_b"]


def test_reloading_the_ui_stacks_nothing(client: Client, host: Host, names: Names) -> None:
    off, on = client.draw(), client.draw(expert(names.expert))
    before, axes = client.state(), fusion_axes(client)
    for times in range(10):
        reload_ui(client, host)
        assert fusion_axes(client) == axes
        assert client.fusion()["experts"] == []
        assert client.state()["callbacks"] == before["callbacks"]
        if times in (0, 9):
            assert client.draw().same_as(off)
            assert client.draw(expert(names.expert)).same_as(on)
    assert client.state() == before


def test_no_errors_in_the_log(host: Host, client: Client, names: Names) -> None:
    before = len(host.log)  # other tests make the host report errors
    reload_ui(client, host)
    client.draw(expert(names.expert, freeu="Custom", freeu_b3=1.2, skipping="Forecast"))
    client.draw()
    lines = [line for line in host.log[before:].splitlines() if "Error" in line or "Traceback" in line]
    assert lines == []


def test_a_webui_that_dies_is_replaced(host: Host, client: Client, names: Names) -> None:
    """The test in which it dies says so, with the end of its log; the next ones find a new one."""
    on = client.draw(expert(names.expert))
    host.revive()  # nothing while it lives
    host.process.kill()
    host.process.wait()
    with pytest.raises(HostDiedError, match=r"a new one was started\):\n(.|\n)*Startup time"):
        host.revive()
    assert client.draw(expert(names.expert)).same_as(on)


def fusion_axes(client: Client) -> list[list[str]]:
    """The X/Y/Z plot's axes of ours in both tabs, each once and in its order."""
    plots = [script for script in client.ask("/sdapi/v1/script-info") if script["name"] == "x/y/z plot"]
    axes = [[label for label in plot["args"][0]["choices"] if "[Fusion]" in label] for plot in plots]
    assert axes[0] == axes[1]
    assert len(axes[0]) == len(set(axes[0])) > 0
    return axes


def press(client: Client, label: str) -> None:
    """Presses a button, as the browser does, with empty inputs."""
    config = client.ask("/config")
    ids = {c["id"] for c in config["components"] if c["type"] == "button" and c["props"].get("value") == label}
    number, inputs = next(
        (i, d["inputs"]) for i, d in enumerate(config["dependencies"])
        if any(t in ids for t in (x[0] if isinstance(x, list) else x for x in d["targets"]))
    )  # fmt: skip
    client.ask("/run/predict", {"fn_index": number, "data": [None] * len(inputs), "session_hash": "test"})


def reload_ui(client: Client, host: Host) -> None:
    config = client.ask("/config")
    number = next(i for i, d in enumerate(config["dependencies"]) if "restart_reload" in (d["js"] or ""))
    client.ask("/run/predict", {"fn_index": number, "data": [], "session_hash": "test"})
    host.wait()
