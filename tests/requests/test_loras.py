"""LoRAs in an expert's prompt: which are read, and which are refused by name."""

from __future__ import annotations

import pytest

from lib_fusion.errors import SettingError
from lib_fusion.requests.loras import LoraTag, change_loras, read_tags, tell_near, title_of

FIELD = "experts[0].prompt"


@pytest.mark.parametrize(
    ("inside", "tag"),
    [
        ("x", LoraTag("x")),
        ("x:0.8", LoraTag("x", 0.8, 0.8)),
        ("x:0.8:0.5", LoraTag("x", 0.8, 0.5)),
        ("x:0.8:0.5:16", LoraTag("x", 0.8, 0.5, 16)),
        ("x:-1", LoraTag("x", -1, -1)),
        ("x:te=0.2", LoraTag("x", 0.2, 0.2)),
        ("x:unet=0.2", LoraTag("x", 1, 0.2)),
        ("x:0.7:unet=0.2:dyn=4", LoraTag("x", 0.7, 0.2, 4)),
        ("x:0.7:0.6:te=0.1", LoraTag("x", 0.1, 0.6)),
        ("a name, v1.5 (2)", LoraTag("a name, v1.5 (2)")),
    ],
)
def test_weights_by_place_and_by_name(inside: str, tag: LoraTag) -> None:
    assert read_tags(f"<lora:{inside}>", FIELD) == ("", (tag,))


def test_the_words_around_stay() -> None:
    plain, tags = read_tags("a cat <lora:x:1>, red<lyco:y:0.5>\nBREAK (hat:1.2) < 3", FIELD)
    assert plain == "a cat , red\nBREAK (hat:1.2) < 3"
    assert [tag.name for tag in tags] == ["x", "y"]
    assert read_tags("a cat", FIELD) == ("a cat", ())


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("<hypernet:x:1>", "<hypernet:..> can't act on one model alone"),
        ("<lora:x:1:lbw=ALL>", "lbw= can't act on one model alone"),
        ("<lora:x:one>", "allowed: <lora:NAME:WEIGHT>"),
        ("<lora:x:inf>", "allowed: <lora:NAME:WEIGHT>"),
        ("<lora:x:nan>", "allowed: <lora:NAME:WEIGHT>"),
        ("<lora:x:unet=>", "allowed: <lora:NAME:WEIGHT>"),
        ("<lora:x:1:1:0>", "allowed: <lora:NAME:WEIGHT>"),
        ("<lora:x:1:1:1.5>", "allowed: <lora:NAME:WEIGHT>"),
        ("<lora:x:1:1:4:1>", "allowed: <lora:NAME:WEIGHT>"),
        ("<lora:te=1>", "allowed: <lora:NAME:WEIGHT>"),
        ("<lora: :1>", "allowed: <lora:NAME:WEIGHT>"),
        ("<lora:x:1> a <lora:x:0.5>", "allowed: each LoRA once"),
    ],
)
def test_refused_by_name(prompt: str, problem: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_tags(prompt, FIELD)
    assert caught.value.field == FIELD
    assert problem in str(caught.value)
    assert str(caught.value.value) in prompt or "..>" in str(caught.value.value)


def test_near_names() -> None:
    names = ["Pixel_Art_v2", "pixel_art", "watercolour", *(f"style{i:02}" for i in range(30))]
    assert tell_near("pixelart", names).startswith("near it: ")
    assert {"pixel_art", "Pixel_Art_v2"} <= set(tell_near("pixelart", names)[9:].split(", "))
    assert tell_near("zzz", names[3:]) == f"there are: {', '.join(sorted(names[3:])[:20])} and 10 more"
    assert tell_near("zzz", []) == "there are: none"


def test_names_for_people() -> None:
    assert title_of("base", "a cat <lora:x:1> <lyco:y>") == "base + x + y"
    assert title_of("animals", "a <b:c> cat") == "animals"


def test_loras_take_the_place_of_others() -> None:
    assert change_loras("a cat, in a hat <lora:x:1>", "<lora:y:0.5>") == "a cat, in a hat <lora:y:0.5>"
    assert change_loras("<lora:x:1> a cat", "") == "a cat"
    assert change_loras("", "<lora:y:0.5>") == "<lora:y:0.5>"
    assert change_loras(" as it was ", "") == " as it was "
