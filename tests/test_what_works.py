"""The README's table of what works where is the one whose ticks are tests."""

from __future__ import annotations

from pathlib import Path

from tests.webui_live.test_what_works import CHECKS
from tests.what_works import HOSTS, METHODS, table

ROOT = Path(__file__).parents[1]


def test_the_readme_has_the_table() -> None:
    assert table() in (ROOT / "README.md").read_text("utf-8")


def test_every_row_is_tested_in_its_host() -> None:
    assert tuple(CHECKS) == METHODS
    for folder in set(HOSTS.values()):
        assert "test_it_works" in (ROOT / folder / "test_what_works.py").read_text("utf-8")
