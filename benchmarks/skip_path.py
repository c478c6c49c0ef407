"""``python -m benchmarks.skip_path``: the greedy best path of skipped steps, and how far policies are from it.

AdaptiveDiffusion's analysis tool: again and again, skip the step whose skipping changes the final picture least.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.measures import psnr
from benchmarks.skip import POLICIES, SIZE
from lib_fusion.cli import add_rows, given_rows
from lib_fusion.engine.demo_sheet import FOLDER
from lib_fusion.engine.generate import Engine
from lib_fusion.engine.loader import quiet_libraries
from lib_fusion.fusion.policies import SKIPPED, Skips
from lib_fusion.fusion.session import FusionSession
from lib_fusion.methods.skipping import Forecaster
from lib_fusion.requests.settings import GENERATION_PARAMETERS, FusionSettings, GenerationSettings

matplotlib.use("Agg")
from matplotlib import pyplot as plt

#: Policies that are compared, and how the greedy path stands in for a skipped prediction.
COMPARED = {"paper 0.01": "reuse", "paper 0.03": "reuse", "Faithful": "linear", "Fast": "linear"}

#: The rows of a generation that have a flag.
FLAGS = ("sampler", "steps", "cfg_scale", "seed")


class FixedPath(Forecaster):
    """Skips given steps, whatever their error; ``linear``: by the forecast, else the last noise is used again."""

    def __init__(self, skipped: Collection[int], linear: bool) -> None:
        super().__init__()
        self.path, self.linear, self._step = skipped, linear, -1

    def may_skip(self, log_sigma: float, stride: float = 1.0) -> bool:
        self._step += 1
        return self._step in self.path

    def forecast(self, log_sigma: float, latent: torch.Tensor) -> torch.Tensor:
        return super().forecast(log_sigma, latent) if self.linear else self._nodes[-1][1]


@dataclass
class Search:
    """One prompt on one sampler, whose unskipped picture all others are compared with."""

    engine: Engine
    generation: GenerationSettings

    def __post_init__(self) -> None:
        self.reference = self.pictures(FusionSession(FusionSettings()), 1)[0]

    def pictures(self, session: FusionSession, copies: int) -> np.ndarray:
        jobs = [(self.generation.prompts[0], self.generation.seed)] * copies
        images = []
        for latents in self.engine.denoise(jobs, self.generation, session).split(8):
            images += self.engine.decode(latents)
        return np.stack([np.asarray(image) for image in images])

    def quality(self, paths: Sequence[Collection[int]], linear: bool) -> np.ndarray:
        """PSNR of the pictures that come of skipping these steps, all paths in one batch."""
        session = FusionSession(FusionSettings())
        settings = FusionSettings(skip_correct=False)
        session.skips = Skips(settings, make=lambda _model, picture: FixedPath(paths[picture], linear))
        return self._against(self.pictures(session, len(paths)))

    def greedy(self, most: int, linear: bool, progress: bool) -> list[tuple[frozenset[int], float]]:
        """The best path of 1, 2, ... ``most`` skipped steps, each one step more than the one before, and its PSNR."""
        path: frozenset[int] = frozenset()
        found = []
        for n in range(1, most + 1):
            free = [i for i in range(2 if linear else 1, self.generation.steps) if i not in path]
            quality = self.quality([path | {i} for i in free], linear)
            best = int(quality.argmax())
            path = path | {free[best]}
            found.append((path, float(quality[best])))
            if progress:
                print(f"{'linear' if linear else 'reuse'}: {n} skipped, {quality[best]:.1f} dB", flush=True)
        return found

    def policy(self, values: dict[str, Any]) -> tuple[frozenset[int], float]:
        """The steps that a policy skips, and the PSNR it reaches."""
        session = FusionSession(FusionSettings(**values))
        quality = self._against(self.pictures(session, 1))
        return frozenset(i for i, mark in enumerate(session.skips.paths[0][0]) if mark == SKIPPED), float(quality[0])

    def _against(self, pictures: np.ndarray) -> np.ndarray:
        return psnr(pictures, np.broadcast_to(self.reference, pictures.shape))


def chi_square(path: Collection[int], best: Collection[int], steps: int) -> tuple[float, float]:
    """Pearson's chi-square of two choices among the steps (2 x 2 table), and its p for one degree of freedom."""
    table = np.zeros((2, 2))
    for i in range(steps):
        table[int(i in path), int(i in best)] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / steps
    if (expected == 0).any():
        return 0.0, 1.0
    value = float(((table - expected) ** 2 / expected).sum())
    return value, math.erfc(math.sqrt(value / 2))


def bench_path(out: Path, base: Path, generation: GenerationSettings, progress: bool = True) -> list[dict[str, Any]]:
    """Searches and compares for the first prompt; writes skip-path.csv and .png into a folder, returns the table."""
    generation = replace(generation, width=SIZE, height=SIZE)
    search = Search(Engine(base), generation)
    policies = {name: search.policy(POLICIES[name]) for name in COMPARED}
    lines, curves = [], {}
    for kind in dict.fromkeys(COMPARED.values()):
        most = max(len(policies[name][0]) for name, its in COMPARED.items() if its == kind)
        curves[kind] = search.greedy(most, kind == "linear", progress)
        for name in (name for name, its in COMPARED.items() if its == kind):
            path, quality = policies[name]
            if not path:
                continue
            best, best_quality = curves[kind][len(path) - 1]
            value, p = chi_square(path, best, generation.steps)
            lines.append({
                "policy": name, "computed": generation.steps - len(path), "steps": generation.steps,
                "psnr": round(quality, 2), "best_psnr": round(best_quality, 2), "same_steps": len(path & best),
                "chi_square": round(value, 2), "p": round(p, 4), "path": marks(path, generation.steps),
                "best_path": marks(best, generation.steps),
            })  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with (out / "skip-path.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else ["policy"])
        writer.writeheader()
        writer.writerows(lines)
    title = f"{generation.prompts[0]}; {generation.sampler}, {generation.steps} steps, CFG {generation.cfg_scale:g}"
    _plot(lines, curves, out / "skip-path.png", title)
    return lines


def marks(path: Collection[int], steps: int) -> str:
    return "".join(SKIPPED if i in path else "#" for i in range(steps))


def _plot(lines: list[dict[str, Any]], curves: dict[str, list], path: Path, title: str) -> None:
    """Above, PSNR over computed calls; below, which steps were computed."""
    colours = {"reuse": "#c9546e", "linear": "#f2a93b"}
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), layout="constrained", height_ratios=(3, 2))
    steps = lines[0]["steps"] if lines else 0
    for kind, curve in curves.items():
        top.plot([steps - len(p) for p, _ in curve], [q for _, q in curve], "-", color=colours[kind],
                 label=f"greedy best path, {kind}")  # fmt: skip
    for line, shape in zip(lines, "osD^"):
        top.plot(line["computed"], line["psnr"], shape, color=colours[COMPARED[line["policy"]]], label=line["policy"])
    top.set(xlabel="U-Net calls computed", ylabel="PSNR in dB", title=title)
    top.grid(alpha=0.3)
    top.legend(fontsize=8)
    names = []
    for line in lines:
        for name, text in ((line["policy"], line["path"]), ("its best path", line["best_path"])):
            xs = [i for i, mark in enumerate(text) if mark != SKIPPED]
            bottom.plot(xs, [-len(names)] * len(xs), "s", color=colours[COMPARED[line["policy"]]], markersize=5)
            names.append(name)
    bottom.set_yticks([-i for i in range(len(names))], names, fontsize=8)
    bottom.set_xlabel("step (squares: computed)")
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.skip_path", description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=FOLDER / "general.safetensors", help="the checkpoint, SD1")
    parser.add_argument("--prompt", default="a fox, flat drawing", metavar="TEXT", help="what to draw")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="where the table and the plot go")
    rows = [row for row in GENERATION_PARAMETERS if row.key in FLAGS]
    add_rows(parser, rows)
    args = parser.parse_args()
    generation = GenerationSettings.from_dict({"prompts": [args.prompt], "steps": 20, **given_rows(args, rows)})
    quiet_libraries()
    for line in bench_path(args.out, args.base, generation):
        print("{policy}: {computed} of {steps} computed, {psnr} dB; best path {best_psnr} dB, {same_steps} steps the "
              "same, chi-square {chi_square} (p = {p})".format(**line))


if __name__ == "__main__":
    main()
