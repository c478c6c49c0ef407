"""Writing pictures: PNG with its settings inside, and the labelled sheet that ``demo`` shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
from PIL import Image, ImageFont
from PIL.PngImagePlugin import PngInfo

from lib_fusion.files import write_whole
from lib_fusion.requests.infotext import write_infotext
from lib_fusion.requests.settings import FusionSettings, GenerationSettings
from lib_fusion.unet.model_file import ModelFile

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def infotext(prompt: str, seed: int, generation: GenerationSettings, fusion: FusionSettings, base: str) -> str:
    """The settings of one picture in the WebUI's form, so that its PNG Info tab reads them."""
    lines = [prompt]
    if generation.negative_prompt:
        lines.append(f"Negative prompt: {generation.negative_prompt}")
    values = {
        "Steps": generation.steps, "Sampler": generation.sampler,
        "CFG scale": f"{generation.cfg_scale:g}", "Seed": seed,
        "Size": f"{generation.width}x{generation.height}", "Model": base,
    }  # fmt: skip
    if not fusion.is_idle:
        names = [Path(expert.checkpoint).name for expert in fusion.experts]
        named = replace(fusion, afa_aggregator=Path(fusion.afa_aggregator).name)
        values |= {key: _quoted(value) for key, value in write_infotext(named, names).items()}
    lines.append(", ".join(f"{key}: {value}" for key, value in values.items()))
    return "\n".join(lines)


def lora_words(model: ModelFile) -> str:
    """A model's LoRAs as the WebUI has them in a prompt."""
    return "".join(f"<lora:{lora.path.stem}:{lora.weight:g}>" for lora in model.loras)


def name_loras(fusion: FusionSettings, experts: Sequence[ModelFile]) -> FusionSettings:
    """Settings whose experts have their LoRAs in their prompts, as the WebUI reads them."""
    named = [replace(settings, prompt=settings.prompt + lora_words(model))
             for settings, model in zip(fusion.experts, experts)]  # fmt: skip
    return replace(fusion, experts=tuple(named))


def _quoted(text: str) -> str:
    """Quoted where it would break the list, as the WebUI does."""
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def save_png(image: Image.Image, path: Path, text: str) -> None:
    """Writes a PNG whose ``parameters`` chunk holds ``text``; never leaves half a file."""
    info = PngInfo()
    info.add_text("parameters", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: image.save(partial, format="PNG", pnginfo=info))


def font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface that matplotlib brings along; ``size`` in pixels."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], path: Path, title: str, note: str = "",
    heads: Mapping[int, Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """One picture a cell, a caption above each row, the columns named at the top.

    ``heads``: other names of the columns, from these rows on.
    """
    heads = {0: columns, **(heads or {})}
    cell = 1.75  # inches
    heights = [cell * images[0].height / images[0].width + (0.5 if r and r in heads else 0.3)
               for r, (_, images) in enumerate(rows)]  # fmt: skip
    fig, axes = plt.subplots(
        len(rows), len(columns), figsize=(cell * len(columns), sum(heights) + 0.9),
        height_ratios=heights, squeeze=False, layout="constrained",
    )  # fmt: skip
    fig.suptitle(title, fontsize=12, fontweight="bold", x=0.005, ha="left")
    for r, (caption, images) in enumerate(rows):
        for c, image in enumerate(images):
            axis = axes[r][c]
            axis.imshow(image, interpolation="nearest", aspect="equal")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_color("#cccccc")
            if r in heads:
                axis.set_title(heads[r][c], fontsize=9, pad=18)
        label = axes[r][0].annotate(
            caption, (0, 1), xytext=(0, 3), xycoords="axes fraction", textcoords="offset points", fontsize=8,
            color="#333333", va="bottom", annotation_clip=False,
        )  # fmt: skip
        label.set_in_layout(False)  # it runs on over the next columns and must not widen its own
    if note:
        fig.supxlabel(note, fontsize=8, color="#555555", x=0.005, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(path, lambda partial: fig.savefig(partial, format="png", dpi=110, facecolor="white"))
    finally:
        plt.close(fig)
