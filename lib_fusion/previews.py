"""Pictures that show what a method has decided, for the gallery and the command line. Pillow only; host-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

#: Colours of base, first, second and third expert.
MODEL_COLOURS = ((47, 62, 92), (242, 169, 59), (74, 163, 150), (201, 84, 110))
#: How many steps a strip shows.
FRAMES = 4
_PAPER, _INK, _GAP = (250, 250, 250), (40, 40, 40), 8


def mask_image(winner: torch.Tensor) -> Image.Image:
    """A mask int64 (h,w) as colours: dark blue the base, orange the first expert."""
    return Image.fromarray(np.array(MODEL_COLOURS, dtype=np.uint8)[winner.numpy()])


def spread(count: int, frames: int = FRAMES) -> list[int]:
    """``frames`` indices (or as many as there are) spread evenly over ``range(count)``, first and last among them."""
    frames = min(frames, count)
    return [round(i * (count - 1) / max(frames - 1, 1)) for i in range(frames)]


def mask_strip(
    picture: Image.Image, masks: Sequence[tuple[float, torch.Tensor]], models: Sequence[str],
    font: Callable[[int], object],
) -> Image.Image:  # fmt: skip
    """Who drew what: the grey picture under the masks of FRAMES steps, with their timesteps and a legend.

    ``masks``: (timestep, winners int64 (h,w)) in the order of sampling, at least one; ``models``: names, the base
    first; ``font``: size in pixels -> a Pillow font. As high as the picture, and a margin for the words.
    """
    grey = picture.convert("L").convert("RGB")
    size = max(14, picture.height // 24)
    letters, line = font(size), size * 3 // 2
    shown = [masks[i] for i in spread(len(masks))]
    strip = Image.new("RGB", (len(shown) * (picture.width + _GAP) + _GAP, picture.height + 2 * line + 3 * _GAP), _PAPER)
    draw = ImageDraw.Draw(strip)
    for i, (timestep, winner) in enumerate(shown):
        x = _GAP + i * (picture.width + _GAP)
        colours = mask_image(winner).resize(picture.size, Image.Resampling.NEAREST)
        strip.paste(Image.blend(grey, colours, 0.6), (x, _GAP))
        draw.text((x, picture.height + _GAP + 2), f"t = {timestep:.0f}", font=letters, fill=_INK)
    x, y = _GAP, picture.height + line + 2 * _GAP
    for name, colour in zip(models, MODEL_COLOURS):
        draw.rectangle((x, y + size // 5, x + size, y + size // 5 + size), fill=colour)
        draw.text((x + size + 6, y), name, font=letters, fill=_INK)
        x += size + 6 + int(draw.textlength(name, font=letters)) + 2 * _GAP + 4
    return strip
