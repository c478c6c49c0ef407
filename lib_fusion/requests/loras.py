"""LoRAs that an expert's own prompt names: ``<lora:NAME:TE:UNET:DYN>``, read by the WebUI's own rules. Host-free."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lib_fusion.errors import SettingError

ALLOWED = "allowed: <lora:NAME:WEIGHT>, or with te=, unet= (weights of text encoder and U-Net) and dyn= (a rank)"
#: The words that begin a LoRA; the second is the host's other name for the same.
KINDS = ("lora", "lyco")
#: The names of its arguments, in the order in which they may stand without names after the LoRA's own name.
ARGUMENTS = ("te", "unet", "dyn")
_TAG = re.compile(r"<(\w+):([^>]+)>")
#: How many names an error repeats.
SHOWN = 20


@dataclass(frozen=True)
class LoraTag:
    """One LoRA of a prompt: its name or alias, its weights for text encoder and U-Net, and the rank it is cut to."""

    name: str
    te: float = 1.0
    unet: float = 1.0
    dyn: int | None = None


def read_tags(text: str, field: str) -> tuple[str, tuple[LoraTag, ...]]:
    """A prompt without its LoRAs, and them in order; raises SettingError, which names ``field``.

    Refused are other things in angle brackets (hypernets), arguments that only other extensions know, and a LoRA that
    is named twice.
    """
    tags = tuple(_read_tag(found[0], found[1], found[2], field) for found in _TAG.finditer(text))
    names = [tag.name for tag in tags]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(field, f"<lora:{name}:..>", "allowed: each LoRA once")
    return _TAG.sub("", text), tags


def _read_tag(shown: str, kind: str, inside: str, field: str) -> LoraTag:
    if kind not in KINDS:
        raise SettingError(field, shown, f"<{kind}:..> can't act on one model alone; {ALLOWED}")
    name, *items = inside.split(":")
    named = dict(item.split("=") for item in items if item.count("=") == 1)
    unnamed = [item for item in items if item.count("=") != 1]
    if unknown := [key for key in named if key not in ARGUMENTS]:  # of another extension, as lbw=; it would do nothing
        raise SettingError(field, shown, f"{unknown[0]}= can't act on one model alone; {ALLOWED}")
    if "=" in name or not name.strip() or len(unnamed) > len(ARGUMENTS):
        raise SettingError(field, shown, ALLOWED)
    values = {**dict(zip(ARGUMENTS, unnamed)), **named}
    try:
        te = float(values.get("te", 1))
        unet = float(values.get("unet", te))
        dyn = int(values["dyn"]) if "dyn" in values else None
    except ValueError as error:
        raise SettingError(field, shown, ALLOWED) from error
    if not math.isfinite(te) or not math.isfinite(unet) or (dyn is not None and dyn < 1):
        raise SettingError(field, shown, ALLOWED)
    return LoraTag(name, te, unet, dyn)


def change_loras(prompt: str, loras: str) -> str:
    """A prompt with these LoRAs in the place of its own; raises SettingError as ``read_tags``."""
    plain, tags = read_tags(prompt, "prompt")
    return f"{plain.strip()} {loras}".strip() if tags or loras else prompt


def title_of(checkpoint: str, prompt: str) -> str:
    """An expert's name for people: its checkpoint, and the LoRAs that its prompt names."""
    names = [found[2].split(":")[0] for found in _TAG.finditer(prompt) if found[1] in KINDS]
    return " + ".join([checkpoint, *names])


def tell_near(name: str, names: Iterable[str]) -> str:
    """For an error about an unknown name: those that are written nearly like it, or else the first ones there are."""
    names = sorted(set(names))
    lower = {known.lower(): known for known in names}
    near = [lower[found] for found in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
    if near:
        return f"near it: {', '.join(near)}"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"there are: {', '.join(names[:SHOWN]) or 'none'}{more}"
