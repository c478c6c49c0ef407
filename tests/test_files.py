"""Files are written whole or not at all, also where another process holds them for a moment, as on Windows."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib_fusion import files
from lib_fusion.engine.sheets import save_png
from lib_fusion.fusion.aggregator_files import Card, ModelIdentity, read_card, save_aggregators
from lib_fusion.methods.afa import AggregatorSizes
from lib_fusion.requests.presets import Presets
from lib_fusion.training.cache import _save
from lib_fusion.training.jobs import Job, Jobs, write_json
from lib_fusion.webui.training.process import publish, run

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lib_fusion", "scripts", "demo", "benchmarks", "docs")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Each file is refused twice before it can be replaced, removed or read, as by Windows; what was tried."""
    tries: list[str] = []
    monkeypatch.setattr(files, "PAUSE", 0.0)
    for method in ("replace", "unlink", "read_text"):
        monkeypatch.setattr(Path, method, refuse_twice(getattr(Path, method), method, tries))
    return tries


def refuse_twice(original: Callable, method: str, tries: list[str]) -> Callable:
    def refusing(self: Path, *args: object, **kwargs: object) -> object:
        tries.append(f"{method} {self}")
        if tries.count(tries[-1]) <= 2:
            raise PermissionError(13, "[WinError 5] Access is denied", str(self))
        return original(self, *args, **kwargs)

    return refusing


def card() -> Card:
    sizes = AggregatorSizes(num_models=2, channels=(32,), context_dim=16, time_dim=16, hidden=8, layers=1, heads=2)
    return Card("sd1", "epsilon", sizes, (ModelIdentity("a", "1"), ModelIdentity("b", "2")))


def write_aggregators(path: Path) -> None:
    save_aggregators(path, card(), card().sizes.make().state_dict())


def read_json(path: Path) -> object:
    return json.loads(path.read_bytes())


#: Everything that writes a file which another process may have open, and how what it wrote is read.
WRITERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], object]] = {
    "a training's state": (lambda path: write_json(path, {"stage": "train"}), read_json, {"stage": "train"}),
    "presets": (lambda path: Presets(path).save("mine", {"k_expert": 2}), read_json, {"mine": {"k_expert": 2}}),
    "an aggregator file": (write_aggregators, lambda path: read_card(path).sizes, card().sizes),
    "a finished training": (lambda path: publish(Path(__file__), path), Path.read_bytes, Path(__file__).read_bytes()),
    "a picture": (lambda path: save_png(Image.new("RGB", (8, 8), "red"), path, ""), lambda path: Image.open(path).size,
                  (8, 8)),
    "a shard of a cache": (lambda path: _save({"x": torch.zeros(2)}, path, {}, 0), lambda path: path.stat().st_size > 0,
                           True),
}  # fmt: skip


@pytest.mark.parametrize("what", WRITERS)
def test_what_is_refused_for_a_moment_is_written(tmp_path: Path, refused: list[str], what: str) -> None:
    write, read, written = WRITERS[what]
    path = tmp_path / "file.safetensors"
    write(path)
    assert [name.split()[0] for name in refused].count("replace") == 3
    assert read(path) == written
    assert list(tmp_path.iterdir()) == [path]


def test_a_job_comes_to_its_end(tmp_path: Path, refused: list[str]) -> None:
    job = Job("a", {"steps": 1, "save_every": 1}, [], [], [], str(tmp_path / "a.safetensors"))
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / "job.json", {"job": vars(job)})
    assert run(tmp_path / "a") == 0
    assert Jobs(tmp_path).status("a").phase == "finished"


def test_what_stays_refused_is_an_error_and_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"stage": "train"})
    monkeypatch.setattr(files, "PAUSE", 0.0)

    def refuse(self: Path, target: object) -> None:
        raise PermissionError(13, "Access is denied", str(self))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        write_json(path, {"stage": "evaluate"})
    assert json.loads(path.read_text("utf-8")) == {"stage": "train"}
    assert list(tmp_path.iterdir()) == [path]


def calls(folders: tuple[str, ...] = FOLDERS) -> Iterator[tuple[str, ast.Call]]:
    """All calls of methods, with their places."""
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    yield f"{file.relative_to(ROOT).as_posix()}:{node.lineno}", node


def test_nothing_else_replaces_a_file() -> None:
    """A text's ``replace`` takes two arguments, a path's one."""
    found = [place for place, call in calls() if call.func.attr in ("rename", "renames", "move")
             or (call.func.attr == "replace" and len(call.args) == 1 and not call.keywords)]  # fmt: skip
    assert [place.split(":")[0] for place in found] == ["lib_fusion/files.py"]


def test_every_text_file_names_its_encoding() -> None:
    """Windows would take the system's own."""
    found = [place for place, call in calls((*FOLDERS, "tests/webui_live")) if takes_default_encoding(call)]
    assert found == []


def takes_default_encoding(call: ast.Call) -> bool:
    """``x.open("w")``, ``x.read_text()`` or ``x.write_text(text)``; another ``open`` has no mode as its first."""
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if call.func.attr == "open":
        mode = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
        return not call.args or (isinstance(mode, str) and set(mode) <= set("rwaxt+"))
    return len(call.args) == {"read_text": 0, "write_text": 1}.get(call.func.attr, -1)
