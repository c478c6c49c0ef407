"""A model as the command line takes it: a checkpoint, and LoRAs that are merged into it. Reads no file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lib_fusion.errors import SettingError

#: One of the files in FILE.safetensors+LORA.safetensors:WEIGHT+...
ONE_FILE = re.compile(r"(.+?\.safetensors)(?::([^+]*))?(?:\+|$)", re.IGNORECASE)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA and how much it counts; 1 is as it was trained."""

    path: Path
    weight: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.path.stem}:{self.weight:g}"


@dataclass(frozen=True)
class ModelFile:
    """A model: a checkpoint, and the LoRAs that are merged into it."""

    path: Path
    loras: tuple[LoraFile, ...] = ()

    @classmethod
    def of(cls, given: str | Path | ModelFile, field: str = "model") -> ModelFile:
        """Reads ``checkpoint.safetensors+lora.safetensors:0.8+...``; a path stays one, whatever is in its name.

        Raises SettingError, naming ``field``.
        """
        if isinstance(given, ModelFile):
            return given
        if isinstance(given, Path) or Path(given).is_file():
            return cls(Path(given))
        first, *loras = split_files(given, field) or [LoraFile(Path(given))]
        if first.weight != 1 or f"{first.path}:" in given:
            raise SettingError(field, given, "allowed: a weight for LoRAs only, which follow the checkpoint after a +")
        return cls(first.path, tuple(loras))

    @property
    def name(self) -> str:
        """For people: the files' names without folders, and the LoRAs' weights."""
        return " + ".join([self.path.stem, *(lora.name for lora in self.loras)])

    def __str__(self) -> str:
        """As ``of`` reads it."""
        return "+".join([str(self.path), *(f"{lora.path}:{lora.weight}" for lora in self.loras)])


def split_files(text: str, field: str) -> list[LoraFile]:
    """The files in ``a.safetensors:0.8+b.safetensors``, none in empty text; raises SettingError."""
    found, end = [], 0
    for match in ONE_FILE.finditer(text):
        if match.start() != end:
            break
        end = match.end()
        found.append(LoraFile(Path(match[1]), _read_weight(match[2], field)))
    if end < len(text) or text.endswith("+"):
        raise SettingError(field, text, "allowed: .safetensors files, each with :WEIGHT or without, + between them")
    return found


def _read_weight(text: str | None, field: str) -> float:
    try:
        weight = 1.0 if text is None else float(text)
    except ValueError:
        weight = float("nan")
    if not -100 <= weight <= 100:  # also no number
        raise SettingError(field, text, "allowed as a LoRA's weight: a number, -100 to 100")
    return weight
