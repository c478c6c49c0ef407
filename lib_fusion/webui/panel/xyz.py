"""Axes of the host's X/Y/Z plot: the switch, whole presets, and one for each row of the table.

A window has three, and FreeU's factors have one in common, so that factors can be varied together.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lib_fusion.errors import SettingError
from lib_fusion.requests import infotext, request
from lib_fusion.requests.infotext import Field
from lib_fusion.requests.parameters import Parameter
from lib_fusion.requests.settings import ENABLED, FREEU_CUSTOM, SAME_AS_BASE
from lib_fusion.webui import options
from lib_fusion.webui.models import aggregators, checkpoints, lora_files

#: What an axis sets on a cell's request; always a new dict, since cells are shallow copies of one request.
ATTRIBUTE = "_denoiser_fusion_axes"
#: The host runs the axis of the highest cost in the outermost loop, so that each expert and each file is loaded once.
COSTS = {"checkpoint": 0.9, "afa_aggregator": 0.8}
#: FreeU's factors by the names that their axis has for them: b1, s1, offset1 ..
FACTORS = {row.key.removeprefix("freeu_"): row for row in FREEU_CUSTOM}
FACTORS_LABEL = "FreeU factors"
_ASSIGNMENT = re.compile(r"\s*(\w+)\s*=\s*([^=]+?)(?=\s+\w+\s*=|\s*$)")
_AXES = ("X", "Y", "Z")


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
        if field.row == FREEU_CUSTOM[0]:
            yield make_factors_axis(plot)
        if field.row in FREEU_CUSTOM:
            continue
        yield make_axis(plot, field)
        for end, label in zip(request.WINDOW_ENDS, infotext.WINDOW_LABELS) if field.width == 2 else ():
            part = replace(field.row, key=f"{field.row.key}_{end}", label=label, kind="float")
            yield make_axis(plot, Field(part, field.expert))


def adopt_earlier(_text: str, entries: dict[str, Any]) -> None:
    """Gives the axes in a plot's parsed infotext their present names, where they had others in earlier versions."""
    labels, factors = earlier_labels()
    for axis in _AXES:
        label, values = entries.get(f"{axis} Type"), entries.get(f"{axis} Values")
        if label in labels:
            entries[f"{axis} Type"] = labels[label]
        elif label in factors and isinstance(values, str):
            entries[f"{axis} Type"] = axis_label(FACTORS_LABEL)
            cells = [value.strip() for value in values.split(",")]
            entries[f"{axis} Values"] = ", ".join(f"{factors[label]}={value}" for value in cells if value)


def earlier_labels() -> tuple[dict[str, str], dict[str, str]]:
    """Present labels by earlier ones, and the names of FreeU's factors by the labels that their own axes had."""
    labels, factors = {}, {}
    for field in infotext.list_fields():
        before = axis_label(field.earlier_label)
        if field.row in FREEU_CUSTOM:
            factors[before] = field.row.key.removeprefix("freeu_")
            continue
        labels[before] = axis_label(field.label)
        if field.width == 2:
            labels |= {f"{before} {end}": axis_label(label) for end, label in zip(request.WINDOW_ENDS, field.labels)}
    return {before: now for before, now in labels.items() if before != now}, factors


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


def make_factors_axis(plot: Any) -> Any:
    """FreeU's factors: each cell sets some, as ``b1=1.3 s1=0.9``, and the others are the panel's under *Custom*."""

    def prepare(text: str) -> list[str]:
        parts = plot.csv_string_to_list_strip(text)
        return [cell for part in parts if part.strip() for cell in expand_factors(plot, part)]

    def apply(p: Any, value: str, _values: Any) -> None:
        set_values(p, {FACTORS[name].key: number for name, number in read_factors(value).items()}, {"freeu": "Custom"})

    def confirm(_p: Any, values: list[str]) -> None:
        for value in values:
            read_factors(value)

    return plot.AxisOption(axis_label(FACTORS_LABEL), str, apply, confirm=confirm, prepare=prepare)


def expand_factors(plot: Any, text: str) -> list[str]:
    """The cells that one value stands for, with the host's ranges in it: ``b1=1-1.4 [3]`` is 1, 1.2 and 1.4."""
    choices = [[f"{name}={value}" for value in expand_range(plot, value)] for name, value in split_factors(text)]
    return [" ".join(cell) for cell in itertools.product(*choices)]


def expand_range(plot: Any, text: str) -> list[str]:
    if (found := plot.re_range_float.fullmatch(text)) is not None:
        start, end, step = float(found[1]), float(found[2]), float(found[3] or 1)
        count = int((end - start) / step + 1e-6) + 1 if step else 1
        return [f"{start + i * step:g}" for i in range(count)]
    if (found := plot.re_range_count_float.fullmatch(text)) is not None:
        start, end, count = float(found[1]), float(found[2]), int(found[3] or 1)
        return [f"{start + i * (end - start) / max(count - 1, 1):g}" for i in range(count)]
    return [text]


def split_factors(text: str) -> list[tuple[str, str]]:
    """(name, value) of each factor that a cell names; raises SettingError where it is written in another way."""
    found = _ASSIGNMENT.findall(text)
    if not found or _ASSIGNMENT.sub("", text).strip() or any(name not in FACTORS for name, _ in found):
        raise SettingError(FACTORS_LABEL, text, f"allowed: such as b1=1.3 s1=0.9, of {', '.join(FACTORS)}")
    return found


def read_factors(text: str) -> dict[str, float]:
    return {name: FACTORS[name].read(value, f"{FACTORS_LABEL} {name}") for name, value in split_factors(text)}
