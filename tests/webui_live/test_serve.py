"""What ``make webui`` prepares for a person."""

from __future__ import annotations

import json
from pathlib import Path

from lib_fusion.fusion.aggregator_files import read_card
from tests.training.conftest import DEMO
from tests.webui_live.host import Host
from tests.webui_live.serve import FIRST, prepare_demo

FOLDER = "models/denoiser-fusion"


def test_the_demo_is_prepared_once(tmp_path: Path) -> None:
    """Aggregators at their place, the first values in the page's file; what a person has changed there stays."""
    prepare_demo(tmp_path)
    copied, shipped = (sorted(folder.glob("afa-*.safetensors")) for folder in (tmp_path / FOLDER, DEMO))
    assert [read_card(file) for file in copied] == [read_card(file) for file in shipped] != []
    config = tmp_path / "ui-config.json"
    assert json.loads(config.read_text("utf-8")) == FIRST
    config.write_text("{}", "utf-8")
    prepare_demo(tmp_path)
    assert config.read_text("utf-8") == "{}"


def test_the_first_values_are_of_controls_that_the_host_has(host: Host) -> None:
    known = json.loads((host.data / "ui-config.json").read_text("utf-8"))
    assert {key: type(known.get(key)) for key in FIRST} == {key: type(value) for key, value in FIRST.items()} | {
        "txt2img/CFG Scale/value": float
    }
