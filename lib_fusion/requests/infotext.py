"""Settings as fields of the panel and as infotext, the text that pictures carry: written and read back. Host-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib_fusion.errors import SettingError
from lib_fusion.requests.parameters import Parameter
from lib_fusion.requests.settings import (
    EXPERT_PARAMETERS,
    FREEU_PARAMETERS,
    MAX_EXPERTS,
    PARAMETERS,
    FusionSettings,
)

#: The controls of a window, in order.
WINDOW_LABELS = ("starting timestep", "ending timestep")
#: The checkpoint of an expert that is not there.
NO_CHECKPOINT = ("", "None")
#: Entries that tell what was done, and are no settings; the last is in the API's answer only, not in pictures.
VERSION = "Fusion version"
NOTES = ["Fusion U-Net calls", "Fusion U-Net rows", "Fusion seconds", VERSION, "Fusion comment"]


def hash_key(expert: int) -> str:
    """The entry with the hash of an expert's checkpoint (0: the first)."""
    return f"Fusion expert {expert + 1} hash"


@dataclass(frozen=True)
class Field:
    """One control of the panel, one infotext entry: a row, and which expert's it is (None: the fusion's own)."""

    row: Parameter
    expert: int | None = None

    @property
    def infotext(self) -> str:
        """The entry's key, which pictures carry; labels may change, it does not."""
        return f"Fusion {self._of_expert(self.row.name)}"

    @property
    def label(self) -> str:
        """What people call it: the control's label, and the axis of a plot."""
        return capitalised(self._of_expert(self.row.label))

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of its controls, exact strings: ui-config, localisation and script-info go by them."""
        parts = WINDOW_LABELS if self.width == 2 else (self.row.label,)
        return tuple(capitalised(self._of_expert(part)) for part in parts)

    @property
    def earlier_label(self) -> str:
        """The label that the plot's axis had in earlier versions."""
        return capitalised(self._of_expert(self.row.name))

    @property
    def element(self) -> str:
        """The end of the control's element id."""
        return self.row.key if self.expert is None else f"expert{self.expert + 1}_{self.row.key}"

    @property
    def width(self) -> int:
        """How many controls it takes: a window has its start and its end."""
        return 2 if self.row.kind == "window" else 1

    def _of_expert(self, name: str) -> str:
        return name if self.expert is None else f"expert {self.expert + 1} {name}"


def capitalised(text: str) -> str:
    """With a capital first letter; the others stay as they are."""
    return text[:1].upper() + text[1:]


def list_fields() -> Iterator[Field]:
    """All fields in the panel's order, after its switch."""
    for expert in range(MAX_EXPERTS):
        yield from (Field(row, expert) for row in EXPERT_PARAMETERS)
    yield from (Field(row) for row in PARAMETERS if "panel" in row.where)


def panel_default(field: Field) -> Any:
    """A control's value as the panel opens; a list of checkpoints has a word for none."""
    return NO_CHECKPOINT[1] if field.row.key == "checkpoint" else field.row.default


def write_infotext(settings: FusionSettings, names: Sequence[str]) -> dict[str, str]:
    """Infotext entries: the experts' checkpoints (``names``), the method, and the other rows that took part.

    A row is left out where its value is the one that its absence means.
    """
    entries = {}
    for field in list_fields():
        if field.expert is None:
            value = getattr(settings, field.row.key)
        elif field.expert >= len(settings.experts):
            continue
        elif field.row.key == "checkpoint":
            value = names[field.expert]
        else:
            value = getattr(settings.experts[field.expert], field.row.key)
        if field.expert is None and not takes_part(field.row.key, settings):
            continue
        if value != unsaid(field.row, settings.skipping, bool(settings.experts)) or field.row.key == "method":
            entries[field.infotext] = _protect(field.row.show(value))
    return entries


def takes_part(key: str, settings: FusionSettings) -> bool:
    """Whether a row has any part in a picture with these settings."""
    s = settings
    if key in ("guidance_until", "guidance_after"):
        return s.lowers_guidance
    if key == "guidance":
        return bool(s.experts) or s.guidance == "always"
    if key in ("k_general", "k_expert", "snb_saliency", "snb_hold", "snb_from"):
        return bool(s.experts) and s.method == "SNB"
    if key == "place_crop":
        return s.crops
    if key.startswith("place_"):
        return any(expert.place != "auto" for expert in s.experts)
    if key == "method" or key.startswith("snb_"):
        return bool(s.experts)
    if key.startswith("afa_"):
        return s.method == "AFA" and (key == "afa_maps" or s.needs_aggregator)
    if key.startswith("freeu_"):
        return s.freeu != "Off"
    if key in ("skip_tolerance", "skip_warmup", "skip_correct"):
        return s.skipping == "Forecast"
    if key == "skip_threshold":
        return s.skipping == "Paper"
    return not key.startswith("skip_") or s.skipping != "Off"


def read_infotext(entries: Mapping[str, Any], field: Field) -> Any:
    """A field's value in parsed infotext; its default where the picture was fused but does not name it.

    None where the picture was not fused, or the value is no longer allowed.
    """
    if not is_fused(entries):
        return None
    key = field.infotext
    value = entries.get(key)
    if value is None and f"{key}-1" in entries:  # the host takes "512x512" apart wherever it stands
        value = f"{entries[f'{key}-1']}x{entries[f'{key}-2']}"
    if value is None:
        if field.expert is not None or field.row.earlier is None:
            return panel_default(field)
        return unsaid(field.row, str(entries.get("Fusion skipping", "Off")), has_experts(entries))
    try:
        return field.row.read(value)
    except SettingError:
        return None


def unsaid(row: Parameter, skipping: str, has_experts: bool) -> Any:
    """The value that a row without an entry means: that of the pictures made before its default was another one.

    Which pictures these are: with skipping by forecasts for its rows, with experts for the others.
    """
    is_earlier = skipping == "Forecast" if row.key.startswith("skip_") else has_experts
    return row.unsaid if is_earlier else row.default


def has_experts(entries: Mapping[str, Any]) -> bool:
    """Whether parsed infotext is that of a picture with an expert."""
    return "Fusion expert 1 checkpoint" in entries


def is_fused(entries: Mapping[str, Any]) -> bool:
    """Whether parsed infotext is that of a picture made with this extension on."""
    return any(key in entries for key in infotext_keys())


def adopt_freeu(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parsed infotext in which FreeU's entries by ljleb's sd-webui-freeu have become ours; without them, as it is.

    Its stages are a JSON list of objects that hold what is not the default; its schedule is "start, stop, smooth",
    where a whole number is a step.
    """
    try:
        stages = json.loads(entries["FreeU Stages"])
        start, stop, smooth = str(entries.get("FreeU Schedule", "0.0, 1.0, 0.0")).split(", ")[:3]
        found = {"freeu": "Custom", "freeu_version": entries.get("FreeU Version", "1"), "freeu_smooth": smooth}
        for key, value in (("freeu_start", start), ("freeu_stop", stop)):
            is_step = value.isdecimal() and int(value) <= 1
            found[key] = float(value) / float(entries["Steps"]) if is_step else value
        names = {"backbone_factor": "b", "skip_factor": "s", "backbone_offset": "offset", "backbone_width": "width",
                 "skip_cutoff": "cutoff", "skip_high_end_factor": "high"}  # fmt: skip
        for n, stage in enumerate(stages, start=1):
            found |= {f"freeu_{names[name]}{n}": value for name, value in stage.items()}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):
        return entries
    ours = {Field(row).infotext: str(found[row.key]) for row in FREEU_PARAMETERS if row.key in found}
    return {**ours, **entries}


def infotext_keys() -> list[str]:
    return [*(field.infotext for field in list_fields()), *map(hash_key, range(MAX_EXPERTS)), *NOTES]


def _protect(text: str) -> str:
    """Quoted where the host would not quote it and yet not read back the same."""
    host_quotes = any(mark in text for mark in ",\n:")
    changes = text != text.strip() or (text[:1] == '"' and text[-1:] == '"')
    return json.dumps(text, ensure_ascii=False) if changes and not host_quotes else text
