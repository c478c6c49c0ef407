"""Reads the panel's values out of the infotext that the WebUI pastes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from lib_fusion.errors import FusionError
from lib_fusion.requests import infotext
from lib_fusion.requests.infotext import Field
from lib_fusion.requests.settings import SAME_AS_BASE
from lib_fusion.webui import options
from lib_fusion.webui.models import checkpoints, file_hashes


@dataclass(frozen=True)
class Paste:
    """Reads a control's value out of parsed infotext; None leaves it as it is. Without a field: the panel's switch.

    The host also pairs controls of two tabs by it (*Send to*), where it looks for equal ones.
    """

    field: Field | None = None
    part: int = 0

    def __call__(self, entries: dict[str, Any]) -> Any:
        if "lib_free_u" not in sys.modules:  # where that extension is there, it takes its entries itself
            entries = infotext.adopt_freeu(entries)
        if self.field is None:
            return infotext.is_fused(entries) if options.read_option("paste_switches") else None
        value = infotext.read_infotext(entries, self.field)
        if self.field.row.key == "prompt" and value:
            return file_hashes.rename_loras(value, entries)
        if self.field.row.key == "checkpoint" and value not in (None, SAME_AS_BASE, *infotext.NO_CHECKPOINT):
            return full_name(value)
        return value[self.part] if self.field.width == 2 and value is not None else value


def full_name(checkpoint: str) -> str:
    """The name in the panel's list of a checkpoint that is named in any way; a name that nothing has stays."""
    try:
        return checkpoints.find_checkpoint(checkpoint, "checkpoint").name
    except FusionError:
        return checkpoint
