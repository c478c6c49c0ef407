"""The server speaks the language of the WebUI's page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.webui_fake import fakes


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fakes.install(monkeypatch)


def test_the_page_s_language_is_read(options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From all files of that name, ours and others'; in some forks that is one path. Broken ones give none."""
    from lib_fusion.webui.words import translate

    ours, broken = tmp_path / "xx.json", tmp_path / "broken.json"
    ours.write_text('{"Saved: {0}": "Gespeichert: {0}", "list": [1]}', "utf-8")
    broken.write_text("{", "utf-8")
    languages = {"xx": [str(broken), str(ours)], "one": str(ours), "gone": [str(tmp_path / "no.json")]}
    monkeypatch.setattr(sys.modules["modules.localization"], "localizations", languages)
    assert translate("Saved: mine") == "Saved: mine"
    for chosen, told in (("xx", "Gespeichert: mine"), ("one", "Gespeichert: mine"), ("gone", "Saved: mine"),
                         ("None", "Saved: mine"), ("nothing", "Saved: mine")):  # fmt: skip
        options.localization = chosen
        assert translate("Saved: mine") == told
