"""Requests that the tests of this folder draw: what WebUIs do otherwise, and how far two pictures are apart."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import numpy as np
from PIL import Image

from tests.webui_live.client import Client, Pictures, encode

BASE, COPY, OTHER = "general", "general_copy", "animals"
LONG = "a " * 90
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "None", "denoising_strength": 0.7, "hr_cfg": 5,
         "hr_additional_modules": ["Use same choices"]}  # fmt: skip
#: Those that a request is made with, by what stands for them in its key.
_PICTURES: dict[str, Image.Image] = {}
#: Draws what the first expert draws, by a window in which nothing is fused.
ALONE: dict[str, Any] = {"snb_window": [0, 0], "snb_outside": "expert"}


def picture(size: int = 128) -> Image.Image:
    rows = np.linspace(0, 255, size, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(rows, (size, 1)), np.tile(rows[:, None], (1, size)),
                                     np.full((size, size), 128, np.uint8)], axis=-1))  # fmt: skip


def mask() -> str:
    area = Image.new("L", (128, 128))
    area.paste(255, (32, 32, 96, 96))
    return encode(area)


IMG2IMG = {"img2img": picture(), "denoising_strength": 0.6, "steps": 6}
INPAINT = {**IMG2IMG, "mask": mask(), "inpainting_fill": 1, "mask_blur": 0}
#: Changes of the request, by what they show; txt2img is all but the pictures from pictures.
CASES: dict[str, dict[str, Any]] = {
    "txt2img": {},
    "img2img": IMG2IMG,
    "inpaint": INPAINT,
    "hires": HIRES,
    "AND": {"prompt": "a cat AND a dog :0.7"},
    "batch": {"batch_size": 2, "n_iter": 2},
    "AND, batch": {"prompt": f"a cat AND {LONG}:0.7 AND x", "batch_size": 2},
    "prompt editing, BREAK": {"prompt": f"a cat [red:blue:0.5] BREAK {LONG}"},
    "DDIM": {"sampler_name": "DDIM"},
    "Euler a": {"sampler_name": "Euler a"},
    "Heun": {"sampler_name": "Heun"},
    "DPM++ 2M": {"sampler_name": "DPM++ 2M", "scheduler": "Karras"},
    "UniPC": {"sampler_name": "UniPC"},
    "NGMS": {"s_min_uncond": 4.0, "steps": 6},
    "skip early": {"settings": {"skip_early_cond": 0.3}},
    "off the grid": {"width": 136, "height": 120},
    "SDXL": {"model": "tiny_xl"},
    "SDXL, v": {"model": "tiny_xl_v"},
}


def models_of(case: str) -> tuple[str, str, str]:
    """The base of a case, a checkpoint with the same weights, and another one."""
    model = CASES[case].get("model")
    return (BASE, COPY, OTHER) if model is None else (model, "same as base", "tiny_xl_b")


def draw(client: Client, fusion: dict | None = None, **changes: Any) -> Pictures:
    """A picture; the base where nothing else is said is ``general``."""
    return client.draw(fusion, **{"model": BASE, **changes})


@functools.cache
def _host_draws(client: Client, changes: str) -> Pictures:
    return draw(client, **{key: _PICTURES.get(value, value) if isinstance(value, str) else value
                           for key, value in json.loads(changes).items()})  # fmt: skip


def host_draws(client: Client, **changes: Any) -> Pictures:
    """The fork's own picture, drawn once for all tests; ``draw`` is for those that ask whether it is still the same."""
    for key, value in changes.items():
        if isinstance(value, Image.Image):
            changes[key] = f"picture {hashlib.sha256(value.tobytes()).hexdigest()}"
            _PICTURES[changes[key]] = value
    return _host_draws(client, json.dumps(changes, sort_keys=True))


def apart(one: Pictures, other: Pictures) -> int:
    """The largest difference of a pixel."""
    assert len(one.pixels) == len(other.pixels)
    pairs = zip(one.pixels, other.pixels)
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)


def allowed(case: str) -> int:
    """How far the host's own pictures are apart: in inpainting its VAE draws the noise of its encoding by chance."""
    return 1 if case == "inpaint" else 0


def calls(pictures: Pictures) -> list[int]:
    """Each model's U-Net calls, as the infotext tells them."""
    return [int(part.split()[-1]) for part in pictures.params["Fusion U-Net calls"].split(", ")]


def rows(pictures: Pictures) -> list[tuple[int, int]]:
    """Each model's computed rows, and all of them, as the infotext tells them."""
    told = pictures.params["Fusion U-Net rows"].split(", ")
    return [tuple(int(word) for word in part.split() if word.isdigit())[-2:] for part in told]
