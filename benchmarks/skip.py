"""``python -m benchmarks.skip``: fidelity against cost of skipping, beside the controls it must beat.

Every run is compared with the unskipped one of the same sampler, steps, guidance, captions and seeds. Pictures are kept
under the output folder, so that an interrupted benchmark goes on where it was, and runs serve several comparisons.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.deepcache import cached_share, deep_cache, make_diffusers_engine
from benchmarks.measures import psnr, ssim
from lib_fusion.engine.demo_sheet import FOLDER
from lib_fusion.engine.generate import Engine
from lib_fusion.engine.loader import quiet_libraries
from lib_fusion.files import write_whole
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import SKIP_PRESETS, ExpertSettings, FusionSettings, GenerationSettings

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SAMPLERS = ("DDIM", "Euler Karras", "DPM++ 2M Karras")
STEPS = (50, 30, 20)
GUIDANCE = (7.0, 4.0)
#: Lengths at which fewer steps are measured, for all of STEPS; between them PSNR is interpolated.
LENGTHS = (11, 12, 14, 16, 18, 20, 22, 25, 28, 30, 33, 38)
#: Policies by name. The presets and the paper's are measured in every cell, the others at the first guidance scale.
POLICIES: dict[str, dict[str, Any]] = {
    **{name: {"skipping": "Forecast", **values} for name, values in SKIP_PRESETS.items()},
    "paper 0.01": {"skipping": "Paper"},
    "Faithful, uncorrected": {"skipping": "Forecast", "skip_correct": False},
    "tolerance 0.05": {"skipping": "Forecast", "skip_tolerance": 0.05},
    "tolerance 0.3": {"skipping": "Forecast", "skip_tolerance": 0.3},
    "paper 0.003": {"skipping": "Paper", "skip_threshold": 0.003},
    "paper 0.03": {"skipping": "Paper", "skip_threshold": 0.03},
}
EVERYWHERE = len(SKIP_PRESETS) + 1
INTERVALS = (2, 3)
#: Fused pairs: base, expert, guidance scale, and whether the expert is the base's own fine-tune.
PAIRS = (("general", "animals", 4.0), ("general", "vehicles", 4.0), ("animals", "vehicles", 7.0))
PAIR_CELLS = (("DDIM", 50), ("DPM++ 2M Karras", 50), ("DPM++ 2M Karras", 30))
SIZE = 128


@dataclass(frozen=True)
class Job:
    """One run of all captions. ``cost`` is its U-Net work as a share of ``steps`` whole calls of one model."""

    method: str
    sampler: str
    steps: int
    guidance: float
    values: dict[str, Any] = field(default_factory=dict, hash=False)
    pair: tuple[str, str] | None = None
    interval: int = 0

    @property
    def name(self) -> str:
        where = f"{'+'.join(self.pair)}-" if self.pair else ""
        text = f"{where}{self.sampler}-{self.steps}-{self.guidance:g}-{self.method}"
        return "".join(c if c.isalnum() or c in "-.+" else "_" for c in text)


@dataclass
class Result:
    """A run's pictures uint8 (N,H,W,3), its rows as a share of one unskipped model's, and its seconds."""

    pictures: np.ndarray
    rows: float
    seconds: float


class Bench:
    """Runs jobs once, and keeps what they gave."""

    def __init__(self, out: Path, count: int) -> None:
        self.out, self.engines = out, {}
        self._compared: dict[tuple[str, str], dict[str, Any]] = {}
        lines = (FOLDER / "images/metadata.jsonl").read_text("utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        step = max(1, len(texts) // count)  # odd, so that both styles come
        self.captions = [texts[(i * (step | 1)) % len(texts)] for i in range(count)]
        (out / "runs").mkdir(parents=True, exist_ok=True)

    def run(self, job: Job) -> Result:
        """The job's result, from its file where it has been run before."""
        path = self.out / "runs" / f"{job.name}.npz"
        if not path.exists():
            result = self._run(job)
            values = {"pictures": result.pictures, "rows": result.rows, "seconds": result.seconds}
            write_whole(path, lambda partial: np.savez_compressed(partial, **values), path.with_suffix(".partial.npz"))
        stored = np.load(path)
        return Result(stored["pictures"], float(stored["rows"]), float(stored["seconds"]))

    def compare(self, job: Job, reference: Job) -> dict[str, Any]:
        """A line of the table: what a run has cost and how far its pictures are from the reference's."""
        key = (job.name, reference.name)
        if key in self._compared:
            return self._compared[key]
        result, full = self.run(job), self.run(reference)
        dbs, similar = psnr(result.pictures, full.pictures), ssim(result.pictures, full.pictures)
        self._compared[key] = {
            "models": "+".join(job.pair or ("general",)), "sampler": job.sampler, "steps": reference.steps,
            "guidance": job.guidance,
            "method": job.method if job.method != "unskipped" else f"fewer steps: {job.steps}",
            "rows": round(result.rows * job.steps / reference.steps, 4),
            "seconds": round(result.seconds, 2), "unskipped_seconds": round(full.seconds, 2),
            "psnr_mean": round(dbs.mean(), 2), "psnr_median": round(float(np.median(dbs)), 2),
            "psnr_worst": round(dbs.min(), 2), "ssim_mean": round(similar.mean(), 4),
            "ssim_median": round(float(np.median(similar)), 4), "ssim_worst": round(similar.min(), 4),
        }  # fmt: skip
        return self._compared[key]

    def _run(self, job: Job) -> Result:
        engine = self._engine(job)
        captions = tuple(self.captions)
        generation = GenerationSettings(
            captions, width=SIZE, height=SIZE, steps=job.steps, sampler=job.sampler, cfg_scale=job.guidance
        )
        experts = tuple(ExpertSettings(name) for name in (job.pair or ())[1:])
        session = FusionSession(FusionSettings(experts=experts, **job.values))
        jobs = [(caption, seed) for seed, caption in enumerate(captions)]
        cache = deep_cache(engine, job.sampler, job.steps, job.interval) if job.interval else nullcontext()
        began = time.perf_counter()
        with cache:
            latents = engine.denoise(jobs, generation, session)
        seconds = time.perf_counter() - began
        rows = sum(session.rows) / (2 * len(jobs) * job.steps)
        if job.interval:
            whole = -(-job.steps // job.interval)
            rows = (whole + (job.steps - whole) * cached_share(engine, SIZE // 8, SIZE // 8)) / job.steps
        return Result(np.stack([np.asarray(image) for image in engine.decode(latents)]), rows, seconds)

    def _engine(self, job: Job) -> Engine:
        names = job.pair or ("general",)
        if names not in self.engines:
            files = [FOLDER / f"{name}.safetensors" for name in names]
            self.engines[names] = Engine(files[0], files[1:])
        if not job.interval:
            return self.engines[names]
        if "diffusers" not in self.engines:
            self.engines["diffusers"] = make_diffusers_engine(self.engines[names])
        return self.engines["diffusers"]


def list_jobs(quick: bool) -> Iterator[Job]:
    """All runs of the benchmark, the ones that matter most first."""
    guidance, samplers, steps = (GUIDANCE[:1], SAMPLERS[:1], (50, 20)) if quick else (GUIDANCE, SAMPLERS, STEPS)
    cells = [(s, n, w) for w in guidance for s in samplers for n in steps]
    for s, n, w in cells:
        yield Job("unskipped", s, n, w)
        for name, values in list(POLICIES.items())[:EVERYWHERE]:
            yield Job(name, s, n, w, values)
    for w in guidance:
        for s in samplers:
            for n in LENGTHS:
                yield Job("unskipped", s, n, w)
    for s, n, w in cells:
        if w == guidance[0]:
            for name, values in list(POLICIES.items())[EVERYWHERE:]:
                yield Job(name, s, n, w, values)
            for interval in INTERVALS:
                yield Job(f"DeepCache {interval}", s, n, w, interval=interval)
    for base, expert, w in () if quick else PAIRS:
        for s, n in PAIR_CELLS:
            for name in ("unskipped", *list(POLICIES)[:EVERYWHERE]):
                yield Job(name, s, n, w, POLICIES.get(name, {}), pair=(base, expert))
            for share in (0.5, 0.6, 0.7):
                yield Job("unskipped", s, round(n * share), w, pair=(base, expert))


def measure(bench: Bench, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The table: one line for each run compared with its reference; fewer steps as lines of their own."""
    lines = []
    for job in jobs:
        own = [job.steps] if job.method != "unskipped" else [n for n in STEPS if n > job.steps]
        for steps in own:
            reference = Job("unskipped", job.sampler, steps, job.guidance, pair=job.pair)
            if all((bench.out / "runs" / f"{j.name}.npz").exists() for j in (job, reference)):
                lines.append(dict(bench.compare(job, reference)))
    for line in lines:
        line["over_fewer"] = over_fewer(line, lines)
    return lines


def cell_of(line: dict[str, Any]) -> tuple:
    return line["models"], line["sampler"], line["steps"], line["guidance"]


def is_fewer(line: dict[str, Any]) -> bool:
    return line["method"].startswith("fewer")


def over_fewer(line: dict[str, Any], lines: list[dict[str, Any]]) -> float | str:
    """dB above fewer steps at equal rows, interpolated; empty where no length on both sides has been measured."""
    curve = sorted((x["rows"], x["psnr_mean"]) for x in lines if is_fewer(x) and cell_of(x) == cell_of(line))
    if is_fewer(line) or not curve or not curve[0][0] <= line["rows"] <= curve[-1][0]:
        return ""
    return round(line["psnr_mean"] - float(np.interp(line["rows"], *zip(*curve))), 2)


def write_table(lines: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def plot(lines: list[dict[str, Any]], path: Path, guidance: float) -> None:
    """PSNR over cost: a panel for each sampler and number of steps."""
    lines = [line for line in lines if line["models"] == "general" and line["guidance"] == guidance]
    samplers, steps = (list(dict.fromkeys(line[key] for line in lines)) for key in ("sampler", "steps"))
    fig, axes = plt.subplots(len(samplers), len(steps), figsize=(4 * len(steps), 3.2 * len(samplers)), squeeze=False,
                             layout="constrained", sharey="row")  # fmt: skip
    groups = {"fewer": ("#888888", "fewer steps"), "paper": ("#c9546e", "AdaptiveDiffusion's rule"),
              "Deep": ("#4aa396", "DeepCache"), "": ("#f2a93b", "forecast")}  # fmt: skip
    for axis, (sampler, n) in zip(axes.flat, ((s, n) for s in samplers for n in steps)):
        for start, (colour, label) in groups.items():
            points = sorted(
                (x["rows"], x["psnr_mean"], x["psnr_worst"]) for x in lines if x["sampler"] == sampler
                and x["steps"] == n and next(g for g in groups if x["method"].startswith(g)) == start
            )  # fmt: skip
            if points:
                rows, mean, worst = zip(*points)
                axis.plot(rows, mean, "o-" if start == "fewer" else "o", color=colour, label=label, markersize=5)
                axis.plot(rows, worst, "_", color=colour)
        axis.set_title(f"{sampler}, {n} steps", fontsize=10)
        axis.set_xlim(0.3, 1)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    fig.supxlabel("U-Net rows, as a share of the unskipped run")
    fig.supylabel("PSNR in dB against the unskipped run: mean (dot), worst picture (dash)")
    fig.savefig(path, dpi=100)
    plt.close(fig)


def bench_skip(out: Path, count: int = 32, quick: bool = False, progress: bool = True) -> list[dict[str, Any]]:
    """Runs the benchmark into a folder: skip.csv and a plot for each guidance scale, renewed as it goes on."""
    bench, jobs = Bench(out, count), list(dict.fromkeys(list_jobs(quick)))
    lines: list[dict[str, Any]] = []
    for i, job in enumerate(jobs):
        bench.run(job)
        if progress:
            print(f"{i + 1}/{len(jobs)} {job.name}", flush=True)
        if i % 10 == 9 or job is jobs[-1]:
            lines = measure(bench, jobs)
            if lines:
                write_table(lines, out / "skip.csv")
                for w in {line["guidance"] for line in lines if line["models"] == "general"}:
                    plot(lines, out / f"skip-cfg{w:g}.png", w)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.skip", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=32, metavar="N", help="pictures of each run, 1 to 144")
    parser.add_argument("--quick", action="store_true", help="DDIM at one guidance scale only")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"),
                        help="where tables, plots and runs go; a run that is there is not repeated")  # fmt: skip
    args = parser.parse_args()
    if not 1 <= args.captions <= 144:
        parser.error("--captions: allowed: 1 to 144")
    quiet_libraries()
    bench_skip(args.out, args.captions, args.quick)
    print(f"The table and the plots: {args.out}")


if __name__ == "__main__":
    main()
