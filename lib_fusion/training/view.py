"""What the training tab shows of a job: its state with a bar, the losses as an SVG, the evaluation. Host-free.

Colours are the page's own, so that all is readable in light and dark; ``tell`` puts a sentence into its language.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from lib_fusion.files import read_text, retry
from lib_fusion.training.jobs import Status
from lib_fusion.training.train import WINDOW, clock

STAGES = {
    "": "starting",
    "cache": "encoding the pictures",
    "cache the held-out pictures": "encoding the held-out pictures",
    "train": "training",
    "evaluate": "evaluating",
}
Tell = Callable[[str], str]
#: Of the picture of losses, in its own units; points of a line.
WIDTH, HEIGHT, LEFT, BOTTOM, POINTS = 640, 240, 52, 34, 320
#: Steps that the time left is estimated from.
RECENT = 50


def status_html(status: Status | None, running: str | None = None, tell: Tell = str) -> str:
    """A sentence and a bar; the page looks again while the element says so."""
    if status is None:
        told = tell(f"{running} is being trained: choose it to watch." if running else "Nothing is being trained.")
        return f'<div data-running="{int(running is not None)}" data-phase="">{html.escape(told)}</div>'
    is_other = running and running != status.name
    other = " " + tell(f"{running} is being trained: choose it to watch.") if is_other else ""
    told = html.escape(tell(sentence(status)) + other)
    share = 100 if status.phase == "finished" else 100 * min(1.0, status.step / status.steps)
    bar = f'<div class="denoiser-fusion-bar"><div style="width:{share:.1f}%"></div></div>'
    return f'<div data-running="{int(running is not None)}" data-phase="{html.escape(status.phase)}">{told}{bar}</div>'


def sentence(status: Status) -> str:
    """How a job is doing, and what can be done."""
    name, done = status.name, f"step {status.step} of {status.steps}"
    where = f" while {STAGES.get(status.stage, status.stage)}" + (f", at {done}" if status.rows else "")
    again = f"Start goes on from step {status.saved}." if status.saved else "Start goes on with what is done."
    if status.stage == "evaluate":
        again = "It is trained; the AFA tab lists it once Start has evaluated it."
    if status.phase == "running" and status.stage == "train" and status.rows:
        return f"{name}: {done}, loss {mean_loss(status):.4f}, {time_left(status)} left"
    if status.phase == "running":
        return f"{name}: {STAGES.get(status.stage, status.stage)}"
    if status.phase == "finished":
        return f"{name}: finished after {status.step} steps, loss {mean_loss(status):.4f}. The AFA tab lists it."
    if status.phase == "failed":
        return f"{name}: failed{where}: {status.error}. {again}"
    if status.phase == "stopped":
        return f"{name}: stopped{where}. {again}"
    return f"{name}: ended{where} without a word, as when it is killed or the machine restarts. {again}"


def mean_loss(status: Status) -> float:
    losses = [row[1] for row in status.rows[-WINDOW:]]
    return sum(losses) / max(len(losses), 1)


def time_left(status: Status) -> str:
    recent = status.rows[-RECENT - 1 :]
    if len(recent) < 2 or recent[-1][3] < recent[0][3]:
        return "?"
    return clock((recent[-1][3] - recent[0][3]) / (len(recent) - 1) * (status.steps - status.step))


def loss_svg(rows: Sequence[tuple[int, float, float, float]], tell: Tell = str) -> str:
    """Each step's loss, thin, and their running mean over up to WINDOW steps; nothing where there are no losses."""
    losses = [row[1] for row in rows if math.isfinite(row[1])]
    if len(losses) < 2:
        return ""
    window = min(WINDOW, max(2, len(losses) // 10))
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    means = [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
    top, last = 1.05 * sorted(losses)[-1 - len(losses) // 50] or 1.0, rows[-1][0]  # beside the few highest

    def place(i: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 8) * i / (len(losses) - 1)
        y = 8 + (HEIGHT - BOTTOM - 8) * (1 - min(value, top) / top)
        return f"{x:.1f},{y:.1f}"

    stride = max(1, math.ceil(len(losses) / POINTS))
    chosen = sorted({*range(0, len(losses), stride), len(losses) - 1})
    lines = [
        f'<polyline class="{kind}" points="{" ".join(place(i, values[i]) for i in chosen)}"/>'
        for kind, values in (("each", losses), ("mean", means))
    ]
    texts = []
    for part in (0, 0.5, 1):
        x, y = LEFT + (WIDTH - LEFT - 8) * part, 8 + (HEIGHT - BOTTOM - 8) * (1 - part)
        anchor = {0: "start", 0.5: "middle", 1: "end"}[part]
        first = rows[0][0]
        lines.insert(0, f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        texts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * part:.3g}</text>')
        step = round(first + (last - first) * part)
        texts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{step}</text>')
    told = tell(f"step; thin: loss of a step, thick: mean of the last {window}")
    texts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{told}</text>')
    body = "".join([*lines, *texts])
    return f'<svg class="denoiser-fusion-losses" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}</svg>'


def evaluation_html(folder: Path, is_held_out: bool, tell: Tell = str) -> str:
    """The verdict, what it was measured on, and the plot; nothing where nothing is evaluated yet."""
    verdict = next((line for line in report(folder).splitlines() if line.startswith("The aggregator")), "")
    if not verdict:
        return ""
    on = "held-out pictures" if is_held_out else (
        "the training pictures, which flatters the aggregator; name a folder of held-out pictures for an honest measure"
    )  # fmt: skip
    kind = "lost" if "NOT" in verdict else "won"
    told = f'<p class="denoiser-fusion-{kind}"><b>{html.escape(verdict)}</b></p><p>{tell(f"Measured on {on}.")}</p>'
    try:
        data = base64.b64encode(retry((folder / "evaluation.png").read_bytes)).decode()
    except OSError:
        return told
    return f'{told}<img class="denoiser-fusion-plot" alt="losses and routing" src="data:image/png;base64,{data}"/>'


def evaluation_tables(folder: Path) -> str:
    """The report's tables, in Markdown."""
    return "\n".join(line for line in report(folder).splitlines() if line.startswith("|") or not line)


def report(folder: Path) -> str:
    try:
        return read_text(folder / "evaluation.md")
    except OSError:
        return ""
