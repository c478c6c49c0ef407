"""Refusals in the panel's words: errors name the API's fields, people know the controls. Host-free."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.requests.infotext import list_fields
from lib_fusion.requests.settings import COMPARE, HOST_OPTIONS, MAX_EXPERTS, SAME_AS_BASE

TITLE = "Denoiser Fusion"
#: Controls of the WebUI's own, by what errors call them.
HOST_CONTROLS = {
    "base checkpoint": "Stable Diffusion checkpoint", "SD Unet": "SD Unet", "refiner": "Refiner",
    "cfg_scale": "CFG Scale", "hr_cfg": "Hires CFG Scale", "torch.compile": "torch.compile",
}  # fmt: skip
#: What to do where a choice lacks or stands in the way, by the field.
REMEDIES = {
    ("experts", None): "choose a checkpoint under Expert 1, switch on FreeU, Skipping or the guidance interval "
                       "(always), or untick the panel",
    ("afa_aggregator", ""): "choose an Aggregator in the AFA tab, or uniform under AFA maps",
    (COMPARE.key, True): "choose None under Script to compare",
}  # fmt: skip


def controls() -> dict[str, str]:
    """The label of each field's control; for a window's two controls, of both."""
    labels = {field.row.key if field.expert is None else f"experts[{field.expert}].{field.row.key}": field
              for field in list_fields()}  # fmt: skip
    named = {key: " or ".join(field.labels) for key, field in labels.items()}
    for i in range(MAX_EXPERTS):
        named |= {f"experts[{i}].mask": f"Expert {i + 1} mask", f"experts[{i}]": f"Expert {i + 1}"}
    previews = {key.removeprefix("preview_"): row.label for key, row in HOST_OPTIONS.items()}
    return {**previews, **named, **HOST_CONTROLS, "preset": "Fusion preset", COMPARE.key: "Compare"}


def in_panels_words(error: FusionError, names: Sequence[str] = ()) -> str:
    """What an error says, with the control that it is about by its label, and what to do there.

    ``names``: the experts' checkpoints, by which errors in files tell whose they are.
    """
    labels = controls()
    if isinstance(error, SettingError):
        value = error.value if isinstance(error.value, (str, bool)) else None
        if remedy := REMEDIES.get((error.field, value)):
            return f"{TITLE}: {remedy}"
        label, allowed = labels.get(error.field, error.field), by_labels(error.allowed, labels)
        return f"{TITLE}, {SettingError(label, error.value, allowed)}"
    for i, name in enumerate(names):
        if name != SAME_AS_BASE and name in str(error):
            return f"{TITLE}, Expert {i + 1} checkpoint: {error}"
    told = str(error)
    return told if told.startswith(TITLE) else f"{TITLE}: {told}"


def by_labels(text: str, labels: dict[str, str]) -> str:
    """A text in which the API's names of settings have become the controls' labels; plain words stay."""
    keys = sorted((key for key in labels if re.search(r"[_\[]", key)), key=len, reverse=True)
    pattern = "|".join(re.escape(key) for key in keys)
    return re.sub(rf"(?<![\w.])(?:{pattern})(?!\w)", lambda found: labels[found[0]], text)
