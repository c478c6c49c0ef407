"""LoRAs that prompts name, looked up in the list of the host's own extension."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from lib_fusion.errors import SettingError
from lib_fusion.files import file_version
from lib_fusion.requests.loras import LoraTag, read_tags, tell_near
from lib_fusion.requests.settings import ExpertSettings


def host() -> Any:
    """The host's LoRA extension, or None where it is switched off."""
    networks = sys.modules.get("networks")
    return networks if hasattr(networks, "loaded_networks") and hasattr(networks, "available_network_aliases") else None


@dataclass(frozen=True)
class LoraCall(LoraTag):
    """A LoRA as it is to act. ``changed``: the file's version, since another may have the same name."""

    file: str = ""
    changed: tuple[int, int] = (0, 0)


def list_loras() -> list[str]:
    """Names for a list."""
    return [] if host() is None else sorted(host().available_networks, key=str.lower)


def refresh_loras() -> None:
    """Looks into the folder again."""
    if host() is not None:
        host().list_available_networks()


def find_loras(text: str, field: str) -> tuple[str, tuple[LoraCall, ...]]:
    """An expert's prompt without its LoRAs, and them as the host has them in its list; raises SettingError."""
    plain, tags = read_tags(text, field)
    if tags and host() is None:
        raise SettingError(field, f"<lora:{tags[0].name}:..>", "the WebUI's own extension Lora is switched off")
    return plain, tuple(LoraCall(*astuple(tag), *file_of(find(tag.name, field))) for tag in tags)


def find(name: str, field: str) -> Any:
    """The host's entry of a name or alias, by its own rule; raises SettingError with the names that are near it.

    Where there is none it looks into the folder again, as the host does.
    """
    networks = host()
    for refresh in (lambda: None, lambda: networks.update_available_networks_by_names([name])):
        refresh()
        forbidden = name.lower() in networks.forbidden_network_aliases
        known = networks.available_networks if forbidden else networks.available_network_aliases
        if name in known:
            break
    else:
        raise SettingError(field, f"<lora:{name}:..>", f"no such LoRA; {tell_near(name, networks.available_networks)}")
    if not known[name].filename.endswith(".safetensors"):
        raise SettingError(field, f"<lora:{name}:..>", "allowed: .safetensors files")
    return known[name]


def hashes_of(experts: Iterable[ExpertSettings]) -> dict[str, str]:
    """Names in the experts' prompts -> hashes of their files, as the host writes both into infotexts."""
    networks, found = host(), {}
    for i, expert in enumerate(experts):
        for call in find_loras(expert.prompt, f"experts[{i}].prompt")[1]:
            on_disk = find(call.name, f"experts[{i}].prompt")
            on_disk.read_hash()
            if on_disk.shorthash:
                found[call.name.translate(networks.extra_network_lora.remove_symbols)] = on_disk.shorthash
    return found


def file_of(on_disk: Any) -> tuple[str, tuple[int, int]]:
    path = Path(on_disk.filename)
    return str(path), file_version(path) if path.is_file() else (0, 0)
