"""``python -m benchmarks.skip``: fidelity against cost of skipping, beside the controls it must beat.

Every run is compared with the unskipped one of the same sampler, steps, guidance, captions and seeds. Pictures are kept
under the output folder, so that an interrupted benchmark goes on where it was, and runs serve several comparisons. All
is measured on the first eight captions before it is measured on the next.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.deepcache import cached_share, deep_cache, make_diffusers_engine
from benchmarks.kept import file_name, load_or_make
from benchmarks.measures import FeatureDistance, psnr, ssim
from benchmarks.peers import PEERS, Course, list_peers
from benchmarks.skip_report import OURS, compare_with_ours, plot, write_markdown, write_table
from lib_fusion.engine.demo_sheet import FOLDER
from lib_fusion.engine.generate import Engine
from lib_fusion.engine.loader import quiet_libraries
from lib_fusion.fusion.policies import Skips
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import ExpertSettings, FusionSettings, GenerationSettings

SAMPLERS = ("DDIM", "Euler Karras", "DPM++ 2M Karras", "Euler", "DPM++ 2M")
NOISY = ("Euler a", "DPM++ 2M SDE Karras")
STEPS = (50, 30, 20)
GUIDANCE = (7.0, 4.0)
#: Lengths at which fewer steps are measured, for all of STEPS; between them PSNR is interpolated.
LENGTHS = (11, 13, 16, 20, 25, 30, 38)
#: Policies by name. Those of OURS and the paper's are measured in every cell, the others at the first guidance scale.
POLICIES: dict[str, dict[str, Any]] = {
    **{name: {"skipping": "Forecast", **values} for name, values in OURS.items()},
    "paper 0.01": {"skipping": "Paper"},
    "Faithful, uncorrected": {"skipping": "Forecast", "skip_correct": False},
    "paper 0.03": {"skipping": "Paper", "skip_threshold": 0.03},
}
EVERYWHERE = len(OURS) + 1
#: Peers that are measured with samplers that add noise.
NOISY_PEERS = ("ZEUS, 1 of 3 computed", "SADA, no Lagrange")
INTERVALS = (2, 3)
#: Fused pairs: base, expert, guidance scale, and whether the expert is the base's own fine-tune.
PAIRS = (("general", "animals", 4.0), ("general", "vehicles", 4.0), ("animals", "vehicles", 7.0))
PAIR_CELLS = (("DDIM", 50), ("DPM++ 2M Karras", 50), ("DPM++ 2M Karras", 30))
#: So many pictures are drawn together; FIRST_SEED is the first one's.
PART, FIRST_SEED = 8, 2000
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
        return file_name(f"{where}{self.sampler}-{self.steps}-{self.guidance:g}-{self.method}")


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
        self._compared: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.distance = FeatureDistance()
        self.captions = list_captions(count)
        self.parts = -(-count // PART)
        (out / "runs").mkdir(parents=True, exist_ok=True)

    def path(self, job: Job, part: int) -> Path:
        return self.out / "runs" / f"{job.name}-{part}.npz"

    def run(self, job: Job, part: int) -> Result:
        """The result on a part of the captions, from its file where it has been run before."""
        stored = load_or_make(self.path(job, part), lambda: vars(self._run(job, part)))
        return Result(stored["pictures"], float(stored["rows"]), float(stored["seconds"]))

    def measured(self, *jobs: Job) -> int:
        """How many parts all of these jobs have been run on."""
        return next((i for i in range(self.parts) if not all(self.path(job, i).exists() for job in jobs)), self.parts)

    def stored(self, job: Job, parts: int) -> Result:
        """The result on the first parts together."""
        results = [self.run(job, part) for part in range(parts)]
        pictures = [result.pictures for result in results]
        rows = float(np.average([result.rows for result in results], weights=[len(p) for p in pictures]))
        return Result(np.concatenate(pictures), rows, sum(result.seconds for result in results))

    def compare(self, job: Job, reference: Job) -> dict[str, Any]:
        """A line of the table: what a run has cost and how far its pictures are from the reference's."""
        parts = self.measured(job, reference)
        key = (job.name, reference.name, parts)
        if key in self._compared:
            return self._compared[key]
        result, full = self.stored(job, parts), self.stored(reference, parts)
        dbs, similar = psnr(result.pictures, full.pictures), ssim(result.pictures, full.pictures)
        far = self.distance(result.pictures, full.pictures)
        self._compared[key] = {
            "models": "+".join(job.pair or ("general",)), "sampler": job.sampler, "steps": reference.steps,
            "guidance": job.guidance,
            "method": job.method if job.method != "unskipped" else f"fewer steps: {job.steps}",
            "pictures": len(dbs), "rows": round(result.rows * job.steps / reference.steps, 4),
            "seconds": round(result.seconds, 2), "unskipped_seconds": round(full.seconds, 2),
            "psnr_mean": round(dbs.mean(), 2), "psnr_median": round(float(np.median(dbs)), 2),
            "psnr_worst": round(dbs.min(), 2), "ssim_mean": round(similar.mean(), 5),
            "ssim_worst": round(similar.min(), 4), "distance_mean": round(float(far.mean()), 6),
            "distance_worst": round(float(far.max()), 6),
        }  # fmt: skip
        return self._compared[key]

    def _run(self, job: Job, part: int) -> Result:
        engine = self._engine(job)
        jobs = [(text, FIRST_SEED + i) for i, text in enumerate(self.captions)][part * PART : (part + 1) * PART]
        generation = GenerationSettings(
            tuple(text for text, _ in jobs), width=SIZE, height=SIZE, steps=job.steps, sampler=job.sampler,
            cfg_scale=job.guidance,
        )  # fmt: skip
        experts = tuple(ExpertSettings(name) for name in (job.pair or ())[1:])
        session = FusionSession(FusionSettings(experts=experts, **job.values))
        if job.method in PEERS:
            course = Course.of(job.sampler, job.steps)
            session.skips = Skips(session.settings, make=lambda _model, _picture: PEERS[job.method](course))
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


def list_captions(count: int) -> list[str]:
    """Captions of the demo's training set in both styles, without each third one: on those policies were chosen."""
    lines = (FOLDER / "images/metadata.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for i, line in enumerate(lines) if i % 3]
    step = max(1, len(texts) // count) | 1  # odd, so that both styles come
    return [texts[i * step % len(texts)] for i in range(count)]


def list_jobs(quick: bool) -> Iterator[Job]:
    """All runs of the benchmark, the ones that matter most first."""
    guidance, samplers, steps = (GUIDANCE[:1], SAMPLERS[:1], (50, 20)) if quick else (GUIDANCE, SAMPLERS, STEPS)
    everywhere, others = list(POLICIES.items())[:EVERYWHERE], list(POLICIES.items())[EVERYWHERE:]
    cells = [(s, n, w) for w in guidance for n in steps for s in samplers]
    for s, n, w in cells if quick else [(s, n, w) for w in guidance for n in steps for s in (*SAMPLERS, *NOISY)]:
        yield Job("unskipped", s, n, w)
        for name, values in everywhere:
            yield Job(name, s, n, w, values)
        for name in list_peers(n):
            if s in SAMPLERS or name in NOISY_PEERS:
                yield Job(name, s, n, w, {"skipping": "Paper"})
    for w in guidance:
        for s in samplers:
            for n in LENGTHS:
                yield Job("unskipped", s, n, w)
    for s, n, w in cells:
        if w == guidance[0]:
            for interval in INTERVALS:
                yield Job(f"DeepCache {interval}", s, n, w, interval=interval)
            for name, values in others:
                yield Job(name, s, n, w, values)
    yield from () if quick else list_pairs()


def list_pairs() -> Iterator[Job]:
    """The fused pairs' runs."""
    for base, expert, w in PAIRS:
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
            if bench.measured(job, reference):
                lines.append(dict(bench.compare(job, reference)))
    compare_with_ours(lines)
    return lines


def bench_skip(out: Path, count: int = 32, quick: bool = False, progress: bool = True) -> list[dict[str, Any]]:
    """Runs the benchmark into a folder: skip.csv, skip.md and skip.png, renewed as it goes on."""
    bench, jobs = Bench(out, count), list(dict.fromkeys(list_jobs(quick)))
    lines: list[dict[str, Any]] = []
    todo = [(part, job) for part in range(bench.parts) for job in jobs]
    for i, (part, job) in enumerate(todo):
        bench.run(job, part)
        if progress:
            print(f"{i + 1}/{len(todo)} {job.name}", flush=True)
        if i % 50 == 49 or i == len(todo) - 1:
            lines = measure(bench, jobs)
            if lines:
                write_table(lines, out / "skip.csv")
                write_markdown(lines, out / "skip.md")
                plot(lines, out / "skip.png")
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
