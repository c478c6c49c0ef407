"""Hashes of the experts' files in a picture's infotext, in the host's own forms, by which readers find the files.

LoRAs go into the host's entry *Lora hashes*, where sites and its own pasting look; a checkpoint's hash is what the host
writes as *Model hash*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from modules import hashes, sd_models, shared

from lib_fusion.requests.infotext import hash_key
from lib_fusion.requests.settings import SAME_AS_BASE, FusionSettings
from lib_fusion.webui.models import lora_files
from lib_fusion.webui.models.lora_files import host

#: The host's infotext entry.
LORA_HASHES = "Lora hashes"
#: Digits of a checkpoint's hash that the host writes.
DIGITS = 10


class WithOurs(str):
    """The host's entry with our hashes in it; ``before`` is what it was (None: not there)."""

    before: str | None


def add(params: dict[str, Any], settings: FusionSettings, names: list[str]) -> None:
    """Writes the hashes into infotext entries. ``names``: the experts' checkpoints, as the host names them.

    A file is read whole for its hash, once: the host keeps it. Its own settings and flags that leave hashes out count.
    """
    for i, name in enumerate(names):
        info = None if name == SAME_AS_BASE else sd_models.checkpoint_aliases.get(name)
        found = info and hashes.sha256(info.filename, f"checkpoint/{info.name}")
        if found:
            params[hash_key(i)] = found[:DIGITS]
    own = lora_files.hashes_of(settings.experts) if shared.opts.data.get("lora_add_hashes_to_infotext", True) else {}
    if not own:
        return
    before = remove(params)
    texts = [*(before or "").split(", "), *(f"{name}: {value}" for name, value in own.items())]
    params[LORA_HASHES] = WithOurs(", ".join(text for text in dict.fromkeys(texts) if text))
    params[LORA_HASHES].before = before


def remove(params: dict[str, Any]) -> str | None:
    """Takes our hashes out of the host's entry again, which cells of a plot share; what it was is returned."""
    found = params.get(LORA_HASHES)
    if not isinstance(found, WithOurs):
        return found
    del params[LORA_HASHES]
    if found.before is not None:
        params[LORA_HASHES] = found.before
    return found.before


def rename_loras(prompt: str, entries: Mapping[str, Any]) -> str:
    """An expert's prompt of a pasted infotext, with this host's names of the LoRAs whose files are called otherwise."""
    networks, told = host(), str(entries.get(LORA_HASHES) or "")
    if networks is None or not told:
        return prompt
    known = dict(part.strip().split(": ", 1) for part in told.split(",") if ": " in part)

    def rename(found: re.Match[str]) -> str:
        on_disk = networks.available_network_hash_lookup.get(known.get(found[2], "").strip())
        return found[0] if on_disk is None else f"<{found[1]}:{on_disk.get_alias()}{found[3]}"

    return re.sub(r"<(lora|lyco):([^:>]+)([:>])", rename, prompt)
