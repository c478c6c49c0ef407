"""Every word of the panel has its translation."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib_fusion.errors import SettingError
from lib_fusion.requests.infotext import list_fields
from lib_fusion.requests.presets import SHIPPED
from lib_fusion.requests.refusals import REMEDIES, by_labels, controls, in_panels_words
from lib_fusion.requests.settings import HOST_OPTIONS, MAP_PARAMETERS, PREVIEW_PARAMETERS, UNUSED_ROWS
from lib_fusion.requests.translation import Translation
from lib_fusion.training.jobs import Status
from lib_fusion.training.options import CACHE_PARAMETERS, TRAINING_PARAMETERS
from lib_fusion.training.view import STAGES, sentence
from tests.messages import OF_REQUESTS, calls_of, errors_of

ROOT = Path(__file__).parents[1]
#: Names that stay as they are in every language.
NAMES = {"SNB", "SD1.4", "SD1.5", "SD2.1", "SDXL", "1", "2"}


FILES = sorted((ROOT / "localizations").glob("*.json"))
PLACE = re.compile(r"\{\d\}")
#: Errors of files that only the command line and the training process read, in English like their logs.
IN_ENGLISH = ("unet/lora.py", "unet/model.py", "unet/model_file.py", "webui/training/host_encoders.py")
#: What only a program can get wrong, and what an aggregator's conversion on the command line says.
OF_PROGRAMS = {
    "allowed: a list of objects", "allowed: an object with a checkpoint", "allowed: an object of settings",
    "allowed: one object of settings", "allowed: at least one text",
    "{0}: aggregators for {1} models, {2} checkpoints were given", "nothing is named {0}",
    "{0}: not aggregators as the official code saves them (see {1})", "denoiser-fusion", "denoiser-fusion-masks",
    "{0}: no file, and no folder with aggregator_0, aggregator_1 and so on",
    "not aggregators as the official code saves them (nothing is named {0})",
}  # fmt: skip


def words_of_files(folder: str) -> set[str]:
    """Literal labels of tabs, accordions, buttons and controls, as a folder's files have them."""
    return set().union(*(words_of_file(file) for file in (ROOT / "lib_fusion/webui" / folder).glob("*.py")))


def words_of_file(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8"))
    words = {text for node in tree.body if isinstance(node, ast.Assign) for text in lines_of(node)}
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if called in ("Tab", "Accordion", "Button"):
            words |= {arg.value for arg in call.args[:1] if isinstance(arg, ast.Constant)}
        shown = [k.value for k in call.keywords if k.arg in ("label", "tooltip", "info", "placeholder")]
        words |= {value.value for value in shown if isinstance(value, ast.Constant)}
    return words - {""}


def lines_of(node: ast.Assign) -> Iterator[str]:
    """The lines, hints and words that a file shows by these names."""
    name = getattr(node.targets[0], "id", "")
    if name.endswith(("TOLD", "HINT", "WORDS", "PLACE_BUTTONS")):
        value = ast.literal_eval(ast.unparse(node.value).replace("AUTO", "''").replace("PAINTED", "''"))
        yield from [value] if isinstance(value, str) else value.keys() if "BUTTONS" in name else value.values()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_label_is_translated(file: Path) -> None:
    told = json.loads(file.read_text("utf-8"))
    labels = {label for field in list_fields() for label in field.labels}
    choices = {choice for field in list_fields() for choice in field.row.choices if choice != "Mask"}
    labels |= {row.label for row in (*PREVIEW_PARAMETERS, *MAP_PARAMETERS)}
    hints = {field.row.help for field in list_fields()} | {row.help for row in MAP_PARAMETERS}
    missing = (labels | choices | hints | set(SHIPPED) | words_of_files("panel")) - set(told) - NAMES
    assert not missing
    assert all(isinstance(text, str) and text.strip() for text in told.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_label_of_the_training_tab_is_translated(file: Path) -> None:
    from lib_fusion.training.options import label_of

    labels = {label_of(row) for row in (*CACHE_PARAMETERS, *TRAINING_PARAMETERS)} | {"Fusion training"}
    hints = {row.help for row in (*CACHE_PARAMETERS, *TRAINING_PARAMETERS)}
    told = json.loads(file.read_text("utf-8"))
    assert not (labels | hints | words_of_files("training")) - set(told)


def test_nothing_is_translated_that_is_not_shown() -> None:
    """All languages have the same words, so that none keeps those of an earlier panel."""
    first, *others = [set(json.loads(file.read_text("utf-8"))) for file in FILES]
    assert all(words == first for words in others)


def messages_of_panel() -> set[str]:
    """The templates of all that the panel may tell: refusals in its words, and lines."""
    found = {f"Denoiser Fusion: {remedy}" for remedy in REMEDIES.values()}
    for message in errors_of(*OF_REQUESTS):
        if not message.where.startswith(IN_ENGLISH):
            last = 2 if message.kind == "SettingError" else 0
            found |= {text for argument in message.arguments[last : last + 1] for text in argument}
    rows = [*(field.row for field in list_fields()), *CACHE_PARAMETERS, *TRAINING_PARAMETERS]
    found |= {row.allowed for row in rows} | {reason for _, reason in UNUSED_ROWS.values()}
    for message in (*calls_of("webui", "translate", "in_words", "_tell"), *calls_of("training", "tell", "sentence")):
        if message.where.startswith(("webui/", "training/view.py")):
            found |= {text for argument in message.arguments for text in argument}
    return {by_labels(text, controls()) for text in found if PLACE.sub("", text).strip("; :()")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_message_is_translated(file: Path) -> None:
    """Whole, or each of the parts between semicolons; names and numbers stay where they belong."""
    translate = Translation(json.loads(file.read_text("utf-8")))

    def lacks(text: str) -> bool:
        filled = PLACE.sub(lambda place: f"<{place[0][1]}>", text)
        told = translate(filled)
        kept = all(name in told for name in re.findall(r"<\d>", filled))
        parts = filled.split("; ")
        whole = told != filled and len(told.split("; ")) < len(parts)
        return not kept or not (whole or all(translate(part) != part for part in parts if is_text(part)))

    def is_text(part: str) -> bool:
        return bool(re.sub(r"<\d>", "", part).strip(" :()"))

    messages = messages_of_panel()
    assert len(messages) > 150
    assert {text for text in messages - OF_PROGRAMS if lacks(text)} == set()
    for line in ("Press {} again to replace the preset {}.", "Press {} again to delete the preset {}.", "Saved: {}",
                 "Deleted: {}"):  # fmt: skip
        assert translate(line.format("x", "y")) != line.format("x", "y")
    for phase in ("running", "finished", "failed", "stopped", "lost"):
        for stage in STAGES:
            told = translate(sentence(Status("name", phase, stage, "E", 9, 4, [(3, 0.5, 1.0, 1.0)] * 2)))
            assert not re.search("[a-z]{3}", told.replace("name", "").replace("AFA", "")), told


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_templates_have_the_places_of_their_texts(file: Path) -> None:
    for text, told in json.loads(file.read_text("utf-8")).items():
        assert sorted(PLACE.findall(text)) == sorted(PLACE.findall(told)), text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_hints_of_the_settings_page_are_translated(file: Path) -> None:
    """The host shows them in parentheses."""
    assert {f"({row.help})" for row in HOST_OPTIONS.values()} <= set(json.loads(file.read_text("utf-8")))


def test_a_refusal_in_another_language() -> None:
    """Label, sentence and remedy; what a person has written stays, whatever is in it."""
    translate = Translation(json.loads((ROOT / "localizations/zh_CN.json").read_text("utf-8")))
    error = SettingError("snb_hold", "a; b: c", "allowed: a number at least 0 and at most 1000")
    told = translate(in_panels_words(error))
    assert told == "去噪融合，掩码确定到时间步：不允许 'a; b: c'；允许：0 到 1000 之间的数"  # noqa: RUF001
    assert translate("nothing that a file has: 5; (x)") == "nothing that a file has: 5; (x)"
    assert Translation({})("Saved: x") == "Saved: x"
