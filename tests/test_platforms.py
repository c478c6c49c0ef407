"""What is promised for Windows in docs/platforms.md, as far as it can be shown elsewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = r".venv\Scripts\python"
#: Flags that make a documented command short.
SHORT = {"demo": ["--steps", "2"], "generate": ["--steps", "2"]}


def documented() -> list[list[str]]:
    """The words of the page's commands for Windows, as cmd.exe splits them."""
    text = (ROOT / "docs" / "platforms.md").read_text("utf-8")
    lines = "\n".join(re.findall(r"```bat\n(.*?)```", text, re.DOTALL)).splitlines()
    return [shlex.split(line.replace("\\", "\\\\")) for line in lines if line]


def run(words: list[str], **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, check=False)


def test_the_commands_for_windows(tmp_path: Path) -> None:
    """They need no make and no shell of Unix, and each but the installing ones runs."""
    commands = documented()
    assert commands[0] == ["py", "-m", "venv", ".venv"]
    assert {words[0] for words in commands[1:]} == {PYTHON}
    ran = []
    for words in (words[1:] for words in commands[1:]):
        if words[:2] == ["-m", "lib_fusion"]:
            out = ["--out", str(tmp_path / ("demo.png" if words[2] == "demo" else "pictures"))]
            done = run([*words, *SHORT[words[2]], *out])
            assert done.returncode == 0, done.stderr
            ran.append(words[2])
        elif words[:2] == ["-m", "pytest"]:
            assert run([*words, "tests/test_platforms.py", "--collect-only", "-q"]).returncode == 0
            ran.append("pytest")
        elif words[:3] != ["-m", "pip", "install"]:
            assert words in (["-m", "ruff", "check", "."], ["-m", "mypy"])
    assert ran == ["demo", "generate", "pytest"]
    assert (tmp_path / "demo.png").is_file()


def test_what_the_page_installs_is_what_make_installs() -> None:
    make = (ROOT / "Makefile").read_text("utf-8")
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for words in (words[4:] for words in documented() if words[1:4] == ["-m", "pip", "install"]):
        extras = re.fullmatch(r"-e \.\[(.*)\]", " ".join(words))
        if extras is None:
            assert " ".join(words) in make
            continue
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(","))


def test_a_console_without_a_names_letters(tmp_path: Path) -> None:
    """A code page of Windows, whose letters are not those of a file's name: the result is there, and is reported."""
    out = tmp_path / "\u732b"
    flags = ["--base", "demo/animals.safetensors", "--prompt", "a fox", "--steps", "1", "--width", "64"]
    done = run(["-m", "lib_fusion", "generate", *flags, "--out", str(out)], PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert rb"\u732b" in done.stdout
    assert len(list(out.iterdir())) == 1


def test_line_ends() -> None:
    """Every text file has LF, and a checkout on Windows keeps it."""
    listed = subprocess.run(["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git repository here")
    rows = [line.split(maxsplit=3) for line in listed.stdout.splitlines()]
    assert len(rows) > 300
    for stored, _, attribute, *rest in rows:
        assert stored in ("i/lf", "i/none", "i/-text"), rest
        assert stored == "i/-text" or "eol=lf" in f"{attribute} {rest}", rest
