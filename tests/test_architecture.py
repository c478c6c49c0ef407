"""The rules of the package's structure, read from its imports by docs/draw_architecture.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Lines of a function, with its docstring, in the rooms that explain the methods.
LONGEST = 40


def load_drawing() -> ModuleType:
    """docs is no package."""
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


drawing = load_drawing()


@pytest.fixture(scope="module")
def sources() -> list:
    return drawing.read_sources(ROOT)


def write(root: Path, files: dict[str, str]) -> list:
    """The sources of a small lib_fusion."""
    for name, text in files.items():
        path = root / "lib_fusion" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return drawing.read_sources(root)


def test_no_circles(sources: list) -> None:
    assert drawing.find_circles(drawing.rooms_of(sources), drawing.find_arrows(sources)) == []


def test_methods_import_no_other_room(sources: list) -> None:
    assert [pair for pair in drawing.find_arrows(sources) if pair[0] == "methods"] == []


def test_only_the_webui_imports_the_host(sources: list) -> None:
    assert drawing.find_host_imports(sources) == []
    assert any("modules" in source.imports or "modules.errors" in source.imports for source in sources)


def test_functions_are_short(sources: list) -> None:
    functions = [found for source in sources if source.room in ("fusion", "methods") for found in source.functions]
    assert len(functions) > 100
    assert [(lines, name) for lines, name in functions if lines > LONGEST] == []


def test_imports_that_count(tmp_path: Path) -> None:
    """Imports in functions do, those for type checkers do not."""
    lazy = "def f():\n    from lib_fusion.unet import model\n    return model\n"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lib_fusion.fusion import step\n"
    found = write(tmp_path, {"fusion/step.py": lazy, "unet/model.py": typed})
    assert drawing.find_arrows(found) == {("fusion", "unet"): 1}
    assert drawing.find_circles(drawing.rooms_of(found), drawing.find_arrows(found)) == []


def test_circles_are_found(tmp_path: Path) -> None:
    found = write(tmp_path, {"fusion/a.py": "from lib_fusion import previews\n",
                             "previews.py": "import lib_fusion.webui.panel.b\n",
                             "webui/panel/b.py": "from ...fusion.a import x\n",
                             "webui/script.py": "from lib_fusion.webui.panel import b\n"})  # fmt: skip
    rooms, arrows = drawing.rooms_of(found), drawing.find_arrows(found)
    assert rooms == ["fusion", "previews", "webui.panel", "webui.script"]
    assert drawing.find_circles(rooms, arrows) == [["fusion", "previews", "webui.panel"]]
    assert drawing.find_floors(rooms, arrows)["webui.script"] == 1


def test_host_imports_are_found(tmp_path: Path) -> None:
    lines = "def f():\n    import gradio as gr\n    from modules import shared\n"
    found = write(tmp_path, {"fusion/a.py": lines, "webui/b.py": lines})
    assert drawing.find_host_imports(found) == [
        "lib_fusion.fusion.a imports gradio", "lib_fusion.fusion.a imports modules.shared",
    ]  # fmt: skip
