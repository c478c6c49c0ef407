"""The WebUI on the stand-in for a CUDA device, in half precision as people have it, and in other ways.

``FUSION_FAKE_CUDA=half python -m pytest tests/webui_live`` runs the live tests on it as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import fake_cuda
from tests.webui_live.client import Client
from tests.webui_live.conftest import ON_FAKE_CUDA, SETTINGS
from tests.webui_live.host import REPOSITORY, Host, make_checkpoints, prepare_data
from tests.webui_live.needs import the_host

#: Starts a WebUI on a kind of device (a key of ``host.ON_FAKE_CUDA``, or empty for the CPU) for as long as it is used.
Start = Callable[[str], "contextmanager[Client]"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data directory that the WebUIs of all kinds share, one after another."""
    folder, python = the_host()
    if sentence := fake_cuda.obstacle():
        pytest.skip(sentence)
    data = tmp_path_factory.mktemp("device")
    if "general" not in prepare_data(data, SETTINGS | ON_FAKE_CUDA | {"live_previews_enable": False}):
        pytest.skip("the demo's checkpoints are not there")
    make_checkpoints(data, python, folder)
    aggregators = data / "models/denoiser-fusion"
    aggregators.mkdir(parents=True)
    for file in (REPOSITORY / "demo").glob("afa-*.safetensors"):
        shutil.copy(file, aggregators)
    for file in (REPOSITORY / "demo/loras").glob("*.safetensors"):
        shutil.copy(file, data / "models/Lora")
    yield data
    shutil.rmtree(data / "models", ignore_errors=True)


@pytest.fixture(scope="session")
def start(data: Path) -> Start:
    @contextmanager
    def run(kind: str) -> Iterator[Client]:
        probes = data / "extensions/fusion-probe/scripts"
        shutil.rmtree(probes, ignore_errors=True)
        probes.mkdir(parents=True)
        live, here = (REPOSITORY / "tests" / folder for folder in ("webui_live", "webui_device"))
        for file in (live / "probe.py", live / "probe_faults.py", *([here / "probe_device.py"] if kind else [])):
            shutil.copy(file, probes)
        running = Host(data, "animals", device=kind)
        try:
            yield Client(running.url)
        finally:
            running.stop()

    return run


@pytest.fixture(scope="module")
def half(start: Start) -> Iterator[Client]:
    with start("half") as client:
        client.draw(steps=1)
        told = client.ask("/device/dtypes")
        assert told == {"device": "cuda", "unet": ["float16"], "cuda": "Fake GPU"}
        yield client
