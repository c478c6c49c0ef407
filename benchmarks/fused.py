"""``python -m benchmarks.fused``: what two and three fused models cost with skipping, with crops, and with both.

Every run is compared with the same fusion unskipped; rows are shares of one unskipped model's. Runs are kept under the
output folder, so that an interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kept import file_name, load_or_make
from benchmarks.measures import psnr
from benchmarks.skip import FIRST_SEED, SIZE, list_captions
from demo.concepts import CATEGORY_OF
from demo.scenes import scenes
from lib_fusion.engine.demo_sheet import FOLDER
from lib_fusion.engine.generate import Engine
from lib_fusion.engine.loader import quiet_libraries
from lib_fusion.fusion.places import make_places
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import SKIP_PRESETS, FusionSettings, GenerationSettings

STEPS = 50
AMOUNTS = {"unskipped": {}, **{name: SKIP_PRESETS[name] for name in ("Faithful", "Balanced")}}
PAIR, TUNED, THREE = ("animals", "vehicles"), ("general", "animals"), ("animals", "vehicles", "food")


@dataclass(frozen=True)
class Case:
    """A line of the table: the models, the base first, and what is set for their fusion.

    ``halves``: pictures of an animal and a vehicle, each in a half that is said to be its model's.
    """

    title: str
    models: tuple[str, ...]
    guidance: float
    sampler: str = "DDIM"
    halves: bool = False
    values: Mapping[str, Any] = field(default_factory=dict, hash=False)


def list_cases() -> list[Case]:
    def afa(models: Sequence[str]) -> dict[str, str]:
        return {"method": "AFA", "afa_aggregator": str(FOLDER / f"afa-{'-'.join(models)}.safetensors")}

    crop, whole = {"place_crop": True}, {"guidance": "off"}
    return [
        Case("SNB: general + animals, its fine-tune, 4", TUNED, 4.0),
        Case("SNB: animals + vehicles, unrelated, 7", PAIR, 7.0),
        Case("the same, DPM++ 2M Karras", PAIR, 7.0, "DPM++ 2M Karras"),
        Case("the second without a guidance interval", PAIR, 7.0, values=whole),
        Case("the first without a guidance interval", TUNED, 4.0, values=whole),
        Case("places: animals + vehicles, a half for each, 7", PAIR, 7.0, halves=True),
        Case("the same, places only", PAIR, 7.0, halves=True, values=crop),
        Case("the same without a guidance interval", PAIR, 7.0, halves=True, values={**crop, **whole}),
        Case("AFA: animals + vehicles, 7", PAIR, 7.0, values=afa(PAIR)),
        Case("AFA: animals + vehicles + food, 7", THREE, 7.0, values=afa(THREE)),
    ]


@dataclass
class Result:
    """Pictures uint8 (N,H,W,3), those that stand upright turned, and the rows as a share of one unskipped model's."""

    pictures: np.ndarray
    rows: float


class Bench:
    """Draws each case once, and keeps what came of it."""

    def __init__(self, out: Path, count: int) -> None:
        self.out, self.count = out, count
        self.engines: dict[tuple[str, ...], Engine] = {}
        out.mkdir(parents=True, exist_ok=True)

    def run(self, case: Case, amount: str) -> Result:
        """The result, from its file where it has been run before."""
        path = self.out / f"{file_name(f'{case.title}-{amount}-{self.count}')}.npz"
        stored = load_or_make(path, lambda: vars(self._run(case, amount)))
        return Result(stored["pictures"], float(stored["rows"]))

    def _run(self, case: Case, amount: str) -> Result:
        if case.models not in self.engines:
            files = [FOLDER / f"{name}.safetensors" for name in case.models]
            self.engines[case.models] = Engine(files[0], files[1:])
        engine, pictures, rows = self.engines[case.models], [], 0.0
        skipping = {"skipping": "Forecast", **AMOUNTS[amount]} if amount != "unskipped" else {}
        for jobs, place, (height, width) in self._groups(case):
            experts = [{"checkpoint": name, **place} for name in case.models[1:]]
            fusion = FusionSettings.from_dict({"experts": experts, **case.values, **skipping})
            generation = GenerationSettings(
                tuple(text for text, _ in jobs), width=width, height=height, steps=STEPS, sampler=case.sampler,
                cfg_scale=case.guidance,
            )  # fmt: skip
            session = FusionSession(fusion, make_places(fusion, {}))
            images = engine.decode(engine.denoise(jobs, generation, session))
            turned = [np.asarray(image).swapaxes(0, 1) if height > width else np.asarray(image) for image in images]
            pictures += turned
            rows += sum(session.rows)
        return Result(np.stack(pictures), rows / (2 * STEPS * len(pictures)))

    def _groups(self, case: Case) -> Iterator[tuple[list[tuple[str, int]], dict[str, str], tuple[int, int]]]:
        """What is drawn together: (caption, seed), where the experts draw, and the pictures' height and width."""
        if not case.halves:
            captions = list_captions(32)[: self.count]
            yield [(text, FIRST_SEED + i) for i, text in enumerate(captions)], {}, (SIZE, SIZE)
            return
        groups: dict[tuple[bool, str], list[tuple[str, int]]] = {}
        for i, scene in enumerate(scenes(-(-self.count // 4))[: self.count]):
            where = "1" if CATEGORY_OF[scene.first] == "vehicles" else "2"
            groups.setdefault((scene.vertical, where), []).append((scene.caption, FIRST_SEED + i))
        for (vertical, where), jobs in groups.items():
            place = f"{'rows' if vertical else 'columns'} 1:1 {where}"
            yield jobs, {"place": place}, (2 * SIZE, SIZE) if vertical else (SIZE, 2 * SIZE)


def bench_fused(out: Path, count: int = 8, cases: Sequence[Case] = (), progress: bool = True) -> str:
    """Draws all that is missing, and writes the table, fused.md, after each line; returns it."""
    bench = Bench(out, count)
    lines = [["models, CFG", *AMOUNTS], ["---"] * (1 + len(AMOUNTS))]
    for case in cases or list_cases():
        full = bench.run(case, "unskipped")
        line = [case.title, f"{full.rows:.2f}"]
        for amount in list(AMOUNTS)[1:]:
            result = bench.run(case, amount)
            far = psnr(result.pictures, full.pictures)
            line.append(f"{result.rows:.2f}: {far.mean():.1f} ({far.min():.1f})")
        lines.append(line)
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        (out / "fused.md").write_text(text, encoding="utf-8")
        if progress:
            print(" | ".join(line), flush=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fused", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=8, metavar="N", help="pictures of each run, 1 to 32")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-fused"), help="where the table and runs go")
    args = parser.parse_args()
    if not 1 <= args.captions <= 32:
        parser.error("--captions: allowed: 1 to 32")
    quiet_libraries()
    bench_fused(args.out, args.captions)
    print(f"The table: {args.out / 'fused.md'}")


if __name__ == "__main__":
    main()
