"""Writes docs/measurements/demo.md from what ``demo.assess`` measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from demo.concepts import CATEGORIES
from demo.scenes import HOLD, LAYOUTS, MODELS, RMS_BOUND, TIMESTEPS, methods

INTRO = """# What the demo's models can do, and what fusing them gives

Made by `python -m demo.assess`; the data design is described in [demo/README.md](../../demo/README.md). In scenes each
expert was taught its own category sharp and the others blurred, and the general model both blurred, so that a scene of
two categories is beyond any one model. **The blur was chosen to make competence visible. It is no property of real
checkpoints, and nothing here is a claim about them.**
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *(line(row) for row in rows)])


def models_section(results: dict) -> str:
    losses = list(results["general"]["loss"])
    parts = [
        "## The four models",
        f"Denoising loss (noise MSE, mean over t = {', '.join(map(str, TIMESTEPS))}) on all pictures of a category "
        "with fresh noise, and on either half of sharp scenes of held-out pairs:",
        table(["model", *losses], ([m, *(f"{results[m]['loss'][k]:.3f}" for k in losses)] for m in MODELS)),
        "Right concept in generated pictures of single objects (each concept in both styles, fresh seeds, 50 DDIM "
        "steps, CFG 4), by the nearest of 144 references and by a small classifier (right on "
        f"{results['classifier on the pictures themselves']:.0%} of the pictures themselves):",
        table(
            ["model", *(f"{c}, {how}" for c in CATEGORIES for how in ("nearest", "classifier"))],
            ([m, *(results[m][how][c] for c in CATEGORIES for how in ("nearest", "classifier"))] for m in MODELS),
        ),
    ]
    return "\n\n".join(parts)


def scenes_section(results: dict) -> str:
    some = next(iter(next(iter(results.values())).values()))
    parts = [
        "## Scenes of an animal and a vehicle",
        f"Pairs that no model was trained on, {some['all']['pairs']} in all, seeds of each: {some['all']['seeds']}, "
        "50 DDIM steps. A is the animal expert, B the vehicle expert; the first named is the base. *sharp*: the "
        "nearest of 144 references (72 concepts, sharp and blurred) is the right concept, sharp. *rms*: both halves "
        f"closer than {RMS_BOUND} to the right sharp latent. Mask held: from timestep {HOLD:g}, five of the 50 steps. "
        "Where the caption names no sides, the better arrangement counts; the oracle mask then still fixes one.",
    ]
    for cfg, by_method in results.items():
        rows = [
            [m, *(r["all"][k] for k in ("animals", "vehicles", "both", "both rms"))] for m, r in by_method.items()
        ]
        head = ["method", "animal sharp", "vehicle sharp", "both sharp", "both rms"]
        parts += [f"### CFG {cfg}, all layouts", table(head, rows)]
        rows = [
            [m, *(r[layout]["both"] for layout in LAYOUTS), *(r[layout]["both rms"] for layout in LAYOUTS)]
            for m, r in by_method.items()
        ]
        head = ["method", *(f"{layout}: sharp" for layout in LAYOUTS), *(f"{layout}: rms" for layout in LAYOUTS)]
        parts += [f"### CFG {cfg}, both objects, by layout", table(head, rows)]
    return "\n\n".join(parts)


def singles_section(results: dict) -> str:
    rows = [
        [m, *(r[c][k] for c in ("animals", "vehicles") for k in ("hit", "rms"))] for m, r in results.items()
    ]
    return "\n\n".join([
        "## Single objects",
        "All 48 animals and vehicles in both styles, CFG 4. *hit*: the nearest reference is the right concept, sharp "
        "or not; *rms*: mean distance to it.",
        table(["method", "animals hit", "animals rms", "vehicles hit", "vehicles rms"], rows),
    ])  # fmt: skip


def write_report(results: Path, docs: Path) -> Path:
    """Reads models.json, singles.json and all scenes*.json in ``results``, where they are; returns the page's path."""
    def read(part: str) -> dict:
        return json.loads((results / f"{part}.json").read_text("utf-8"))

    docs.mkdir(exist_ok=True)
    path = docs / "demo.md"
    scenes: dict[str, dict] = {}
    for file in sorted(results.glob("scenes*.json")):
        for cfg, by_method in json.loads(file.read_text("utf-8")).items():
            scenes.setdefault(cfg, {}).update(by_method)
    scenes = {cfg: {m: by_method[m] for m in methods() if m in by_method} for cfg, by_method in scenes.items()}
    sections = [scenes_section(scenes)] if scenes else []
    if (results / "models.json").exists():
        sections.insert(0, models_section(read("models")))
    if (results / "singles.json").exists():
        sections.append(singles_section(read("singles")))
    notes = results / "notes.md"
    if notes.exists():
        sections.append(notes.read_text("utf-8").strip())
    path.write_text("\n\n".join([INTRO.strip(), *sections]) + "\n", "utf-8")
    return path
