"""Compares rules of who draws where, and how hard it is guided: ``python -m demo.rules`` (hours on one core).

All 40 held-out pairs of ``demo.assess`` with two seeds each. Every rule's scores are kept by picture in the folder of
results, so that an interrupted run resumes; ``--table`` writes docs/measurements/fusion-rules.md from them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo.assess import Scorer, draw, load_engine, oracle_masks, reference_latents
from demo.data import render
from demo.report import table
from demo.scenes import CFGS, RMS_BOUND, SEEDS, paper, placed, scenes
from lib_fusion.engine.demo_sheet import AVERAGE_FIRST, FOLDER
from lib_fusion.engine.loader import quiet_libraries
from lib_fusion.requests.settings import FusionSettings

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs/measurements/fusion-rules.md"
PAIRS_A_LAYOUT = 10
TWO, GENERAL, ALL, THREE = (
    ("animals", "vehicles"), ("general", "animals"), ("general", "animals", "vehicles"), ("animals", "vehicles", "food")
)  # fmt: skip
#: The held mask used at once, which others are compared with picture by picture.
HELD = "held at once"


def rules() -> dict[str, tuple[tuple[str, ...], FusionSettings]]:
    """Name -> (models, settings), the ones that matter most first."""

    def default(models: Sequence[str], **changes: Any) -> FusionSettings:
        experts = [{"checkpoint": name} for name in models[1:]]
        return FusionSettings.from_dict({"experts": experts, **changes})

    afa = {"method": "AFA", "afa_aggregator": str(FOLDER / "afa-animals-vehicles.safetensors"), **AVERAGE_FIRST}
    mask = placed(paper("vehicles"))
    lower = {"guidance": "with experts", "guidance_until": 500, "guidance_after": 2}
    return {
        HELD: (TWO, paper("vehicles", snb_hold=900)),
        "default": (TWO, default(TWO)),
        "default, one guidance scale": (TWO, default(TWO, guidance="off")),
        "default, guidance 2 below 500": (TWO, default(TWO, **lower)),
        "general + two: default, divergence": (ALL, default(ALL, snb_saliency="divergence")),
        "general + two: divergence, guidance 2 below 500": (ALL, default(ALL, snb_saliency="divergence", **lower)),
        "held at once, guidance 2 below 500": (TWO, paper("vehicles", snb_hold=900, **lower)),
        "SNB (paper)": (TWO, paper("vehicles")),
        "average": (TWO, paper("vehicles", method="Average")),
        "right mask": (TWO, mask),
        "right mask, guidance 2 below 500": (TWO, replace(mask, **lower)),
        "average, then AFA": (TWO, paper("vehicles", **afa)),
        "average, then AFA, guidance 2 below 500": (TWO, paper("vehicles", **afa, **lower)),
        "three experts: default": (THREE, default(THREE)),
        "general + one: default": (GENERAL, default(GENERAL)),
        "general + one: default, code": (GENERAL, default(GENERAL, snb_saliency="code")),
        "general + one: default, divergence": (GENERAL, default(GENERAL, snb_saliency="divergence")),
        "general + one: held at once, code": (GENERAL, paper("animals", snb_hold=900, snb_saliency="code")),
        "general + two: held at once": (ALL, paper("animals", "vehicles", snb_hold=900)),
    }


def measure(
    models: Sequence[str], fusion: FusionSettings, cfg: float, scorer: Scorer, **drawing: Any
) -> list[dict[str, float]]:
    """The scores of all pictures by these models and settings; ``drawing``: what else ``draw`` takes."""
    engine, result = load_engine(*models), []
    for vertical in (False, True):
        group = [s for s in scenes(PAIRS_A_LAYOUT) if s.vertical == vertical for _ in SEEDS]
        seeds = [seed + i for i in range(len(group) // len(SEEDS)) for seed in SEEDS]
        masks = oracle_masks(group) if fusion.experts and fusion.experts[0].is_painted else None
        size = (256, 128) if vertical else (128, 256)
        z = draw(engine, [s.caption for s in group], seeds, size, cfg, fusion, masks, **drawing)
        result += [scorer.scene(latent, scene) for scene, latent in zip(group, z, strict=True)]
    return result


def summary(scores: Sequence[dict[str, float]], held: Sequence[dict[str, float]] | None) -> list[object]:
    """A row of the table: shares and mean distance, and objects lost and won against the held mask used at once."""

    def mean(key: str) -> float:
        return sum(s[key] for s in scores) / len(scores)

    row: list[object] = [mean("both"), mean("animals"), mean("vehicles"), mean("both rms")]
    row.append(f"{(mean('rms animals') + mean('rms vehicles')) / 2:.3f}")
    if held is None:
        return [*row, "", ""]
    pairs = [(now[key], then[key]) for now, then in zip(scores, held) for key in ("animals", "vehicles")]
    return [*row, sum(now < then for now, then in pairs), sum(now > then for now, then in pairs)]


def write_page(results: Path) -> Path:
    """The page from all results that are there."""
    parts = [f"""# Which rule draws best

Made by `python -m demo.rules` on the demo's small checkpoints: all 40 held-out pairs of an animal and a vehicle, two
seeds each (80 pictures), DDIM, 50 steps. *sharp*: the nearest of 144 references is the right concept, sharp. *near*:
both objects closer than {RMS_BOUND} (RMS) to the right latent; *rms*: their mean distance. *lost*, *won*: objects that
the held mask used at once draws sharp and the rule does not, and the other way round.

The distance to the taught pictures rewards weak guidance as such, so read it beside the shares and the pictures.
**These checkpoints have memorised few pictures; nothing here is a claim about real ones.**"""]  # fmt: skip
    head = ["rule", "both sharp", "animal", "vehicle", "both near", "rms", "lost", "won"]
    for cfg in CFGS:
        files = {name: file_of(results, name, cfg) for name in rules()}
        found = {name: json.loads(file.read_text("utf-8")) for name, file in files.items() if file.exists()}
        rows = [[name, *summary(scores, found.get(HELD))] for name, scores in found.items()]
        parts += [f"## CFG {cfg:g}", table(head, rows)]
    notes = results / "rules-notes.md"
    if notes.exists():
        parts.append(notes.read_text("utf-8").strip())
    PAGE.write_text("\n\n".join(parts) + "\n", "utf-8")
    return PAGE


def file_of(results: Path, name: str, cfg: float) -> Path:
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return results / f"rule {plain} {cfg:g}.json"


def run(names: Iterable[str], cfgs: Sequence[float], data: Path, results: Path) -> None:
    render(data)
    results.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(reference_latents(load_engine("general"), data))
    for name in names:
        for cfg in cfgs:
            path = file_of(results, name, cfg)
            if not path.exists():
                scores = measure(*rules()[name], cfg, scorer)
                path.write_text(json.dumps(scores), "utf-8")
                print(name, f"CFG {cfg:g}", summary(scores, None), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.rules", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data-cache", help="where demo.train keeps the pictures")
    parser.add_argument("--results", type=Path, default=HERE / "state", help="where the JSON files are kept")
    parser.add_argument("--rules", nargs="+", choices=list(rules()), default=list(rules()), help="only these")
    parser.add_argument("--cfg", type=float, nargs="+", default=list(CFGS)[::-1], help="guidance scales")
    parser.add_argument("--table", action="store_true", help="only write the page")
    args = parser.parse_args()
    quiet_libraries()
    if not args.table:
        run(args.rules, args.cfg, args.data, args.results)
    print(write_page(args.results))


if __name__ == "__main__":
    main()
