"""The pictures of docs/gallery.md: ``python -m demo.gallery [NAME ...]``, all of them or those named, on the CPU.

Each shows what one parameter does, by the demo's checkpoints and the embedded engine, with everything else the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops

from lib_fusion.engine.demo_sheet import AFA_FROM, AVERAGE_FIRST
from lib_fusion.engine.generate import Engine
from lib_fusion.engine.loader import quiet_libraries
from lib_fusion.engine.sheets import font, sheet
from lib_fusion.fusion.records import Keep, PictureRecords
from lib_fusion.previews import draw_previews, mask_image
from lib_fusion.requests.presets import PAPER
from lib_fusion.requests.settings import FusionSettings, GenerationSettings

DEMO = Path(__file__).parent
FOLDER = DEMO.parent / "docs/gallery"
PAIR = ("animals", "vehicles")
SCENES = ("a fox left of a tractor, flat drawing", "a bus left of a panda, glossy render")
SEEDS = (0, 1)
STEPS, CFG_SCALE, HOLD = 50, 5.0, 900.0
#: An artist's palette keeps the files small.
COLOURS = 256


@dataclass
class Drawn:
    """A picture and how it came about; ``share``: of the base's U-Net rows, how many were computed."""

    image: Image.Image
    records: PictureRecords
    share: float
    fusion: FusionSettings


class Studio:
    """The engines, each loaded once; ``draw`` makes a picture of one of the scenes."""

    def __init__(self) -> None:
        self._engines: dict[tuple[str, ...], Engine] = {}

    def draw(self, scene: int = 0, keep: Sequence[str] = (), models: tuple[str, ...] = PAIR, width: int = 256,
             prompt: str = "", steps: int = STEPS, **values: Any) -> Drawn:  # fmt: skip
        if models not in self._engines:
            files = [DEMO / f"{name}.safetensors" for name in models]
            self._engines[models] = Engine(files[0], files[1:])
        """By the paper's rule where ``values`` say nothing else; ``own``: rows of the first expert."""
        own = values.pop("own", {})
        experts = [{"checkpoint": name, **(own if i == 0 else {})} for i, name in enumerate(models[1:])]
        fusion = FusionSettings.from_dict({**PAPER, **values, "experts": experts})
        generation = GenerationSettings((prompt or SCENES[scene],), width=width, height=128, steps=steps,
                                        cfg_scale=CFG_SCALE, seed=SEEDS[scene])  # fmt: skip
        run = self._engines[models].generate(generation, fusion, keep=Keep.read(keep))
        share = run.record["unet_rows"][0] / (2 * steps)
        return Drawn(run.pictures[0].image, run.pictures[0].records, share, fusion)


def last_mask(picture: Drawn) -> Image.Image:
    """Who drew what at the end, orange the expert."""
    mask = mask_image(picture.records.masks[-1][1])
    return mask.resize(picture.image.size, Image.Resampling.NEAREST)


def over_scenes(studio: Studio, name: str, title: str, note: str, columns: dict[str, dict],
                with_masks: bool = True) -> None:  # fmt: skip
    """Two scenes, a column for each of some settings; SNB's last mask under each picture, where all have one."""
    rows = []
    for scene, caption in enumerate(SCENES):
        drawn = [studio.draw(scene, ["masks"], **values) for values in columns.values()]
        rows.append((f"{caption}  (base: animals, expert: vehicles)", [picture.image for picture in drawn]))
        if with_masks and all(picture.records.masks for picture in drawn):
            rows.append(("the last mask", [last_mask(picture) for picture in drawn]))
    write(rows, list(columns), name, title, note)


def draw_k(studio: Studio) -> None:
    columns = {f"k expert {k:g}": {"k_expert": k, "snb_hold": HOLD} for k in (0.1, 0.5, 1, 2, 10)}
    over_scenes(studio, "k", "k expert: how peaked the expert's saliency map is",
                "SNB, k general 1, mask hold 900. Orange: the noise is the expert's.", columns)  # fmt: skip


def draw_window(studio: Studio) -> None:
    windows = ((1000, 0), (1000, 600), (850, 0), (400, 0))
    columns = {f"window {a}:{b}": {"snb_window": [a, b]} for a, b in windows}
    columns["1000:600, outside expert"] = {"snb_window": [1000, 600], "snb_outside": "expert"}
    over_scenes(studio, "window", "Window: the timesteps in which the models are fused",
                "SNB, elsewhere the base draws alone, or in the last column the expert. Masks are those of the "
                "window's last step.", columns)  # fmt: skip


def draw_hold(studio: Studio) -> None:
    columns = {f"mask hold {hold}": {"snb_hold": hold} for hold in (0, 980, 900, 700, 400)}
    over_scenes(studio, "hold", "Mask hold: until when the mask is gathered, and then held",
                "SNB. 0 is the paper's: a new mask at every step. Timesteps run from 1000 down to 0.",
                columns)  # fmt: skip


def draw_from(studio: Studio) -> None:
    columns: dict[str, dict] = {"paper": {}, "held at once": {"snb_hold": HOLD}}
    columns |= {f"mask from {t}": {"snb_hold": HOLD, "snb_from": t} for t in (600, 300, 100)}
    over_scenes(studio, "from", "Mask from: until when the models' average draws, and then the held mask",
                "Mask hold 900. One guidance scale throughout.", columns)  # fmt: skip


def draw_guidance(studio: Studio) -> None:
    rule = {"snb_hold": HOLD, "snb_from": 300}
    columns: dict[str, dict] = {"off": rule}
    for until, after in ((300, 2), (500, 3), (500, 2), (400, 1), (800, 2)):
        interval = {"guidance": "always", "guidance_until": until, "guidance_after": after}
        columns[f"{after} below {until}"] = {**rule, **interval}
    over_scenes(studio, "guidance", f"Guidance interval: CFG {CFG_SCALE:g}, and a smaller scale below a timestep",
                "Mask hold 900, mask from 300.", columns, with_masks=False)  # fmt: skip


def draw_saliency(studio: Studio) -> None:
    """A general base with two experts made from it."""
    columns = {"base (general)": {"own": {"weight": 0}}}
    rule = {"snb_hold": HOLD, "snb_from": 300, "guidance": "with experts"}
    columns |= {name: {**rule, "snb_saliency": name} for name in ("own", "code", "divergence")}
    rows, models = [], ("general", *PAIR)
    for scene, caption in enumerate(SCENES):
        drawn = [studio.draw(scene, ["masks"], models[:2] if i == 0 else models, **values)
                 for i, values in enumerate(columns.values())]  # fmt: skip
        masks = [last_mask(picture) for picture in drawn[1:]]
        blank = Image.new("RGB", masks[0].size, "white")
        rows += [(f"{caption}  (base: general, experts: animals and vehicles)", [picture.image for picture in drawn]),
                 ("the last mask: dark the base, orange animals, green vehicles", [blank, *masks])]  # fmt: skip
    write(rows, list(columns), "saliency", "Saliency: a general base, and two experts made from it",
          "The recommended settings with each saliency.")  # fmt: skip


def draw_places(studio: Studio) -> None:
    columns: dict[str, dict] = {"auto (SNB)": {"snb_hold": HOLD, "snb_from": 300}}
    for place in ("columns 1:1 1", "columns 1:1 2", "rows 1:1 2", "0.1,0.2,0.3,0.6"):
        columns[place] = {"own": {"place": place}}
    over_scenes(studio, "places", "Place: where the expert draws, the base draws the rest",
                "Place strength 1, feather 2.", columns)  # fmt: skip


def draw_weight(studio: Studio) -> None:
    rule = {"snb_hold": HOLD, "snb_from": 300, "guidance": "with experts"}
    columns = {f"weight {w:g}": {**rule, "own": {"weight": w}} for w in (0, 0.25, 0.5, 0.75, 1)}
    over_scenes(studio, "weight", "Weight: how much the expert counts where it draws",
                "The recommended settings. 0 is the base alone.", columns)  # fmt: skip


def draw_methods(studio: Studio) -> None:
    """The same scenes by every method; how AFA's aggregator routes them is told by its previews."""
    afa = {"method": "AFA", "afa_aggregator": str(DEMO / "afa-animals-vehicles.safetensors")}
    later = {**afa, **AVERAGE_FIRST}
    columns = {"only base": {"method": "AFA", "afa_maps": "only base"},
               "only expert": {"method": "AFA", "afa_maps": "only expert 1"},
               "average": {"method": "Average"}, "SNB, hold 900": {"snb_hold": HOLD},
               "AFA, uniform": {"method": "AFA", "afa_maps": "uniform"},
               "AFA (paper)": afa, "average, then AFA": later}  # fmt: skip
    rows = []
    for scene, caption in enumerate(SCENES):
        drawn = [studio.draw(scene, **values).image for values in columns.values()]
        rows.append((f"{caption}  (base: animals, expert: vehicles)", drawn))
    write(rows, list(columns), "afa", "Methods: one model alone, means, and trained weights",
          f"Average: of noises. AFA, uniform: the mean of all features. Last: average down to timestep {AFA_FROM:g}.")
    for scene in range(len(SCENES)):
        picture = studio.draw(scene, ["weights", "maps"], **later)
        previews(picture, ["weights", "maps"], f"-{scene + 1}")


def draw_freeu(studio: Studio) -> None:
    prompt = "a tiger, glossy render"
    factors = (0.2, 1.0, 1.6, 2.2, 3.0)
    rows = []
    for s in (0.5, 1.0, 1.6):
        drawn = []
        for b in factors:
            values = {"freeu": "Custom", "freeu_b3": b, "freeu_s3": s}
            drawn.append(studio.draw(models=("animals",), width=128, prompt=prompt, **values).image)
        rows.append((f"s3 {s:g}", drawn))
    write(rows, [f"b3 {b:g}" for b in factors], "freeu", "FreeU: b of the backbone, s of the skip features",
          f"Version 2; {prompt}, the animals model alone, whose U-Net has stage 3 only. b3 1, s3 1: off.")  # fmt: skip


def draw_skipping(studio: Studio) -> None:
    """Each amount, what it left out, and ten times the difference to the picture without."""
    amounts = {"off": {}} | {f"tolerance {t:g}": {"skipping": "Forecast", "skip_tolerance": t, "skip_max": 4}
                             for t in (0.02, 0.15, 0.5, 2)}  # fmt: skip
    amounts |= {f"paper {t:g}": {"skipping": "Paper", "skip_threshold": t} for t in (0.01, 0.05)}
    rows: list[tuple[str, list[Image.Image]]] = []
    for prompt, model in (("a tiger, glossy render", "animals"), ("a tractor, flat drawing", "vehicles")):
        drawn = [studio.draw(models=(model,), width=128, prompt=prompt, steps=20, **values)
                 for values in amounts.values()]  # fmt: skip
        shares = ", ".join(f"{100 * picture.share:.0f}" for picture in drawn)
        rows += [(f"{prompt}; U-Net calls in percent: {shares}", [picture.image for picture in drawn]),
                 ("ten times the difference to off", [ten_times(p.image, drawn[0].image) for p in drawn])]  # fmt: skip
    write(rows, list(amounts), "skipping", "Skipping: how wrong a forecast may be, or how unsteady the latent",
          "DDIM, 20 steps, one model alone. Forecast: at most four skips in a row.")  # fmt: skip


def draw_previews_of_all(studio: Studio) -> None:
    """One of each kind that is not of AFA."""
    previews(studio.draw(keep=["masks"], snb_hold=HOLD), ["masks"])
    previews(studio.draw(keep=["skips"], snb_hold=HOLD, skipping="Forecast", skip_max=2), ["skips"])


def ten_times(image: Image.Image, other: Image.Image) -> Image.Image:
    difference = np.asarray(ImageChops.difference(image, other)).astype(np.uint16) * 10
    return Image.fromarray(255 - difference.clip(0, 255).astype(np.uint8))


def previews(picture: Drawn, kinds: Sequence[str], end: str = "") -> None:
    for kind, image in draw_previews(kinds, picture.image, picture.records, PAIR, picture.fusion, font):
        image.save(FOLDER / f"preview-{kind}{end}.png")
        shrink(FOLDER / f"preview-{kind}{end}.png")


def write(rows: list[tuple[str, Sequence[Image.Image]]], columns: list[str], name: str, title: str, note: str) -> None:
    sheet(rows, columns, FOLDER / f"{name}.png", title, note)
    shrink(FOLDER / f"{name}.png")


def shrink(file: Path) -> None:
    with Image.open(file) as image:
        small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(file, optimize=True)


DRAWN: dict[str, Callable[[Studio], None]] = {
    "from": draw_from, "guidance": draw_guidance, "saliency": draw_saliency, "places": draw_places,
    "weight": draw_weight, "k": draw_k, "window": draw_window, "hold": draw_hold, "freeu": draw_freeu,
    "skipping": draw_skipping,
    "afa": draw_methods, "previews": draw_previews_of_all,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(DRAWN)} (default: all)")
    names = parser.parse_args().names or list(DRAWN)
    for name in names:
        if name not in DRAWN:
            parser.error(f"{name}: allowed: {', '.join(DRAWN)}")
    quiet_libraries()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    studio = Studio()
    for name in names:
        DRAWN[name](studio)
        print(f"{FOLDER.name}: {name}", flush=True)


if __name__ == "__main__":
    main()
