"""The documents: their links lead somewhere, and their commands and requests are ones that are accepted."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

from lib_fusion.cli import build_parser, main
from lib_fusion.requests.presets import Presets
from lib_fusion.requests.request import read_args
from lib_fusion.requests.settings import GENERATION_PARAMETERS, PARAMETERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "demo/README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words after ``python -m lib_fusion`` of each such command."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if " -m lib_fusion " in line:
                yield shlex.split(line, comments=True)[3:]


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        links = [(page, link) for page in new for link in re.findall(r"\]\(([^)\s#]+\.md)", page.read_text("utf-8"))]
        new = {(page.parent / link).resolve() for page, link in links if "://" not in link} - reached
    assert {page for page in PAGES if page not in reached} == set()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_have_the_flags_that_there_are(page: Path) -> None:
    for words in commands(page):
        with pytest.raises(SystemExit) if "--help" in words else nullcontext():
            build_parser().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_programs_are_there_and_have_the_flags_that_are_named(page: Path) -> None:
    """Of the measuring programs, ``python -m demo...`` and ``benchmarks...``."""
    for module, rest in re.findall(r"python -m ((?:demo|benchmarks)\.[\w.]+)([^`\n#]*)", page.read_text("utf-8")):
        file = ROOT / f"{module.replace('.', '/')}.py"
        assert file.is_file(), module
        flags = re.findall(r"--[a-z-]+", rest)
        known = file.read_text("utf-8") + " ".join(row.flag for row in [*PARAMETERS, *GENERATION_PARAMETERS])
        assert [flag for flag in flags if flag not in known] == [], module


def test_the_index_of_measurements_names_every_page_of_them() -> None:
    index = (ROOT / "docs/measurements/README.md").read_text("utf-8")
    pages = {page.name for page in (ROOT / "docs/measurements").iterdir()} - {"README.md"}
    assert {page for page in pages if page.endswith((".md", ".csv")) and f"({page}" not in index} == set()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_requests_are_read(page: Path) -> None:
    for block in blocks(page, "json"):
        body = json.loads(block)
        (fusion,) = body.get("args") or body["alwayson_scripts"]["Denoiser Fusion"]["args"]
        assert read_args([fusion], preset=Presets(Path("none")).get) is not None


def shell_requests(page: Path) -> list[str]:
    """The bodies that a page's ``fuse '...'`` sends."""
    return re.findall(r"^fuse '(.*?)'$", "\n".join(blocks(page, "sh")), re.DOTALL | re.MULTILINE)


def test_the_apis_page_asks_for_the_same_by_curl_and_by_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each method, and all of it is accepted."""
    sent = []

    def answer(request: urllib.request.Request) -> io.BytesIO:
        assert request.full_url == "http://127.0.0.1:7860/sdapi/v1/txt2img"
        sent.append(json.loads(request.data))
        return io.BytesIO(json.dumps({"images": [""], "info": json.dumps({"infotexts": ["told"]})}).encode())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/guide/api.md"
    with redirect_stdout(io.StringIO()) as printed:
        exec("\n".join(blocks(page, "python")), {})
    *by_python, last = sent
    assert by_python == [json.loads(body) for body in shell_requests(page)]
    assert len(by_python) >= 10
    assert (last["steps"], printed.getvalue()) == (20, "told\n")
    for body in sent:
        (fusion,) = body["alwayson_scripts"]["Denoiser Fusion"]["args"]
        assert read_args([fusion], preset=Presets(Path("none")).get) is not None
    methods = {body["alwayson_scripts"]["Denoiser Fusion"]["args"][0].get("method") for body in sent}
    assert methods == {None, "Average", "AFA"}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the documents' files are there: the demo's, and by the names that stand for a reader's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    for name, model in (("a", "animals"), ("b", "vehicles"), ("sd15", "animals")):
        shutil.copy(ROOT / f"demo/{model}.safetensors", f"{name}.safetensors")
        config = (ROOT / f"demo/{model}.yaml").read_text("utf-8")
        Path(f"{name}.yaml").write_text(re.sub(r"version: .*", f"version: {ROOT / 'demo/clip'}", config), "utf-8")
    (tmp_path / "pictures").mkdir()
    for file in ("fox-flat", "tractor-flat"):
        with Image.open(ROOT / f"demo/images/{file}.webp") as picture:
            picture.resize((64, 64)).save(tmp_path / f"pictures/{file}.png")
        (tmp_path / f"pictures/{file}.txt").write_text("a fox", "utf-8")
    return tmp_path


#: Flags that make a command short.
SHORT = {
    "generate": ["--steps", "1"], "gallery": ["--steps", "1"], "demo": ["--steps", "1"],
    "cache": ["--resolution", "64"], "evaluate": ["--timesteps", "500"],
    "train": ["--steps", "2", "--batch-size", "1", "--hidden", "8", "--layers", "1"],
}  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=lambda page: page.stem)
def test_every_command_runs(workplace: Path, page: Path) -> None:
    """From the repository's folder, as they are copied."""
    for words in commands(page):
        if "--help" in words or words == ["convert-afa"]:
            continue
        shown = words
        if words[0] in ("generate", "gallery") and "--out" not in words:
            words = [*words, "--out", "written"]
        assert main([*words, *SHORT[words[0]]]) == 0, shown
        if words[0] == "cache":
            shutil.copytree("cache", "held-out-cache", dirs_exist_ok=True)
    made = {"generate": "*/*.png", "gallery": "*/*/index.html", "cache": "*/index.json", "train": "*.safetensors"}
    assert all(list(workplace.glob(made[words[0]])) for words in commands(page) if words[0] in made)
