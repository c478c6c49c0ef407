"""What ``benchmarks.skip`` writes: a table of all figures, a shorter one as Markdown, and a plot."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from lib_fusion.requests.settings import SKIP_PRESETS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Line = dict[str, Any]
#: By how a method's name begins: its colour and its label. What begins with nothing else is ours.
GROUPS = {
    "fewer": ("#888888", "fewer steps"),
    "paper": ("#c9546e", "AdaptiveDiffusion"),
    "Deep": ("#4aa396", "DeepCache"),
    "SADA": ("#4a7fb5", "SADA"),
    "ZEUS": ("#8a63b3", "ZEUS"),
    "": ("#f2a93b", "Forecast"),
}
#: Forecasts: the presets, and tolerances between and beyond them, so that others are compared at equal rows.
OURS: dict[str, dict[str, float]] = SKIP_PRESETS | {
    "0.1, 2 in a row": {"skip_tolerance": 0.1, "skip_max": 2},
    "0.4, 3 in a row": {"skip_tolerance": 0.4, "skip_max": 3},
}
#: The columns of the Markdown table.
COLUMNS = (*SKIP_PRESETS, "ZEUS, 1 of 3 computed", "ZEUS, 1 of 2 computed", "ZEUS", "SADA, no Lagrange", "SADA",
           "paper 0.01", "DeepCache 2")  # fmt: skip


def cell_of(line: Line) -> tuple:
    return line["models"], line["sampler"], line["steps"], line["guidance"]


def group_of(line: Line) -> str:
    return next(group for group in GROUPS if line["method"].startswith(group))


def compare_with_ours(lines: Sequence[Line]) -> None:
    """Adds to the lines of others what our forecasts have at as many rows, or at fewer where they need no more.

    ``ours_over``: dB of the mean above it; ``ours_over_worst``: of the worst picture; ``ours_distance``: the feature
    distance as a share of it. Empty where all forecasts compute more rows. Between them it is interpolated.
    """
    cells: dict[tuple, list[Line]] = {}
    for line in lines:
        cells.setdefault(cell_of(line), []).append(line)
    for line in lines:
        ours = sorted((x for x in cells[cell_of(line)] if x["method"] in OURS), key=lambda x: x["rows"])
        for key, against, combine in COMPARED:
            values = [x[against] for x in ours]
            can = group_of(line) and ours and ours[0]["rows"] <= line["rows"]
            at = float(np.interp(line["rows"], [x["rows"] for x in ours], values)) if can else None
            line[key] = "" if at is None else round(combine(at, line[against]), 2)


#: Of ``compare_with_ours``: the column that it adds, the one that it compares, and how.
COMPARED: tuple[tuple[str, str, Callable[[float, float], float]], ...] = (
    ("ours_over", "psnr_mean", lambda ours, other: ours - other),
    ("ours_over_worst", "psnr_worst", lambda ours, other: ours - other),
    ("ours_distance", "distance_mean", lambda ours, other: ours / max(other, 1e-9)),
)


def write_table(lines: Sequence[Line], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def write_markdown(lines: Sequence[Line], path: Path) -> None:
    """A row for each cell: rows, mean and worst PSNR, and the feature distance in thousandths, of the main methods."""
    cells: dict[tuple, dict[str, Line]] = {}
    for line in lines:
        if line["models"] == "general":
            cells.setdefault(cell_of(line), {})[line["method"]] = line
    methods = [name for name in COLUMNS if any(name in cell for cell in cells.values())]
    text = [_row(["sampler, steps, CFG", "pictures", *methods]), _row(["---"] * (len(methods) + 2))]
    for (_, sampler, steps, guidance), cell in cells.items():
        of_ours = cell.get("Faithful")
        if of_ours:
            shown = [_figures(cell[name], of_ours["pictures"]) if name in cell else "" for name in methods]
            text.append(_row([f"{sampler}, {steps}, {guidance:g}", str(of_ours["pictures"]), *shown]))
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def _row(values: Iterable[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _figures(line: Line, pictures: int) -> str:
    """The number of pictures is told where it is not the row's."""
    psnr, distance = f"{line['psnr_mean']:.1f} ({line['psnr_worst']:.0f})", 1000 * line["distance_mean"]
    count = f" [{line['pictures']}]" if line["pictures"] != pictures else ""
    return f"{line['rows']:.2f}: {psnr}, {distance:.{1 if distance < 10 else 0}f}{count}"


def plot(lines: Sequence[Line], path: Path) -> None:
    """Mean PSNR over rows: a panel for each sampler and number of steps."""
    lines = [line for line in lines if line["models"] == "general"]
    samplers, steps, scales = (list(dict.fromkeys(line[key] for line in lines))
                               for key in ("sampler", "steps", "guidance"))  # fmt: skip
    fig, axes = plt.subplots(len(samplers), len(steps), figsize=(3.6 * len(steps), 2.3 * len(samplers)), squeeze=False,
                             layout="constrained", sharex=True, sharey="row")  # fmt: skip
    for axis, (sampler, n) in zip(axes.flat, ((s, n) for s in samplers for n in steps)):
        for group, (colour, label) in GROUPS.items():
            for guidance in scales:
                points = sorted(
                    (x["rows"], x["psnr_mean"]) for x in lines
                    if (x["sampler"], x["steps"], x["guidance"]) == (sampler, n, guidance) and group_of(x) == group
                    and (group or x["method"] in OURS)
                )  # fmt: skip
                if points:
                    style = "o-" if group in ("fewer", "") else "o"
                    filled = colour if guidance == scales[0] else "white"
                    name = label if guidance == scales[0] else None
                    axis.plot(*zip(*points), style, color=colour, markerfacecolor=filled, label=name, markersize=5,
                              linewidth=1)  # fmt: skip
        if not axis.lines:
            axis.set_axis_off()  # not measured
            continue
        axis.set_title(f"{sampler}, {n} steps", fontsize=9)
        axis.set_xlim(0.3, 1)
        axis.tick_params(labelbottom=True, labelsize=8)
        axis.grid(alpha=0.3)
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncol=len(handles), frameon=False)
    others = "".join(f", open: {guidance:g}" for guidance in scales[1:])
    fig.supxlabel(f"U-Net rows, as a share of the unskipped run (filled: CFG {scales[0]:g}{others})", fontsize=10)
    fig.supylabel("mean PSNR in dB against the unskipped run", fontsize=10)
    fig.savefig(path, dpi=90)
    plt.close(fig)
