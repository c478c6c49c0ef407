"""Compares ways of drawing two LoRAs in one picture: ``python -m demo.compare_loras`` (an hour on one core).

All 40 held-out pairs of ``demo.assess`` with two seeds each; the models are the general one with the LoRAs of
``demo.train_lora``. Every way's scores are kept by picture in the folder of results, so that an interrupted run
resumes; ``--table`` writes docs/measurements/lora-experts.csv and the tables of lora-experts.md there from those that
are there, ``--picture`` docs/two-loras.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from demo.assess import HERE, Scorer, load_engine, reference_latents
from demo.data import render
from demo.report import table
from demo.rules import file_of, measure
from demo.scenes import CFGS, paper, placed
from lib_fusion.engine.loader import quiet_libraries
from lib_fusion.engine.sheets import sheet
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import FusionSettings, GenerationSettings

PAGE = HERE.parent / "docs/measurements/lora-experts.md"
DATA = PAGE.with_suffix(".csv")
SAMPLER, STEPS = "DPM++ 2M Karras", 20
#: The picture's scenes, of pairs that nothing was trained on, and their seeds.
SCENES = {
    "a fox left of a tractor, flat drawing": 0, "a helicopter left of a panda, glossy render": 1,
    "an owl left of a bicycle, flat drawing": 2,
}  # fmt: skip
COLUMNS = ("animals", "vehicles", "rms animals", "rms vehicles")
#: A in the base and B as its expert; or both as experts of the base without either.
PAIR = ("general+animals", "general+vehicles")
TRIPLE = ("general", *PAIR)


@dataclass
class Switch(FusionSession):
    """One LoRA at a time, the next one every ``every`` steps.

    LoRA Switch of Zhong et al., "Multi-LoRA Composition for Image Generation" (2024).
    """

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.blend.models_at = self._one_at  # type: ignore[method-assign]

    def _one_at(self, timestep: float) -> tuple[int, ...]:
        levels = self.schedule.levels[:-1]
        step = min(range(len(levels)), key=lambda i: abs(levels[i] - timestep))
        return (step // self.every % self.num_models,)


def ways() -> dict[str, tuple[Sequence[str], FusionSettings, dict[str, Any]]]:
    """Name -> (models, settings, what else ``draw`` takes). A: the LoRA of animals, B: that of vehicles."""

    def default(models: Sequence[str], **changes: Any) -> FusionSettings:
        experts = [{"checkpoint": name} for name in models[1:]]
        return FusionSettings.from_dict({"experts": experts, **changes})

    one = paper("B")
    alone, lower = FusionSettings(), FusionSettings(guidance="always")
    guidance = {"guidance": "with experts"}
    return {
        "A alone": (PAIR[:1], alone, {}),
        "B alone": (PAIR[1:], alone, {}),
        "stacked, 1 + 1": (("general+animals+vehicles",), alone, {}),
        "A in the base, B its expert: default": (PAIR, default(PAIR), {}),
        "base, A, B: default, divergence": (TRIPLE, default(TRIPLE, snb_saliency="divergence"), {}),
        "stacked, 0.5 + 0.5": (("general+animals:0.5+vehicles:0.5",), alone, {}),
        "average (LoRA Composite)": (PAIR, replace(one, method="Average"), {}),
        "in turn, every step (LoRA Switch)": (PAIR, one, {"session": Switch}),
        "SNB (paper)": (PAIR, one, {}),
        "SNB, held at once": (PAIR, paper("B", snb_hold=900), {}),
        "right mask": (PAIR, placed(one), {}),
        "right mask, guidance 1 below 400": (PAIR, replace(placed(one), **guidance), {}),
        "base, A, B: default": (TRIPLE, default(TRIPLE), {}),
        "average, guidance 1 below 400": (PAIR, replace(one, method="Average", **guidance), {}),
        "stacked, 1 + 1, guidance 1 below 400": (("general+animals+vehicles",), lower, {}),
        "in turn, every 5 steps (LoRA Switch)": (PAIR, one, {"session": partial(Switch, every=5)}),
        "base, A, B: SNB, held at once": (TRIPLE, paper("A", "B", snb_hold=900), {}),
        "base alone": (("general",), alone, {}),
        "A alone, guidance 1 below 400": (PAIR[:1], lower, {}),
        "B alone, guidance 1 below 400": (PAIR[1:], lower, {}),
        "stacked, 0.7 + 0.7": (("general+animals:0.7+vehicles:0.7",), alone, {}),
    }


def run(names: Sequence[str], cfgs: Sequence[float], data: Path, results: Path) -> None:
    render(data)
    results.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(reference_latents(load_engine("general"), data))
    for cfg in cfgs:
        for name in names:
            path = file_of(results, f"lora {name}", cfg)
            if not path.exists():
                models, fusion, drawing = ways()[name]
                scores = measure(models, fusion, cfg, scorer, steps=STEPS, sampler=SAMPLER, **drawing)
                path.write_text(json.dumps(scores), "utf-8")
                print(f"{name}, CFG {cfg:g}:", *summary(scores), flush=True)


def summary(scores: Sequence[dict[str, float]]) -> list[object]:
    """A row of the table: shares, and mean distances."""

    def mean(key: str) -> float:
        return sum(s[key] for s in scores) / len(scores)

    return [mean("animals"), mean("vehicles"), mean("both"), mean("both rms"),
            f"{mean('rms animals'):.3f}", f"{mean('rms vehicles'):.3f}"]  # fmt: skip


def write_page(results: Path) -> None:
    """The tables of the page, between its marks, and the raw scores."""
    found = {
        (cfg, name): json.loads(file.read_text("utf-8"))
        for cfg in CFGS for name in ways() if (file := file_of(results, f"lora {name}", cfg)).exists()
    }  # fmt: skip
    with DATA.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["CFG", "way", "picture", *COLUMNS])
        for (cfg, name), scores in found.items():
            for i, s in enumerate(scores):
                writer.writerow([f"{cfg:g}", name, i, *(f"{s[key]:.3f}".replace(".000", "") for key in COLUMNS)])
    head = ["way", "animal sharp", "vehicle sharp", "both sharp", "both near", "rms animal", "rms vehicle"]
    parts = []
    for cfg in CFGS[::-1]:
        rows = [[name, *summary(scores)] for (own, name), scores in found.items() if own == cfg]
        if rows:
            parts += [f"### CFG {cfg:g}", table(head, rows)]
    tables = "\n\n".join(["<!-- tables -->", *parts, "<!-- end of tables -->"])
    text = PAGE.read_text("utf-8")
    page = re.sub(r"<!-- tables -->.*<!-- end of tables -->", lambda _: tables, text, flags=re.DOTALL)
    PAGE.write_text(page, "utf-8")


def draw_picture(path: Path) -> None:
    """README's picture: what users do with two LoRAs, and both in one picture by the default settings."""
    one = FusionSettings.from_dict({"experts": [{"checkpoint": "B"}]})
    columns = {
        "LoRA of animals": (PAIR[:1], FusionSettings()),
        "LoRA of vehicles": (PAIR[1:], FusionSettings()),
        "both in one prompt": (("general+animals+vehicles",), FusionSettings()),
        "fused": (PAIR, one),
    }
    rows: list[list[Image.Image]] = [[] for _ in SCENES]
    for models, fusion in columns.values():
        engine = load_engine(*models)
        for row, (prompt, seed) in zip(rows, SCENES.items(), strict=True):
            generation = GenerationSettings(
                (prompt,), width=256, height=128, steps=30, sampler=SAMPLER, cfg_scale=5.0, seed=seed
            )
            row.append(engine.generate(generation, fusion).pictures[0].image)
    sheet(list(zip(SCENES, rows, strict=True)), list(columns), path, "Two LoRAs, one picture", cell=256)


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.compare_loras", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data-cache", help="where demo.train keeps the pictures")
    parser.add_argument("--results", type=Path, default=HERE / "state", help="where the JSON files are kept")
    parser.add_argument("--ways", nargs="+", choices=list(ways()), default=list(ways()), help="only these")
    parser.add_argument("--cfg", type=float, nargs="+", default=list(CFGS)[::-1], help="guidance scales")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument("--picture", action="store_true", help="only draw the picture")
    args = parser.parse_args()
    quiet_libraries()
    if args.picture:
        draw_picture(HERE.parent / "docs/two-loras.png")
        return
    if not args.table:
        run(args.ways, args.cfg, args.data, args.results)
    write_page(args.results)


if __name__ == "__main__":
    main()
