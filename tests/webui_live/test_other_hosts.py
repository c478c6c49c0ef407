"""In a fork of the WebUI that cannot be worked in: one sentence in the panel, a refusal in the API, no traceback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.webui_live.client import Client, RefusedError
from tests.webui_live.host import Host, make_checkpoints, prepare_data
from tests.webui_live.needs import the_host


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Host]:
    """The WebUI with the package that all forks of the Forge family have, and no backend that we know."""
    folder, python = the_host()
    prepare_data(tmp_path)
    make_checkpoints(tmp_path, python, folder, "extensions")
    stub = tmp_path / "extensions/a-fork"
    for file, text in (("modules_forge/__init__.py", ""), ("scripts/fork.py", "import modules_forge  # noqa: F401\n")):
        (stub / file).parent.mkdir(parents=True)
        (stub / file).write_text(text, "utf-8")
    checkpoint = next((tmp_path / "models/Stable-diffusion").glob("*.safetensors")).stem
    running = Host(tmp_path, checkpoint)
    yield running
    running.stop()
    shutil.rmtree(tmp_path / "models")


def test_a_fork_shows_a_sentence_and_refuses_requests(fork: Host) -> None:
    client = Client(fork.url)
    shown = [c["props"] for c in client.ask("/config")["components"] if "props" in c]
    assert [p["label"] for p in shown if "Denoiser Fusion" in str(p.get("label"))] == [
        "Denoiser Fusion (unavailable in this WebUI)"
    ] * 2  # txt2img, img2img
    texts = [p["value"] for p in shown if "Denoiser Fusion" in str(p.get("value"))]
    assert len(texts) == 2
    assert all("This WebUI is another fork" in text for text in texts)
    with pytest.raises(RefusedError) as refused:
        client.draw({"freeu": "Auto"})
    assert refused.value.status == 422
    assert len(client.draw(steps=1).pixels) == 1
    assert fork.log.count("This WebUI is another fork") == 1
    assert "denoiser_fusion.py" not in fork.log  # no traceback
