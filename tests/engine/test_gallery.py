"""``python -m lib_fusion gallery``: one page with everything in it; it resumes, and refuses mistakes before drawing."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from lib_fusion.cli import main
from lib_fusion.engine.generate import Engine

DEMO = Path(__file__).resolve().parents[2] / "demo"
ANIMALS, VEHICLES = (str(DEMO / f"{name}.safetensors") for name in ("animals", "vehicles"))
PAPER = "As published (MagicFusion): a mask at every step"
SMALL = ["--width", "64", "--height", "64", "--steps", "2"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("# two prompts\na fox\n\na <b>bus</b> & \"more\"\n", "utf-8")
    return file


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The (prompt, seed) of every picture that the engine draws."""
    calls: list[tuple[str, int]] = []
    generate = Engine.generate

    def count(self, generation, *args, **kwargs):
        result = generate(self, generation, *args, **kwargs)
        calls.append((generation.prompts[0], generation.seed))
        return result

    monkeypatch.setattr(Engine, "generate", count)
    return calls


def run(prompts: Path, *flags: str) -> int:
    return main(["gallery", "--base", ANIMALS, "--expert", VEHICLES, "--prompts", str(prompts),
                 "--out", str(prompts.parent / "out"), *SMALL, *flags])  # fmt: skip


def page(prompts: Path) -> str:
    return (prompts.parent / "out/index.html").read_text("utf-8")


def test_the_page_has_every_picture_and_needs_no_other_file(prompts, drawn, capsys):
    assert run(prompts, "--preset", PAPER) == 0
    assert len(drawn) == 2 * 4
    text = page(prompts)
    assert re.findall(r"<figcaption>(.*?)<small>", text) == 2 * [
        "animals alone", "vehicles alone", "fused", PAPER, "who drew where"]  # fmt: skip
    sources = re.findall(r'<img src="(.*?)"', text)
    images = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    assert [image.size for image in images] == 10 * [(64, 64)]
    assert "http" not in text
    assert "not drawn yet" not in text
    assert "&lt;b&gt;bus&lt;/b&gt; &amp;" in text
    assert "<b>" not in text
    assert "CFG 7" in text
    printed = capsys.readouterr()
    assert printed.out.strip().endswith("index.html")
    assert "8 of 8" in printed.err


def test_a_picture_alone_is_that_of_generate(prompts, drawn, tmp_path):
    """And its infotext is what generate writes."""
    assert run(prompts) == 0
    assert main(["generate", "--base", VEHICLES, "--prompt", "a fox", "--out", str(tmp_path / "one"), *SMALL]) == 0
    with Image.open(next((tmp_path / "one").glob("*.png"))) as png:
        webp = io.BytesIO()
        png.save(webp, format="WEBP", quality=92)
    assert base64.b64encode(webp.getvalue()).decode() in page(prompts)


def test_it_resumes_and_adds_only_what_is_missing(prompts, drawn, monkeypatch, capsys):
    count = Engine.generate

    def stop(self, *args, **kwargs):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return count(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", stop)
        assert run(prompts) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert len(drawn) == 4
    assert page(prompts).count("not drawn yet") == 3  # the page is as of the last whole row
    assert run(prompts) == 0
    assert len(drawn) == len(set(drawn)) * 3 == 6
    assert run(prompts) == 0
    assert len(drawn) == 6
    assert run(prompts, "--count", "2") == 0
    assert drawn[6:] == [("a fox", 1)] * 3 + [('a <b>bus</b> & "more"', 1)] * 3
    drawn.clear()
    assert run(prompts, "--snb-hold", "500") == 0
    assert [prompt for prompt, _ in drawn] == ["a fox", 'a <b>bus</b> & "more"']


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        (None, [], ["prompts", "text file"]),
        ("# nothing\n", [], ["prompts", "at least one prompt"]),
        (b"\xff\xfea", [], ["prompts", "UTF-8"]),
        ("a fox", ["--preset", "nothing"], ["preset", "allowed: ", "Defaults"]),
        ("a fox", ["--preset", "AFA without coarse parts: average first"], ["afa_aggregator"]),
        ("a fox", ["--expert", "nowhere.safetensors"], ["nowhere.safetensors", "no such file"]),
        ("a fox", ["--snb-hold", "-5"], ["snb_hold", "at least 0"]),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(prompts, drawn, capsys, text, flags, words):
    if text is None:
        prompts.unlink()
    else:
        prompts.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run(prompts, *flags) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert all(word in error for word in words)
    assert drawn == []
    assert not (prompts.parent / "out").exists()


def test_without_an_expert(prompts, capsys):
    assert main(["gallery", "--base", ANIMALS, "--prompts", str(prompts)]) == 2
    assert "expert" in capsys.readouterr().err
