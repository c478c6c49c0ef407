"""Pictures that show what a method has decided, for the gallery and the command line. Pillow only; host-free.

All are drawn on light paper with dark ink, so that they read the same in a light and in a dark gallery.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from lib_fusion.fusion.policies import SKIPPED
from lib_fusion.fusion.records import PictureRecords
from lib_fusion.requests.settings import FusionSettings

#: Colours of base, first, second and third expert.
MODEL_COLOURS = ((47, 62, 92), (242, 169, 59), (74, 163, 150), (201, 84, 110))
#: How many steps a strip shows.
FRAMES = 4
#: The least width of a plot, and the greatest side of an attention map, in pixels.
PLOT_WIDTH, MAP_SIDE = 640, 192
#: How many times above and below its limit the plot of an estimate reaches.
RANGE = 30
_PAPER, _INK, _FAINT, _GAP = (250, 250, 250), (40, 40, 40), (205, 205, 205), 8

#: Size in pixels -> a Pillow font.
Font = Callable[[int], Any]


def draw_previews(
    kinds: Collection[str], picture: Image.Image, records: PictureRecords, models: Sequence[str],
    settings: FusionSettings, font: Font,
) -> Iterator[tuple[str, Image.Image]]:  # fmt: skip
    """(kind, image) of each wanted preview (``settings.PREVIEWS``) that there is something to show in.

    ``models``: names, the base first.
    """
    if "masks" in kinds and records.masks:
        yield "masks", mask_strip(picture, records.masks, models, font)
    if "skips" in kinds and any(records.skips):
        limit = settings.skip_threshold if settings.skipping == "Paper" else settings.skip_tolerance
        yield "skips", skip_timeline(records.skips, limit, models, font, font_size(picture))
    if "weights" in kinds and records.weights:
        yield "weights", weight_bars(records.weights, records.points, models, font, font_size(picture))
    if "maps" in kinds and records.maps:
        yield "maps", attention_maps(picture, records.maps, records.points, models, font)


def mask_image(winner: torch.Tensor) -> Image.Image:
    """A mask int64 (h,w) as colours: dark blue the base, orange the first expert."""
    return Image.fromarray(np.array(MODEL_COLOURS, dtype=np.uint8)[winner.numpy()])


def spread(count: int, frames: int = FRAMES) -> list[int]:
    """``frames`` indices (or as many as there are) spread evenly over ``range(count)``, first and last among them."""
    frames = min(frames, count)
    return [round(i * (count - 1) / max(frames - 1, 1)) for i in range(frames)]


def font_size(picture: Image.Image) -> int:
    return max(14, picture.height // 24)


def mask_strip(
    picture: Image.Image, masks: Sequence[tuple[float, torch.Tensor]], models: Sequence[str], font: Font
) -> Image.Image:
    """Who drew what: the grey picture under the masks of FRAMES steps, with their timesteps and a legend.

    ``masks``: (timestep, winners int64 (h,w)) in the order of sampling, at least one; ``models``: names, the base
    first. As high as the picture, and a margin for the words.
    """
    grey = picture.convert("L").convert("RGB")
    size = font_size(picture)
    letters, line = font(size), size * 3 // 2
    shown = [masks[i] for i in spread(len(masks))]
    strip = Image.new("RGB", (len(shown) * (picture.width + _GAP) + _GAP, picture.height + 2 * line + 3 * _GAP), _PAPER)
    draw = ImageDraw.Draw(strip)
    for i, (timestep, winner) in enumerate(shown):
        x = _GAP + i * (picture.width + _GAP)
        colours = mask_image(winner).resize(picture.size, Image.Resampling.NEAREST)
        strip.paste(Image.blend(grey, colours, 0.6), (x, _GAP))
        draw.text((x, picture.height + _GAP + 2), f"t = {timestep:.0f}", font=letters, fill=_INK)
    _legend(draw, _GAP, picture.height + line + 2 * _GAP, models, letters, size)
    return strip


def skip_timeline(
    skips: Sequence[dict[int, tuple[str, float | None]]], limit: float, models: Sequence[str], font: Font, size: int
) -> Image.Image:
    """Which steps ran which model, and why: below each step, what the policy had estimated, and its limit.

    ``skips``: for each step {model: (mark, estimate or None)}, as in PictureRecords. A full box: the model was run.
    A hollow one: its noise was forecast. A line: its noise was of no use at this step.
    """
    letters, line = font(size), size * 3 // 2
    counts = [[mark for step in skips for model, (mark, _) in step.items() if model == i] for i in range(len(models))]
    names = [f"{name}  {len(marks) - marks.count(SKIPPED)} of {len(marks)}" for name, marks in zip(models, counts)]
    left = _GAP + max(int(letters.getlength(text)) for text in (*names, f"limit {limit:g}", "estimate")) + _GAP
    cell = max((PLOT_WIDTH - left) // len(skips), 4)
    height, right = 6 * size, left + cell * len(skips)
    top = _GAP + line * len(models) + _GAP
    image = Image.new("RGB", (right + 2 * _GAP, top + height + 2 * line + _GAP), _PAPER)
    draw = ImageDraw.Draw(image)

    def at(estimate: float) -> int:
        """Logarithmic, from a RANGE-th of the limit to RANGE times it; what is beyond is shown at the edge."""
        part = math.log(max(estimate / limit, 1e-9), RANGE)
        return round(top + height * (1 - min(max(part, -1), 1)) / 2)

    for model, name in enumerate(names):
        y = _GAP + model * line
        draw.text((_GAP, y), name, font=letters, fill=_INK)
        for i, step in enumerate(skips):
            x = left + i * cell
            box = (x, y + 1, x + cell - 2, y + size)
            if model not in step:
                draw.line((x, y + size // 2, x + cell - 2, y + size // 2), fill=_FAINT)
            elif step[model][0] == SKIPPED:
                draw.rectangle(box, outline=MODEL_COLOURS[model])
            else:
                draw.rectangle(box, fill=MODEL_COLOURS[model])
    draw.rectangle((left - 2, top, right, top + height), outline=_FAINT)
    for x in range(left, right, 8):
        draw.line((x, at(limit), min(x + 4, right), at(limit)), fill=_INK)
    draw.text((_GAP, at(limit) - size * 2 // 3), f"limit {limit:g}", font=letters, fill=_INK)
    draw.text((_GAP, top), "estimate", font=letters, fill=_INK)
    for model in range(len(models)):
        for i, step in enumerate(skips):
            estimate = step.get(model, ("", None))[1]
            if estimate is not None:
                x, y = left + i * cell + cell // 2 - 1, at(estimate)
                r = max(2, size // 6) + len(models) - 1 - model  # dots of several models show on one another
                draw.ellipse((x - r, y - r, x + r, y + r), fill=MODEL_COLOURS[model])
    for i in _ticks(len(skips)):
        draw.text((left + (i - 1) * cell, top + height + 4), str(i), font=letters, fill=_INK)
    told = "step.  Full: run; hollow: left out.  Dots below the limit: may be left out."
    draw.text((_GAP, top + height + 4 + line), _fitting(told, letters, right), font=letters, fill=_INK)
    return image


def weight_bars(
    weights: Sequence[tuple[float, torch.Tensor]], points: Sequence[str], models: Sequence[str], font: Font, size: int
) -> Image.Image:
    """Each model's mean weight, stacked: by block over all steps, and by step over all blocks.

    ``weights``: (timestep, (P,N)) of each computed step; ``points``: the blocks' names (P).
    """
    letters, line = font(size), size * 3 // 2
    table = torch.stack([value for _, value in weights])  # (steps,P,N)
    names = [short_name(point) for point in points]
    left = _GAP + int(letters.getlength("0.5")) + _GAP
    bar = max((PLOT_WIDTH - left) // len(points), int(letters.getlength(max(names, key=len))) + 4)
    width, height = bar * len(points), 7 * size
    image = Image.new("RGB", (left + width + _GAP, 2 * (height + 3 * line) + line + _GAP), _PAPER)
    draw = ImageDraw.Draw(image)
    step_bar = width / len(weights)
    times = [f"{t:.0f}" for t, _ in weights]
    panels = [("weight by block, mean of all steps", table.mean(0), bar, names, range(len(names))),
              ("weight by timestep, mean of all blocks", table.mean(1), step_bar, times, spread(len(times), 6))]
    y = _GAP // 2
    for title, values, each, labels, shown in panels:
        draw.text((left, y), title, font=letters, fill=_INK)
        top = y + line
        for i, shares in enumerate(values.tolist()):
            x, at = left + i * each, float(top)
            gap = 2 if each > 6 else 0
            for model, share in enumerate(shares):
                draw.rectangle((round(x), round(at), max(round(x + each) - 1 - gap, round(x)),
                                round(at + share * height)), fill=MODEL_COLOURS[model])  # fmt: skip
                at += share * height
        for part in (0.0, 0.5, 1.0):
            at = top + height * part
            draw.text((_GAP, at - size * 2 // 3), f"{1 - part:g}", font=letters, fill=_INK)
            draw.line((left, at, left + width, at), fill=_PAPER if part == 0.5 else _FAINT)
        for i in shown:
            x = left + i * each + (each - letters.getlength(labels[i])) / 2
            x = min(max(x, left), left + width - letters.getlength(labels[i]))
            draw.text((x, top + height + 4), labels[i], font=letters, fill=_INK)
        y = top + height + 2 * line
    _legend(draw, left, y, models, letters, size)
    return image


def attention_maps(
    picture: Image.Image, maps: Sequence[tuple[float, dict[int, torch.Tensor]]], points: Sequence[str],
    models: Sequence[str], font: Font,
) -> Image.Image:  # fmt: skip
    """Where which model's features count: a row for each block, a column for each timestep, over the grey picture.

    ``maps``: (timestep, {point: (N,h,w)}) in the order of sampling; a position's colour is the models' colours mixed by
    their weights.
    """
    scale = min(1.0, MAP_SIDE / max(picture.size))
    cell = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    grey = picture.convert("L").convert("RGB").resize(cell, Image.Resampling.BICUBIC)
    size = 14
    letters, line = font(size), size * 3 // 2
    rows = sorted({point for _, found in maps for point in found})
    left = _GAP + max(int(letters.getlength(short_name(points[row]))) for row in rows) + _GAP
    width = max(left + len(maps) * (cell[0] + _GAP), left + 320)
    image = Image.new("RGB", (width, line + len(rows) * (cell[1] + _GAP) + line + _GAP), _PAPER)
    draw = ImageDraw.Draw(image)
    colours = torch.tensor(MODEL_COLOURS, dtype=torch.float32)
    for column, (timestep, found) in enumerate(maps):
        x = left + column * (cell[0] + _GAP)
        draw.text((x, 2), f"t = {timestep:.0f}", font=letters, fill=_INK)
        for row, point in enumerate(rows):
            y = line + row * (cell[1] + _GAP)
            if column == 0:
                name = short_name(points[point])
                draw.text((_GAP, y + cell[1] // 2 - size // 2), name, font=letters, fill=_INK)
            mixed = torch.einsum("nhw,nc->hwc", found[point], colours[: len(found[point])])
            shown = Image.fromarray(mixed.round().clamp(0, 255).byte().numpy())
            image.paste(Image.blend(grey, shown.resize(cell, Image.Resampling.NEAREST), 0.7), (x, y))
    _legend(draw, left, line + len(rows) * (cell[1] + _GAP), models, letters, size)
    return image


def short_name(point: str) -> str:
    """A block's name where there is little room: ``in.3``, ``mid``, ``up.5``; ``out`` is the last layer."""
    return point.replace("input_blocks", "in").replace("middle_block", "mid").replace("output_blocks", "up")


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int, models: Sequence[str], letters: Any, size: int) -> None:
    for name, colour in zip(models, MODEL_COLOURS):
        draw.rectangle((x, y + size // 5, x + size, y + size // 5 + size), fill=colour)
        draw.text((x + size + 6, y), name, font=letters, fill=_INK)
        x += size + 6 + int(letters.getlength(name)) + 2 * _GAP + 4


def _ticks(steps: int) -> list[int]:
    """Step numbers to name: the first, and every so many."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 250, 1000) if steps / n <= 12)
    return [1, *(i for i in range(every, steps + 1, every) if i > 1)]


def _fitting(text: str, letters: Any, width: int) -> str:
    """As many of the text's words as there is room for."""
    while text and letters.getlength(text) > width:
        text = text.rpartition(" ")[0]
    return text
