"""Every word of the panel has its translation."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from lib_fusion.requests.infotext import list_fields
from lib_fusion.requests.presets import SHIPPED
from lib_fusion.requests.settings import MAP_PARAMETERS, PREVIEW_PARAMETERS

ROOT = Path(__file__).parents[1]
#: Names that stay as they are in every language.
NAMES = {"SNB", "SD1.4", "SD1.5", "SD2.1", "SDXL", "1", "2"}


def words_of_panel(name: str = "panel/panel.py") -> set[str]:
    """Literal labels of tabs, accordions, buttons and controls, and the settings page's, as the file has them."""
    words = set()
    for call in ast.walk(ast.parse((ROOT / "lib_fusion/webui" / name).read_text("utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if called in ("Tab", "Accordion", "Button"):
            words |= {arg.value for arg in call.args[:1] if isinstance(arg, ast.Constant)}
        if called == "OptionInfo":
            words |= {arg.value for arg in call.args[1:2] if isinstance(arg, ast.Constant)}
        shown = [k.value for k in call.keywords if k.arg in ("label", "tooltip", "info", "placeholder")]
        words |= {value.value for value in shown if isinstance(value, ast.Constant)}
    return words - {""}


@pytest.mark.parametrize("file", sorted((ROOT / "localizations").glob("*.json")), ids=lambda file: file.stem)
def test_every_label_is_translated(file: Path) -> None:
    told = json.loads(file.read_text("utf-8"))
    labels = {label for field in list_fields() for label in field.labels}
    choices = {choice for field in list_fields() for choice in field.row.choices if choice != "Mask"}
    labels |= {row.label for row in (*PREVIEW_PARAMETERS, *MAP_PARAMETERS)}
    hints = {field.row.help for field in list_fields()} | {row.help for row in MAP_PARAMETERS}
    missing = (labels | choices | hints | set(SHIPPED) | words_of_panel()) - set(told) - NAMES
    assert not missing
    assert all(isinstance(text, str) and text.strip() for text in told.values())


@pytest.mark.parametrize("file", sorted((ROOT / "localizations").glob("*.json")), ids=lambda file: file.stem)
def test_every_label_of_the_training_tab_is_translated(file: Path) -> None:
    from lib_fusion.training.options import CACHE_PARAMETERS, TRAINING_PARAMETERS, label_of

    labels = {label_of(row) for row in (*CACHE_PARAMETERS, *TRAINING_PARAMETERS)} | {"Fusion training"}
    hints = {row.help for row in (*CACHE_PARAMETERS, *TRAINING_PARAMETERS)}
    told = json.loads(file.read_text("utf-8"))
    assert not (labels | hints | words_of_panel("training/tab.py")) - set(told)


def test_nothing_is_translated_that_is_not_shown() -> None:
    """All languages have the same words, so that none keeps those of an earlier panel."""
    files = sorted((ROOT / "localizations").glob("*.json"))
    first, *others = [set(json.loads(file.read_text("utf-8"))) for file in files]
    assert all(words == first for words in others)
