"""What goes with a release: one version, the WebUI's metadata, the entry of the index, and the size of a clone."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from lib_fusion import __version__

ROOT = Path(__file__).resolve().parents[1]
NAME = "sd-webui-denoiser-fusion"
#: The tags of the index (AUTOMATIC1111/stable-diffusion-webui-extensions, tags.json, May 2026).
TAGS = {"script", "localization", "tab", "dropdown", "ads", "installed", "training", "models", "UI related",
        "prompting", "editing", "manipulations", "online", "animation", "query", "science", "extras"}  # fmt: skip
#: Bytes of the tracked files by folder, in MB. *Install from URL* downloads these, and the history without its files.
BUDGET = {"demo": 26.6, "docs": 8.0, "lib_fusion": 1.2, "tests": 1.3, "benchmarks": 0.2, "localizations": 0.25}
REST = 0.2
#: git's names of the demo's weights. Every new version of one stays in the history for good: 23 MB if all are new.
WEIGHTS = {
    "demo/afa-animals-vehicles-food.safetensors": "4026e49ff1a5c6a948adf87d523c13b06162c4c5",
    "demo/afa-animals-vehicles.safetensors": "c808afaabd0a21de4e4d9493c35d265a2b0b35c5",
    "demo/animals.safetensors": "21b4071727e9c522a8db6330b9303e84d481f10a",
    "demo/food.safetensors": "b2e03cfe373922c2ded214be87e1e31a1f1721d5",
    "demo/general.safetensors": "3edff2c8d33c93b38780653d41f8b11ac791e026",
    "demo/loras/demo-animals.safetensors": "1cdbf24aa430b90c9df59062e03fe66db74cde04",
    "demo/loras/demo-vehicles.safetensors": "4470381c4395d256d559c51f37fd462559823a2a",
    "demo/vehicles.safetensors": "626a8ac901e687790c95323400906db3bf40ded2",
}


def read(file: str) -> str:
    return (ROOT / file).read_text("utf-8")


def test_one_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    project = read("pyproject.toml")
    assert 'dynamic = ["version"]' in project
    assert 'version = { attr = "lib_fusion.__version__" }' in project
    assert not re.search(r'^version = "', project, re.MULTILINE)
    assert f"\nversion: {__version__}\n" in read("CITATION.cff")


def test_the_changelog_begins_with_the_version_and_its_date() -> None:
    first = re.search(r"^## (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    version, date = first[1].split(", ")
    assert version == __version__
    assert f"\ndate-released: {date}\n" in read("CITATION.cff")


def test_the_webuis_metadata() -> None:
    """As the WebUI reads it: a name, which is the folder's, and only sections that it knows."""
    config = configparser.ConfigParser()
    config.read_string(read("metadata.ini"))
    assert config.get("Extension", "Name") == NAME
    assert set(config["Extension"]) <= {"name", "requires"}
    assert all(section == "Extension" or section.startswith((f"callbacks/{NAME}", "scripts/"))
               for section in config.sections())  # fmt: skip


def test_the_entry_for_the_index() -> None:
    """By the rules of the index's own check, and its README."""
    entry = json.loads(read(f".github/extension-index/{NAME}.json"))
    assert set(entry) == {"name", "url", "description", "tags"}
    assert re.fullmatch(rf"https://github\.com/[\w-]+/{NAME}\.git", entry["url"])
    assert entry["tags"]
    assert set(entry["tags"]) <= TAGS - {"installed", "localization"}
    assert len(set(entry["tags"])) == len(entry["tags"])
    assert 50 < len(entry["description"]) < 300
    assert entry["description"].isascii()


def test_issues_ask_for_the_consoles_line() -> None:
    """With an example that looks as the line does."""
    template = read(".github/ISSUE_TEMPLATE/bug.yml")
    assert f'placeholder: "Denoiser Fusion {__version__} (commit ' in template
    first = template.split("  - type: ")[1]
    assert "required: true" in first


@pytest.fixture(scope="module")
def tracked() -> list[tuple[str, str, int]]:
    """(path, git's name, bytes) of every file of the last commit."""
    words = ["git", "ls-tree", "-r", "-l", "-z", "HEAD"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git repository here")
    rows = (line.split("\t") for line in done.stdout.split("\0") if line)
    return [(path, about.split()[2], int(about.split()[3])) for about, path in rows]


def test_the_size_of_a_clone(tracked: list[tuple[str, str, int]]) -> None:
    sizes: Counter[str] = Counter()
    for path, _, size in tracked:
        folder = path.split("/")[0]
        sizes[folder if folder in BUDGET else "rest"] += size
    assert {folder: size / 1e6 for folder, size in sizes.items() if size / 1e6 > BUDGET.get(folder, REST)} == {}


def test_weights_are_not_committed_again(tracked: list[tuple[str, str, int]]) -> None:
    assert {path: blob for path, blob, _ in tracked if path.endswith((".safetensors", ".pt", ".ckpt"))} == WEIGHTS
