"""Axes of the host's X/Y/Z plot: the switch, whole presets, and one for each row of the table (a window has three)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lib_fusion.requests import infotext, request
from lib_fusion.requests.infotext import Field
from lib_fusion.requests.parameters import Parameter
from lib_fusion.requests.settings import ENABLED, SAME_AS_BASE
from lib_fusion.webui import options
from lib_fusion.webui.models import aggregators, checkpoints, lora_files

#: What an axis sets on a cell's request; always a new dict, since cells are shallow copies of one request.
ATTRIBUTE = "_denoiser_fusion_axes"
#: The host runs the axis of the highest cost in the outermost loop, so that each expert and each file is loaded once.
COSTS = {"checkpoint": 0.9, "afa_aggregator": 0.8}


def add_axes() -> None:
    """Adds the axes to the host's list, once for each time that its script is loaded."""
    from modules import scripts

    plot = next((d.module for d in scripts.scripts_data if d.script_class.__module__ == "xyz_grid.py"), None)
    if plot is None:
        return
    known = {option.label for option in plot.axis_options}
    plot.axis_options += [option for option in make_axes(plot) if option.label not in known]


def make_axes(plot: Any) -> Iterator[Any]:
    """All axes, always in this order; ``plot`` is the module of the host's script."""
    yield make_axis(plot, Field(ENABLED))
    yield make_preset_axis(plot)
    for field in infotext.list_fields():
        yield make_axis(plot, field)
        for end in request.WINDOW_ENDS if field.width == 2 else ():
            row = field.row
            part = replace(row, key=f"{row.key}_{end}", label=f"{row.label} {end}", kind="float")
            yield make_axis(plot, Field(part, field.expert))


def axis_label(label: str) -> str:
    return f"[Fusion] {label}"


def set_values(p: Any, values: dict[str, Any], implied: dict[str, Any] | None = None) -> None:
    """Adds to what a cell sets, by the fields' elements; ``implied`` gives way to what another axis sets."""
    setattr(p, ATTRIBUTE, {**(implied or {}), **getattr(p, ATTRIBUTE, {}), **values})


def make_axis(plot: Any, field: Field) -> Any:
    row = field.row

    def apply(p: Any, value: Any, _values: Any) -> None:
        value = round(value, 8) if isinstance(value, float) else value  # as in the cell's label
        set_values(p, {field.element: value}, aggregators.implied_by(value) if row.key == "afa_aggregator" else None)

    def confirm(_p: Any, values: list[Any]) -> None:
        for value in values:
            row.read(value, field.label)
            if row.key == "checkpoint" and value not in (*infotext.NO_CHECKPOINT, SAME_AS_BASE):
                checkpoints.find_checkpoint(value, field.label)
            if row.key == "prompt":
                lora_files.find_loras(value, field.label)
            if row.key == "afa_aggregator":
                aggregators.implied_by(value)

    kinds = {"int": int, "float": float}
    return plot.AxisOption(
        axis_label(field.label), kinds.get(row.kind, str), apply, confirm=confirm, cost=COSTS.get(row.key, 0.0),
        choices=choices_of(row), prepare=read_numbers(plot, field) if row.kind in kinds else None,
    )  # fmt: skip


def choices_of(row: Parameter) -> Callable[[], list[str]] | None:
    """What the plot's list of values offers; None where values are typed."""
    if row.key == "checkpoint":
        return lambda: [infotext.NO_CHECKPOINT[1], SAME_AS_BASE, *checkpoints.list_checkpoints()]
    if row.key == "afa_aggregator":
        return aggregators.list_aggregators
    if row.kind in ("choice", "bool"):
        return lambda: list(row.choices) if row.kind == "choice" else ["True", "False"]
    return None


def read_numbers(plot: Any, field: Field) -> Callable[[str], list[str]]:
    """Typed numbers, apart; the host's ranges (``0-10 (+2)``, ``0-1 [5]``) are left for it to read."""
    ranges = (plot.re_range, plot.re_range_count) if field.row.kind == "int" else (
        plot.re_range_float, plot.re_range_count_float)  # fmt: skip

    def prepare(text: str) -> list[str]:
        parts = [part for part in plot.csv_string_to_list_strip(text) if part]
        for part in parts:
            if not any(pattern.fullmatch(part) for pattern in ranges):
                field.row.read(part, field.label)
        return parts

    return prepare


def make_preset_axis(plot: Any) -> Any:
    """Whole presets, shipped ones and a person's own; what another axis sets goes before."""
    store = options.all_presets()

    def apply(p: Any, value: str, _values: Any) -> None:
        set_values(p, {request.PRESET: store.get(value)})

    def confirm(_p: Any, values: list[str]) -> None:
        for value in values:
            store.get(value)

    return plot.AxisOption(axis_label("Preset"), str, apply, confirm=confirm, cost=0.7, choices=store.names)
