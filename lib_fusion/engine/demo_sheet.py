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
from lib_fusion.unet.model_file import LoraFile, ModelFile

FOLDER = Path(__file__).resolve().parents[2] / "demo"

#: (base, expert, prompt, width, height): scenes whose pair of objects no model has been trained on.
SCENES = (
    ("animals", "vehicles", "a fox left of a tractor, flat drawing", 256, 128),
    ("animals", "vehicles", "a helicopter left of a panda, glossy render", 256, 128),
    ("food", "animals", "an owl left of a lemon, flat drawing", 256, 128),
    ("vehicles", "food", "a rocket left of a strawberry, glossy render", 256, 128),
    ("general+demo-animals", "general+demo-vehicles", "an owl left of a bicycle, flat drawing", 256, 128),
)
#: Aggregator file -> the models it is for; the first that has both of a scene's draws it.
ENSEMBLES = {
    "afa-animals-vehicles": ("animals", "vehicles"),
    "afa-animals-vehicles-food": ("animals", "vehicles", "food"),
}
CFG_SCALE = 5.0
#: The columns of the default settings, and of both LoRAs on one model.
FUSED, STACKED = "fused", "both LoRAs at once"
#: The timestep at which AFA takes over from the average (docs/afa.md), and the settings that make it so.
AFA_FROM = 500.0
AVERAGE_FIRST: dict[str, Any] = {"snb_window": (AFA_FROM, 0.0), "snb_outside": "average"}


def make_sheet(
    out: Path, steps: int, seed: int, dtype: torch.dtype, device: torch.device, progress: bool = False
) -> dict:
    """Draws every scene by each method, writes the sheet, returns a record of seconds and U-Net calls per method."""
    if not (FOLDER / "animals.safetensors").is_file():
        raise CheckpointError(f"{FOLDER}: no demo checkpoints there; run this from a clone of the repository")
    studio = Studio(dtype, device, progress)
    rows: list[tuple[str, list[Image.Image]]] = []
    heads: dict[int, list[str]] = {}
    for number, (base, expert, prompt, width, height) in enumerate(SCENES):
        generation = GenerationSettings(
            (prompt,), width=width, height=height, steps=steps, seed=seed + number, cfg_scale=CFG_SCALE
        )
        methods = methods_of(base, expert)
        cells = [studio.draw(method, models, settings, generation) for method, (models, settings) in methods.items()]
        mask = mask_image(studio.masks[-1][1]).resize((width, height), Image.Resampling.NEAREST)
        rows.append((f"{prompt}  (base: {told(base)}, expert: {told(expert)})", [*cells, mask]))
        names = [*methods, "who draws where"]
        if number == 0 or names != list(heads.values())[-1]:
            heads[number] = names
    sheet(rows, heads[0], out, "Two models, one picture",
          "Fused: who draws where is decided in the first steps (orange: the expert), then both models' average draws, "
          "and the last third is each model's own.\nAFA: aggregators trained within an hour on one core; in the third "
          "and fourth row, of all three experts. The last row's models are one checkpoint with a LoRA each; nothing is "
          "loaded twice.", heads)  # fmt: skip
    return {"sheet": str(out), "scenes": [list(scene) for scene in SCENES], "steps": steps, "seed": seed,
            "fusion": asdict(FusionSettings(experts=(ExpertSettings(SCENES[0][1]),))),
            "runs": list(studio.runs.values())}  # fmt: skip


class Studio:
    """The engines, each loaded once; what they drew, and how long they took. ``masks`` are those drawn last."""

    def __init__(self, dtype: torch.dtype, device: torch.device, progress: bool) -> None:
        self.dtype, self.device, self.progress = dtype, device, progress
        self.runs: dict[str, dict[str, Any]] = {}
        self.masks: list[tuple[Any, Any]] = []
        self._engines: dict[tuple[str, ...], Engine] = {}

    def draw(
        self, method: str, models: tuple[str, ...], settings: FusionSettings, generation: GenerationSettings
    ) -> Image.Image:
        if models not in self._engines:
            first, *rest = (model_file(name) for name in models)
            self._engines[models] = Engine(first, rest, dtype=self.dtype, device=self.device)
        keep = Keep.read(["masks"] if method == FUSED else [])
        run = self._engines[models].generate(generation, settings, keep=keep, progress=self.progress)
        self.masks = run.pictures[0].records.masks or self.masks
        total = self.runs.setdefault(method, {"method": method, "seconds": 0.0, "unet_calls": [], "unet_rows": []})
        total["seconds"] += run.record["seconds"]
        total["unet_calls"] += run.record["unet_calls"]
        total["unet_rows"] += run.record["unet_rows"]
        return run.pictures[0].image


def methods_of(base: str, expert: str) -> dict[str, tuple[tuple[str, ...], FusionSettings]]:
    """Name -> (models, settings) of a row's pictures; two LoRAs have the usual way in the place of AFA."""
    pair = (base, expert)
    fused = FusionSettings(experts=(ExpertSettings(expert),))
    methods = {
        "base": (pair, single(fused, 0)),
        "expert": (pair, single(fused, 1)),
        "average": (pair, replace(fused, method="Average", guidance="off")),
        "SNB (paper)": (pair, FusionSettings.from_dict({**PAPER, "experts": fused.to_dict()["experts"]})),
    }
    if "+" in expert:
        stacked = f"{base}+{expert.partition('+')[2]}"
        return {**methods, STACKED: ((stacked,), FusionSettings()), FUSED: (pair, fused)}
    file, models = next((f, m) for f, m in ENSEMBLES.items() if {*pair} <= set(m))
    return {**methods, "average, then AFA": (models, average_first(afa_settings(file, models))), FUSED: (pair, fused)}


def model_file(name: str) -> ModelFile:
    """A checkpoint of the demo, with LoRAs of it after a +."""
    checkpoint, *loras = name.split("+")
    return ModelFile(FOLDER / f"{checkpoint}.safetensors",
                     tuple(LoraFile(FOLDER / f"loras/{lora}.safetensors") for lora in loras))  # fmt: skip


def told(name: str) -> str:
    """A model for people."""
    return name.replace("+demo-", " + LoRA ")


def afa_settings(file: str, models: tuple[str, ...]) -> FusionSettings:
    """AFA with a file of the demo and the models it is for, the base first."""
    experts = tuple(ExpertSettings(name) for name in models[1:])
    return FusionSettings(
        experts=experts, method="AFA", afa_aggregator=str(FOLDER / f"{file}.safetensors"), guidance="off"
    )


def average_first(afa: FusionSettings) -> FusionSettings:
    """AFA's settings with the average of the models while there is more noise than picture."""
    return replace(afa, **AVERAGE_FIRST)
