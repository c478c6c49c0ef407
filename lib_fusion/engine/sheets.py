"""Writing pictures: PNG with its settings inside, and the labelled sheet that ``demo`` shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lib_fusion import __version__
from lib_fusion.files import write_whole
from lib_fusion.requests.infotext import VERSION, write_infotext
from lib_fusion.requests.settings import FusionSettings, GenerationSettings
from lib_fusion.unet.model_file import ModelFile

#: Pixels between the pictures of a sheet and around it.
MARGIN = 8


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
        values[VERSION] = __version__
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


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface that matplotlib brings along; ``size`` in pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], path: Path, title: str, note: str = "",
    heads: Mapping[int, Sequence[str]] | None = None, cell: int = 192,
) -> None:  # fmt: skip
    """Writes a PNG with one picture in a cell, a caption above each row, and the columns' names at the top.

    ``heads``: other names of the columns, from these rows on. ``cell``: the pictures' width in pixels, to which larger
    and smaller ones are scaled.
    """
    heads = {0: columns, **(heads or {})}
    width = MARGIN + len(columns) * (cell + MARGIN)
    small = font(14)
    notes = wrap(note, small, width - 2 * MARGIN)
    heights = [round(cell * images[0].height / images[0].width) for _, images in rows]
    height = 48 + sum(heights) + 28 * len(rows) + 30 * len(heads) + 20 * len(notes) + MARGIN
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, "black", font(22, bold=True))
    y = 48
    for r, (caption, images) in enumerate(rows):
        if r in heads:
            for c, name in enumerate(heads[r]):
                draw.text((MARGIN + c * (cell + MARGIN), y + 6), name, "black", font(17, bold=True))
            y += 30
        draw.text((MARGIN, y + 6), caption, "#333333", small)
        y += 26
        for c, image in enumerate(images):
            box = (MARGIN + c * (cell + MARGIN), y)
            page.paste(image.convert("RGB").resize((cell, heights[r]), Image.Resampling.LANCZOS), box)
            draw.rectangle((*box, box[0] + cell - 1, y + heights[r] - 1), outline="#cccccc")
        y += heights[r] + 2
    for line in notes:
        draw.text((MARGIN, y + 6), line, "#555555", small)
        y += 20
    page = page.point(lambda level: min(255, (level + 2) // 4 * 4))  # nobody sees it, and the file is a third smaller
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: page.save(partial, format="PNG", optimize=True))


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text in lines of at most ``width`` pixels; its own line breaks stay."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        lines.append("")
        for word in paragraph.split(" "):
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and face.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines
