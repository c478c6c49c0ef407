"""The contact sheet of ``python -m lib_fusion demo``: the demo's trained experts alone, averaged, and fused."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lib_fusion.engine.generate import Engine, single
from lib_fusion.engine.sheets import sheet
from lib_fusion.errors import CheckpointError
from lib_fusion.fusion.records import Keep
from lib_fusion.previews import mask_image
from lib_fusion.requests.presets import PAPER
from lib_fusion.requests.settings import ExpertSettings, FusionSettings, GenerationSettings

FOLDER = Path(__file__).resolve().parents[2] / "demo"

#: (base, expert, prompt, width, height): scenes whose pair of objects no model has been trained on.
SCENES = (
    ("animals", "vehicles", "a fox left of a tractor, flat drawing", 256, 128),
    ("animals", "vehicles", "a bus left of a panda, glossy render", 256, 128),
    ("food", "animals", "an owl left of a pizza, flat drawing", 256, 128),
    ("vehicles", "food", "a rocket left of a strawberry, glossy render", 256, 128),
)
#: Aggregator file -> the models it is for; the first that has both of a scene's draws it.
ENSEMBLES = {
    "afa-animals-vehicles": ("animals", "vehicles"),
    "afa-animals-vehicles-food": ("animals", "vehicles", "food"),
}
CFG_SCALE = 5.0
#: The column of the default settings.
FUSED = "fused"
#: The timestep at which AFA takes over from the average (docs/afa.md), and the settings that make it so.
AFA_FROM = 500.0
AVERAGE_FIRST: dict[str, Any] = {"snb_window": (AFA_FROM, 0.0), "snb_outside": "average"}


def make_sheet(
    out: Path, steps: int, seed: int, dtype: torch.dtype, device: torch.device, progress: bool = False
) -> dict:
    """Draws every scene by each method, writes the sheet, returns a record of seconds and U-Net calls per method."""
    if not (FOLDER / "animals.safetensors").is_file():
        raise CheckpointError(f"{FOLDER}: no demo checkpoints there; run this from a clone of the repository")
    engines: dict[tuple[str, ...], Engine] = {}
    rows: list[tuple[str, list[Image.Image]]] = []
    runs: dict[str, dict[str, Any]] = {}

    def engine_of(*names: str) -> Engine:
        if names not in engines:
            files = [FOLDER / f"{name}.safetensors" for name in names]
            engines[names] = Engine(files[0], files[1:], dtype=dtype, device=device)
        return engines[names]

    for number, (base, expert, prompt, width, height) in enumerate(SCENES):
        generation = GenerationSettings(
            (prompt,), width=width, height=height, steps=steps, seed=seed + number, cfg_scale=CFG_SCALE
        )
        fused = FusionSettings(experts=(ExpertSettings(expert),))
        file, models = next((f, m) for f, m in ENSEMBLES.items() if {base, expert} <= set(m))
        pair = (base, expert)
        methods = {
            "base": (pair, single(fused, 0)),
            "expert": (pair, single(fused, 1)),
            "average": (pair, replace(fused, method="Average", guidance="off")),
            "SNB (paper)": (pair, FusionSettings.from_dict({**PAPER, "experts": fused.to_dict()["experts"]})),
            "average, then AFA": (models, average_first(afa_settings(file, models))),
            FUSED: (pair, fused),
        }
        cells: list[Image.Image] = []
        masks: list = []
        for method, (names, settings) in methods.items():
            keep = Keep.read(["masks"] if method == FUSED else [])
            run = engine_of(*names).generate(generation, settings, keep=keep, progress=progress)
            cells.append(run.pictures[0].image)
            masks = run.pictures[0].records.masks or masks
            total = runs.setdefault(method, {"method": method, "seconds": 0.0, "unet_calls": [], "unet_rows": []})
            total["seconds"] += run.record["seconds"]
            total["unet_calls"] += run.record["unet_calls"]
            total["unet_rows"] += run.record["unet_rows"]
        cells.append(mask_image(masks[-1][1]).resize((width, height), Image.Resampling.NEAREST))
        rows.append((f"{prompt}  (base: {base}, expert: {expert})", cells))
    sheet(rows, [*methods, "who draws where"], out, "Two checkpoints, one picture",
          "Fused: who draws where is decided in the first steps (orange: the expert), then both models' average draws, "
          "and the last third is each model's own.\nAFA: aggregators trained within an hour on one core; in the last "
          "two rows, of all three experts.")  # fmt: skip
    return {"sheet": str(out), "scenes": [list(scene) for scene in SCENES], "steps": steps, "seed": seed,
            "fusion": asdict(fused), "runs": list(runs.values())}  # fmt: skip


def afa_settings(file: str, models: tuple[str, ...]) -> FusionSettings:
    """AFA with a file of the demo and the models it is for, the base first."""
    experts = tuple(ExpertSettings(name) for name in models[1:])
    return FusionSettings(
        experts=experts, method="AFA", afa_aggregator=str(FOLDER / f"{file}.safetensors"), guidance="off"
    )


def average_first(afa: FusionSettings) -> FusionSettings:
    """AFA's settings with the average of the models while there is more noise than picture."""
    return replace(afa, **AVERAGE_FIRST)
