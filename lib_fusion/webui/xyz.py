"""Axes of the host's X/Y/Z plot, one for each row of the table."""

from __future__ import annotations

from typing import Any

from lib_fusion import infotext
from lib_fusion.infotext import Field
from lib_fusion.webui import experts, request

#: What an axis sets on a cell's request; always a new dict, since cells are shallow copies of one request.
ATTRIBUTE = "_denoiser_fusion_axes"


def add_axes() -> None:
    """Adds the axes to the host's list, once for each time that its script is loaded."""
    from modules import scripts

    plot = next((d.module for d in scripts.scripts_data if d.script_class.__module__ == "xyz_grid.py"), None)
    if plot is None:
        return
    known = {option.label for option in plot.axis_options}
    plot.axis_options += [
        make_axis(plot, field) for field in infotext.list_fields() if axis_label(field) not in known
    ]


def axis_label(field: Field) -> str:
    return f"[Fusion] {field.label}"


def make_axis(plot: Any, field: Field) -> Any:
    row = field.row

    def apply(p: Any, value: Any, _values: Any) -> None:
        setattr(p, ATTRIBUTE, {**getattr(p, ATTRIBUTE, {}), field.element: value})

    def confirm(_p: Any, values: list[Any]) -> None:
        for value in values:
            row.read(value, field.label)
            if row.key == "checkpoint" and value not in infotext.NO_CHECKPOINT:
                experts.find_checkpoint(value, field.label)

    choices = None
    if row.key == "checkpoint":
        choices = lambda: [infotext.NO_CHECKPOINT[1], *experts.list_checkpoints()]  # noqa: E731
    elif row.kind in ("choice", "bool"):
        names = list(request.allowed_choices(row)) if row.kind == "choice" else ["True", "False"]
        choices = lambda: names  # noqa: E731
    cost = 0.9 if row.key == "checkpoint" else 0.0
    return plot.AxisOption(axis_label(field), str, apply, confirm=confirm, cost=cost, choices=choices)
