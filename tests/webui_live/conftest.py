"""One real WebUI for all live tests: started once on a free port, with a data directory of its own, and stopped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.webui_live.client import Client
from tests.webui_live.host import Host, copy_demo, fake_cuda, make_checkpoints, prepare_data
from tests.webui_live.needs import the_host
from tests.webui_live.pages import browser, page  # noqa: F401 (fixtures)

SETTINGS = {"samples_save": False, "grid_save": False, "do_not_show_images": False, "live_previews_enable": True,
            "show_progress_every_n_steps": 2, "lora_functional": False}  # fmt: skip
#: On the stand-in for a CUDA device, which has no random numbers and no memory-efficient kernels of its own.
ON_FAKE_CUDA = {"randn_source": "CPU", "cross_attention_optimization": "sdp - scaled dot product"}


@dataclass(frozen=True)
class Names:
    """Checkpoints by their part in the tests: the demo's where it is there, else tiny ones with random weights."""

    base: str
    expert: str
    other: str
    copy: str


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder, python = the_host()
    data = tmp_path_factory.mktemp("webui")
    demo = prepare_data(data, SETTINGS | (ON_FAKE_CUDA if fake_cuda() else {}))
    make_checkpoints(data, python, folder)
    if "general" in demo:
        copy_demo("general", data / "models/Stable-diffusion", "general_copy")
        touch_copy(data / "models/Stable-diffusion/general_copy.safetensors")
    probe = data / "extensions/fusion-probe/scripts"
    probe.mkdir(parents=True)
    for name in ("probe.py", "probe_faults.py"):
        shutil.copy(Path(__file__).with_name(name), probe)
    running = Host(data, "general" if "general" in demo else "tiny_a")
    yield running
    running.stop()
    shutil.rmtree(data / "models", ignore_errors=True)


def touch_copy(path: Path) -> None:
    """Makes a copy another file to the host, which tells files apart by name and hash: the metadata differs."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, {"title": "the same weights in another file"})


@pytest.fixture(scope="session")
def names(host: Host) -> Names:
    if (host.data / "models/Stable-diffusion/general.safetensors").is_file():
        return Names("general", "animals", "vehicles", "general_copy")
    return Names("tiny_a", "tiny_b", "tiny_c", "tiny_copy")


@pytest.fixture(scope="session")
def client(host: Host) -> Client:
    return Client(host.url)


@pytest.fixture(autouse=True)
def _nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every live test nothing of a pass is left on the model.

    A test in which the WebUI has died says so, once; the next ones get a new one.
    """
    if "client" not in request.fixturenames:
        yield
        return
    client, host = request.getfixturevalue("client"), request.getfixturevalue("host")
    yield
    host.revive()
    state, fusion, weights = client.state(), client.fusion(), client.ask("/probe/weights")
    assert state["hooks"] == 0
    assert state["replaced"] == []
    assert weights["worn"] == 0
    assert weights["unnamed"] == []
    assert not fusion["running"]
