"""The controls of a row of the table, and when the page shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

# Modules, not names from them: a UI reload creates the host's UI classes again.
from modules import ui_components

from lib_fusion.requests import infotext, request
from lib_fusion.requests.infotext import Field
from lib_fusion.requests.settings import AUTO, FREEU_PUBLISHED, MAX_EXPERTS, SAME_AS_BASE
from lib_fusion.webui.models import aggregators, checkpoints

FREEU_ON = ("Auto", *FREEU_PUBLISHED, "Custom")
#: Control -> the choices of another one with which alone it is of use. Elsewhere the page hides it; its value stays.
SHOWN_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    **{f"expert{i + 1}_weight": ("method", ("SNB", "Average")) for i in range(MAX_EXPERTS)},
    **{f"expert{i + 1}_place": ("method", ("SNB",)) for i in range(MAX_EXPERTS)},
    "place_strength": ("places", ("used",)),
    "place_feather": ("places", ("used",)),
    "place_crop": ("places", ("used",)),
    "guidance_until": ("guidance", ("with experts", "always")),
    "guidance_after": ("guidance", ("with experts", "always")),
    "afa_force": ("afa_maps", ("trained",)),
    "freeu_version": ("freeu", FREEU_ON),
    "freeu_models": ("freeu", FREEU_ON),
    "skip_passes": ("skipping", ("Forecast", "Paper")),
    "skip_tolerance": ("skipping", ("Forecast",)),
    "skip_threshold": ("skipping", ("Paper",)),
}
#: A slider is of no use where it has more stops than this.
MOST_STOPS = 1000
#: More choices than this are a list to open.
MOST_BUTTONS = 4
#: For events of ours: Gradio waits for ever for a queued one whose page has gone, and *Reload UI* with it.
AT_ONCE = {"show_progress": False, "queue": False}


def make_controls(field: Field, elem_id: Callable[[str], str]) -> list[Any]:
    """The control of one row; two for a window."""
    row, label = field.row, field.label
    common = {"elem_id": elem_id(field.element), "tooltip": row.help}
    if field.element in SHOWN_WITH:
        control, choices = SHOWN_WITH[field.element]
        common["elem_classes"] = shown_with(control, *choices)
    value = infotext.panel_default(field)
    if row.key == "checkpoint":
        return [gr.Dropdown(label=label, choices=list_choices(), value=value, **common)]
    if row.key == "afa_aggregator":
        return [gr.Dropdown(label=label, choices=["", *aggregators.list_aggregators()], value=value, **common)]
    if row.kind == "bool":
        return [gr.Checkbox(label=label, value=value, **common)]
    if row.kind == "choice":
        choices = list(row.choices)
        if len(choices) > MOST_BUTTONS:
            return [gr.Dropdown(label=label, choices=choices, value=value, **common)]
        return [gr.Radio(label=label, choices=choices, value=value, **common)]
    if row.key == "place":
        return [gr.Textbox(label=label, value=value, placeholder=AUTO, **common)]
    if row.kind == "text":
        return [gr.Textbox(label=label, value=value, lines=2, placeholder="Empty: the picture's", **common)]
    if row.kind == "window":
        return [
            gr.Slider(row.low, row.high, value=part, step=1, label=text,
                      elem_id=elem_id(f"{field.element}_{name}"), tooltip=row.help)
            for part, text, name in zip(value, field.labels, request.WINDOW_ENDS)
        ]  # fmt: skip
    if row.step and (row.high - row.low) / row.step <= MOST_STOPS:
        return [gr.Slider(row.low, row.high, value=value, step=row.step, label=label, **common)]
    return [gr.Number(value=value, label=label, **common)]  # Gradio's limits would end every run, without a name


def shown_with(control: str, *choices: str) -> list[str]:
    """Classes of what the page is to show only where a control has one of these choices."""
    names = (choice.lower().replace(" ", "-") for choice in choices)
    return ["denoiser-fusion-with", *(f"denoiser-fusion-{control}-{name}" for name in names)]


def list_choices() -> list[str]:
    return [infotext.NO_CHECKPOINT[1], SAME_AS_BASE, *checkpoints.list_checkpoints()]


def tool(sign: str, tooltip: str, element: str) -> Any:
    return ui_components.ToolButton(value=sign, elem_id=element, tooltip=tooltip)
