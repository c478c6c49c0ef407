"""What the documents say is done as they say it: their requests draw, from JSON, from curl and from Python."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

from tests.test_docs import PAGES, blocks, shell_requests
from tests.webui_live.client import Client
from tests.webui_live.conftest import Names
from tests.webui_live.host import REPOSITORY
from tests.webui_live.test_places import RIGHT

API = REPOSITORY / "docs/guide/api.md"
REQUESTS = [(page, block) for page in PAGES for block in [*blocks(page, "json"), *shell_requests(page)]]


def with_names(text: str, names: Names) -> str:
    """With checkpoints, LoRAs and a mask that are there in the place of the documents'."""
    for said, name in (("animals", names.expert), ("vehicles", names.other)):
        text = text.replace(f"{said}.safetensors", f"{name}.safetensors")
    for said, name in (("knight", "lora_lora"), ("dragon", "tiny_lora")):
        text = text.replace(f"<lora:{said}:", f"<lora:{name}:")
    return text.replace("iVBORw0KGgo...", RIGHT)


@pytest.mark.parametrize(("page", "block"), REQUESTS, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(REQUESTS)])
def test_a_request_draws_and_acts(client: Client, names: Names, page: Path, block: str) -> None:
    """The infotext says what ran, and the picture is not the base's."""
    body = json.loads(with_names(block, names))
    (fusion,) = body.get("args") or body["alwayson_scripts"]["Denoiser Fusion"]["args"]
    changes = {"steps": 30 if "skipping" in fusion else 10, "cfg_scale": 7, "prompt": body.get("prompt", "a cat")}
    model = "tiny_a" if "<lora:" in block else names.base
    drawn = client.draw(fusion, model=model, **changes)
    assert "Fusion U-Net calls" in drawn.infotexts[0]
    assert not drawn.same_as(client.draw(model=model, **changes)), block


def test_from_the_shell(client: Client, names: Names) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    """The function that the page defines, with its first request."""
    command = with_names("\n".join(blocks(API, "sh")[:2]), names).replace("http://127.0.0.1:7860", client.url)
    command = command.replace('{"prompt"', '{"width": 256, "height": 128, "steps": 10, "prompt"')
    answer = json.loads(subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout)
    assert "Fusion U-Net calls" in json.loads(answer["info"])["infotexts"][0]


def test_from_python(client: Client, names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_, last = blocks(API, "python")
    program = f"{first}\n{last}".replace("steps=20", "steps=10, width=256, height=128")
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(io.StringIO()) as printed:
        exec(with_names(program, names).replace("http://127.0.0.1:7860", client.url), {"__name__": "__main__"})
    assert "Fusion U-Net calls" in printed.getvalue()
    assert Image.open(tmp_path / "fused.png").size == (256, 128)
