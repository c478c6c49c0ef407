"""Trains the demo's AFA aggregators with the project's own commands: ``python -m demo.aggregators``. Resumable.

Writes two captioned folders for each ensemble, one to train on and one held out, then calls ``cache``, ``train`` and
``evaluate`` as a person would. Held out are one pair of concepts in six (as for the experts) and one single object in
six (whose concept does occur in training scenes). Unlike the experts' own scenes, all objects here are sharp.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from demo.concepts import CATEGORIES, CATEGORY_OF, CONCEPTS, LAYOUTS, STYLES, is_held_out, scene_caption, single_caption
from demo.data import render
from lib_fusion.cli import main as command
from lib_fusion.engine.demo_sheet import ENSEMBLES

HERE = Path(__file__).resolve().parent
TRAINING_SCENES, HELD_OUT_SCENES = 1200, 96
#: Share of the training batches that are single objects.
SINGLES = 0.4
#: The published width is 128; a file of the demo must be small.
SIZES = ("--hidden", "12", "--layers", "1", "--heads", "3")


def single_is_held_out(name: str) -> bool:
    return CONCEPTS.index(name) % 6 == 3


def write_folder(data: Path, folder: Path, experts: tuple[str, ...], held_out: bool) -> None:
    """A captioned folder of single objects and scenes; in scenes the objects are of two categories."""
    if (folder / "metadata.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pictures = render(data)
    names = [name for category in experts for name in CATEGORIES[category]]
    lines = []

    def picture(name: str, style: str) -> np.ndarray:
        return pictures[CATEGORIES[CATEGORY_OF[name]][name], style]

    def save(array: np.ndarray, caption: str, subset: str, repeats: float) -> None:
        file = f"{len(lines):05d}.png"
        Image.fromarray(array).save(folder / file)
        lines.append(json.dumps({"file_name": file, "text": caption, "subset": subset, "repeats": repeats}))

    scenes = HELD_OUT_SCENES if held_out else TRAINING_SCENES
    singles = [(n, s) for n in names for s in STYLES if single_is_held_out(n) == held_out]
    repeats = 1.0 if held_out else SINGLES / (1 - SINGLES) * scenes / len(singles)
    for name, style in singles:
        save(picture(name, style), single_caption(name, style), CATEGORY_OF[name], repeats)
    chance = random.Random(f"{experts} {held_out}")
    while scenes:
        first, second, style = chance.choice(names), chance.choice(names), chance.choice(list(STYLES))
        if CATEGORY_OF[first] == CATEGORY_OF[second] or is_held_out(first, second) != held_out:
            continue
        vertical = chance.random() < 0.5
        layout = chance.choice([name for name in LAYOUTS if name != ("left" if vertical else "above")])
        both = np.concatenate([picture(first, style), picture(second, style)], axis=0 if vertical else 1)
        save(both, scene_caption(first, second, layout, style), "scenes", 1.0)
        scenes -= 1
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def run(*words: object) -> None:
    print("python -m lib_fusion", *words, flush=True)
    if command([str(word) for word in words]):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.aggregators", description=__doc__.splitlines()[0])
    parser.add_argument("ensemble", nargs="?", choices=list(ENSEMBLES), help="only this one")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--data", type=Path, default=HERE / "data-cache", help="where demo.train keeps the pictures")
    parser.add_argument("--state", type=Path, default=HERE / "state", help="where folders, caches and runs are kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where the aggregator files are written")
    args = parser.parse_args()
    for name, experts in ENSEMBLES.items():
        if args.ensemble not in (None, name):
            continue
        models = [word for expert in experts for word in ("--model", HERE / f"{expert}.safetensors")]
        for part in ("train", "held-out"):
            pictures, cache = args.state / f"{name}-{part}", args.state / f"{name}-{part}-cache"
            write_folder(args.data, pictures, experts, part == "held-out")
            run("cache", "--source", pictures, "--cache", cache, *models, "--resolution", 0)
        trained = args.state / f"{name}.safetensors"
        run("train", "--cache", args.state / f"{name}-train-cache", *models, "--out", trained, "--steps", args.steps,
            "--batch-size", 8, "--learning-rate", "2e-3", "--schedule", "cosine", "--warm-up", 50, "--ema", "0.995",
            "--min-snr", 2, *SIZES)  # fmt: skip
        for part in ("train", "held-out"):
            for extra in ((), ("--no-captions",)):
                out = args.state / f"{name}-{part}-evaluation{'-no-captions' if extra else ''}"
                run("evaluate", "--cache", args.state / f"{name}-{part}-cache", *models, "--aggregator", trained,
                    "--out", out, "--timesteps", 150, 400, 650, *extra)  # fmt: skip
        (args.out / trained.name).write_bytes(trained.read_bytes())


if __name__ == "__main__":
    main()
