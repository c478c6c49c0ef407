"""Presets in their file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.requests.presets import EARLIER_NAMES, SHIPPED, Presets
from lib_fusion.requests.settings import FusionSettings


def test_shipped_presets_are_valid() -> None:
    for values in SHIPPED.values():
        FusionSettings.from_dict({key: value for key, value in values.items() if value is not None})


def test_earlier_names_are_read(tmp_path: Path) -> None:
    """Requests and plots may give them; a person's own preset of such a name goes before."""
    store = Presets(tmp_path / "presets.json")
    for before, now in EARLIER_NAMES.items():
        assert store.get(before) == store.get(now)
    store.save("Average first, then AFA", {"k_expert": 3})
    assert store.get("Average first, then AFA") == {"k_expert": 3}


def test_names_of_presets_can_be_listed_in_a_plot() -> None:
    """A plot's values are text between commas."""
    assert not any("," in name for name in SHIPPED)


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


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..\\x", "a/b", "x\ny", "con", ".", "*", "\u202e", "é" * 200])
def test_a_name_is_a_name_and_no_path(tmp_path: Path, name: str) -> None:
    store = Presets(tmp_path / "data" / "presets.json")
    store.path.parent.mkdir()
    store.save(name, {"k_expert": 2})
    assert store.get(name) == {"k_expert": 2}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [store.path]


@pytest.mark.parametrize("name", ["x" * 201, "\ud800", None])
def test_names_that_are_refused(tmp_path: Path, name: str | None) -> None:
    store = Presets(tmp_path / "presets.json")
    with pytest.raises(FusionError):
        store.save(name, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", '{"a": 7}', "[" * 100_000, '{"a":' * 5000, "\0", "9" * 5000, '{"a": {"k_expert": NaN}}',
    '{"a": {"experts": 7}}', '{"a": {"experts": [{"checkpoint": []}]}}', '{"a": {"snb_window": {}}}', '{"a": {"b": 1}}',
])  # fmt: skip
def test_a_broken_file_is_told_of_and_kept(tmp_path: Path, text: str) -> None:
    store = Presets(tmp_path / "presets.json")
    store.path.write_text(text, "utf-8")
    with pytest.raises(FusionError) as caught:
        store.get("a")
    assert str(caught.value).isprintable()
    if "{" not in text or "a" not in text or text.startswith('{"a":{'):
        for act in (lambda: store.save("mine", {}), lambda: store.delete("a")):
            with pytest.raises(FusionError):
                act()
    assert store.path.read_text("utf-8") == text


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    store = Presets(tmp_path / "presets.json")
    store.path.write_bytes(b"\xff\xfe")
    with pytest.raises(FusionError, match="can't be read"):
        store.names()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    store = Presets(tmp_path / "presets.json")
    store.save("mine", {"k_expert": 2})
    Path(f"{store.path}.partial").symlink_to("/dev/full")
    with pytest.raises(FusionError, match=r"can't be written .*No space left"):
        store.save("another", {})
    assert store.names() == [*SHIPPED, "mine"]
    assert list(tmp_path.iterdir()) == [store.path]


def test_a_read_only_file_is_respected(tmp_path: Path) -> None:
    store = Presets(tmp_path / "presets.json")
    store.save("mine", {"k_expert": 2})
    store.path.chmod(0o444)
    with pytest.raises(FusionError, match="read-only"):
        store.delete("mine")
    assert store.get("mine") == {"k_expert": 2}


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="can't be written"):
        Presets(tmp_path / "gone" / "presets.json").save("mine", {})
