"""Presets in their file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.settings import FusionSettings
from lib_fusion.webui.presets import SHIPPED, Presets


def test_shipped_presets_are_valid() -> None:
    for values in SHIPPED.values():
        FusionSettings.from_dict({key: value for key, value in values.items() if value is not None})


def test_save_apply_delete(tmp_path: Path) -> None:
    store = Presets(tmp_path / "presets.json")
    values = FusionSettings.from_dict({"experts": [{"checkpoint": "b"}], "k_expert": 3}).to_dict()
    store.save(" mine ", values)
    assert store.names() == [*SHIPPED, "mine"]
    assert Presets(store.path).get("mine") == values
    store.delete("mine")
    assert store.names() == list(SHIPPED)
    assert list(tmp_path.iterdir()) == [store.path]


def test_refused(tmp_path: Path) -> None:
    store = Presets(tmp_path / "presets.json")
    for name in ("", "  ", next(iter(SHIPPED))):
        with pytest.raises(SettingError):
            store.save(name, {})
    with pytest.raises(SettingError):
        store.save("mine", {"k_expert": -1})
    with pytest.raises(SettingError):
        store.delete(next(iter(SHIPPED)))
    with pytest.raises(SettingError):
        store.get("nothing")


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}'])
def test_broken_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "presets.json"
    path.write_text(text)
    with pytest.raises(FusionError, match=r"presets\.json"):
        Presets(path).names()
