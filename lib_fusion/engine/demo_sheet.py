"""``python -m lib_fusion demo``: scenes that need two models, by either alone, in the plain ways, and fused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from lib_fusion.engine.generate import Engine, single
from lib_fusion.engine.sheets import sheet
from lib_fusion.errors import CheckpointError
from lib_fusion.fusion.records import Keep
from lib_fusion.previews import mask_image
from lib_fusion.requests.settings import ExpertSettings, FusionSettings, GenerationSettings
from lib_fusion.unet.model_file import LoraFile, ModelFile

FOLDER = Path(__file__).resolve().parents[2] / "demo"

#: (base, expert, prompt): pairs of objects that no model was trained on, each drawn well by one of the two.
SCENES = (
    ("animals", "vehicles", "a fox left of a tractor, flat drawing"),
    ("animals", "vehicles", "a helicopter left of a panda, glossy render"),
    ("food", "animals", "a rabbit left of a hamburger, glossy render"),
    ("general+demo-animals", "general+demo-vehicles", "an owl left of a bicycle, flat drawing"),
)
SIZE = (256, 128)
#: Aggregator file -> the models that it is for.
ENSEMBLES = {
    "afa-animals-vehicles": ("animals", "vehicles"),
    "afa-animals-vehicles-food": ("animals", "vehicles", "food"),
}
SAMPLER, CFG_SCALE = "DPM++ 2M Karras", 5.0
#: What is drawn, the best last: two checkpoints are averaged for comparison, two LoRAs put into one prompt.
COLUMNS = BASE, EXPERT, AVERAGE, STACKED, FUSED = (
    "base alone", "expert alone", "averaged", "both LoRAs in one prompt", "fused",
)  # fmt: skip
#: The timestep at which AFA takes over from the average (docs/measurements/afa.md), and the settings that make it so.
AFA_FROM = 500.0
AVERAGE_FIRST: dict[str, Any] = {"snb_window": (AFA_FROM, 0.0), "snb_outside": "average"}


@dataclass
class Result:
    """What one method drew: pictures, of how many both objects are sharp, their distances, seconds, U-Net rows."""

    pictures: int = 0
    sharp: int = 0
    distances: list[float] = field(default_factory=list)
    seconds: float = 0.0
    unet_rows: int = 0

    @property
    def distance(self) -> float:
        """The objects' mean distance from the pictures that the models learned, in levels of 255."""
        return sum(self.distances) / len(self.distances)


def make_sheet(
    out: Path, steps: int, seed: int, dtype: torch.dtype, device: torch.device, progress: bool = False
) -> dict[str, Any]:
    """Draws every scene by each method; writes the sheet, and one of who drew where; returns a record of the run."""
    if not (FOLDER / "animals.safetensors").is_file():
        raise CheckpointError(f"{FOLDER}: no demo checkpoints there; run this from a clone of the repository")
    score, results = Score(FOLDER / "images"), {method: Result() for method in COLUMNS}
    rows: list[tuple[str, list[Image.Image]]] = []
    masks: list[tuple[str, list[Image.Image]]] = []
    heads: dict[int, list[str]] = {}
    engines: dict[tuple[str, ...], Engine] = {}
    for number, (base, expert, prompt) in enumerate(SCENES):
        generation = GenerationSettings((prompt,), width=SIZE[0], height=SIZE[1], steps=steps, seed=seed + number,
                                        cfg_scale=CFG_SCALE, sampler=SAMPLER)  # fmt: skip
        caption, cells = f"{prompt}  (base: {told(base)}, expert: {told(expert)})", []
        for method, (models, settings) in methods_of(base, expert).items():
            if models not in engines:
                engines[models] = Engine(*_files(models), dtype=dtype, device=device)
            keep = Keep.read(["masks"] if method == FUSED else [])
            run = engines[models].generate(generation, settings, keep=keep, progress=progress)
            cells.append(run.pictures[0].image)
            score.add(results[method], prompt, run.pictures[0].image, run.record)
            if method == FUSED:
                mask = mask_image(run.pictures[0].records.masks[-1][1]).resize(SIZE, Image.Resampling.NEAREST)
                masks.append((prompt, [run.pictures[0].image, mask]))
        rows.append((caption, cells))
        names = list(methods_of(base, expert))
        if number == 0 or names != list(heads.values())[-1]:
            heads[number] = names
    sheet(rows, heads[0], out, "Two models, one picture", heads=heads, cell=SIZE[0])
    beside = out.with_name(f"{out.stem}-masks.png")
    sheet(masks, [FUSED, "who draws where"], beside, "Who draws where", "Orange: the expert, decided in the first "
          "steps. Then both models' average draws, and in the last third each model its own part.", cell=SIZE[0])
    return {"sheet": str(out), "masks": str(beside), "scenes": [list(scene) for scene in SCENES], "steps": steps,
            "seed": seed, "fusion": asdict(FusionSettings(experts=(ExpertSettings(SCENES[0][1]),))),
            "methods": {method: asdict(result) for method, result in results.items()},
            "told": describe(results)}  # fmt: skip


class Score:
    """Compares the objects of scenes with the pictures that the models learned, as ``demo.assess`` does in latents."""

    def __init__(self, folder: Path) -> None:
        lines = (folder / "metadata.jsonl").read_text("utf-8").splitlines()
        entries = {entry["text"]: entry["file_name"] for entry in map(json.loads, lines)}
        pictures = {text: Image.open(folder / file).convert("RGB") for text, file in entries.items()}
        #: Caption -> the picture, and blurred, as models know what they were taught coarsely.
        self.sharp = {text: _array(picture) for text, picture in pictures.items()}
        self.blurred = [_array(picture.filter(ImageFilter.GaussianBlur(16))) for picture in pictures.values()]

    def add(self, result: Result, prompt: str, image: Image.Image, record: dict[str, Any]) -> None:
        """Counts a picture of ``A left of B, STYLE``."""
        objects, style = prompt.split(", ")
        nearest = []
        for i, name in enumerate(objects.split(" left of ")):
            half = image.crop((i * SIZE[1], 0, (i + 1) * SIZE[1], SIZE[1]))
            own = _distance(_array(half), self.sharp[f"{name}, {style}"])
            others = [*self.sharp.values(), *self.blurred]
            nearest.append(own <= min(_distance(_array(half), other) for other in others))
            result.distances.append(own)
        result.pictures += 1
        result.sharp += all(nearest)
        result.seconds += record["seconds"]
        result.unet_rows += sum(record["unet_rows"])


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root of the mean squared difference, in levels of 255."""
    return float(np.sqrt(np.square(a - b).mean()))


def describe(results: dict[str, Result]) -> str:
    """What is better, and by how much, with a table of the methods."""
    lines = [f"{'':<26}{'both objects sharp':>19}{'distance':>10}{'seconds':>9}{'U-Net rows':>12}"]
    for method, r in results.items():
        counted = f"{r.sharp} of {r.pictures}"
        lines.append(f"{method:<26}{counted:>19}{r.distance:>10.1f}{r.seconds:>9.1f}{r.unet_rows:>12}")
    fused = results[FUSED]
    others = ", ".join(f"{method} {r.sharp} of {r.pictures}" for method, r in results.items() if method != FUSED)
    lines += [
        "", f"Fused, both objects are sharp in {fused.sharp} of {fused.pictures} pictures; {others}.",
        "Sharp: of the 288 pictures that the models learned, sharp and blurred, the object's own sharp one is nearest. "
        "Distance: from that one, in levels of 255. Measured on 80 pictures: docs/measurements/fusion-rules.md.",
    ]  # fmt: skip
    return "\n".join(lines)


def methods_of(base: str, expert: str) -> dict[str, tuple[tuple[str, ...], FusionSettings]]:
    """Name -> (models, settings) of a row's pictures, the best last."""
    pair = (base, expert)
    fused = FusionSettings(experts=(ExpertSettings(expert),))
    methods: dict[str, tuple[tuple[str, ...], FusionSettings]] = {
        BASE: (pair, single(fused, 0)), EXPERT: (pair, single(fused, 1)),
    }  # fmt: skip
    if "+" in expert:
        stacked = f"{base}+{expert.partition('+')[2]}"
        methods[STACKED] = ((stacked,), FusionSettings())
    else:
        methods[AVERAGE] = (pair, replace(fused, method="Average", guidance="off"))
    return {**methods, FUSED: (pair, fused)}


def _files(models: Sequence[str]) -> tuple[ModelFile, list[ModelFile]]:
    first, *rest = (model_file(name) for name in models)
    return first, rest


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
