"""Every method with every way of making a picture: the ticks of the README's table *What works where*.

A method whose outcome is known by another way must give exactly that, and what it did is counted.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.webui_live.client import PLAIN, Client, Pictures, encode
from tests.webui_live.conftest import Names
from tests.webui_live.host import REPOSITORY, Host
from tests.webui_live.test_identity import picture
from tests.what_works import CASES, METHODS

LORA = "demo-animals"
STEPS = 6
#: With the upscaler that all hosts have.
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "None", "denoising_strength": 0.7}
Draw, Same = Callable[..., Pictures], Callable[[Pictures, Pictures], None]
#: By how many counts of 255 the hosts' own pictures differ, between one loading of a checkpoint and the next.
NOISE = {"img2img": 1, "inpaint": 1}


def changes_of(case: str) -> dict[str, Any]:
    """What a case asks of the host."""
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    paint = {"img2img": picture(), "denoising_strength": 0.6, "steps": 2 * STEPS}
    return {"steps": STEPS} | {
        "img2img": paint,
        "inpaint": paint | {"mask": encode(mask), "inpainting_fill": 1, "mask_blur": 0},
        "hires fix": HIRES,
        "AND": {"prompt": "a cat AND a dog :0.7"},
        "batches": {"batch_size": 2, "n_iter": 2},
        "LoRA": {"prompt": f"a red cat <lora:{LORA}:1>"},
    }.get(case, {})


@functools.cache
def host_draws(client: Client, case: str, **more: Any) -> Pictures:
    """The host's own picture, drawn once for all methods."""
    return client.draw(**(changes_of(case) | more))


def calls(pictures: Pictures) -> list[int]:
    """U-Net calls of the base, the first expert ..."""
    return [int(count) for count in re.findall(r" (\d+)(?:,|$)", pictures.params["Fusion U-Net calls"])]


def rows(pictures: Pictures) -> tuple[int, int]:
    """(computed, of all) U-Net rows of the base."""
    (found,) = re.findall(r"base (\d+) of (\d+)", pictures.params["Fusion U-Net rows"])
    return int(found[0]), int(found[1])


def check_snb(draw: Draw, base: str, expert: str, same: Same, loras: bool) -> None:
    """An expert alone is that checkpoint in the base's place; with the mask both models run."""
    told = {"checkpoint": f"{expert}.safetensors", "loras": loras}
    alone = draw({"experts": [told], **PLAIN, "snb_window": [0, 0], "snb_outside": "expert"}, model=base)
    same(alone, draw(model=expert))
    assert calls(alone)[0] == 0
    both = calls(draw({"experts": [told], **PLAIN}, model=base))
    assert both[0] == both[1] > 0


def check_average(draw: Draw, base: str, expert: str, same: Same, loras: bool) -> None:
    """The average of a model with itself is that model; with another, both run."""
    average = {"method": "Average", **PLAIN}
    itself = draw({"experts": [{"checkpoint": f"{base}.safetensors", "loras": True}], **average}, model=base)
    same(itself, draw(model=base))
    both = calls(draw({"experts": [{"checkpoint": f"{expert}.safetensors", "loras": loras}], **average}, model=base))
    assert both[0] == both[1] > 0


def check_afa(draw: Draw, base: str, expert: str, same: Same, loras: bool) -> None:
    """In lockstep with all weight on one model, that model is alone."""
    for maps, alone in (("only base", base), ("only expert 1", expert)):
        told = {"checkpoint": f"{expert}.safetensors", "loras": loras}
        fused = draw({"experts": [told], "method": "AFA", "afa_maps": maps, **PLAIN}, model=base)
        same(fused, draw(model=alone))
        assert calls(fused)[0] == calls(fused)[1] > 0


def check_freeu(draw: Draw, base: str, expert: str, same: Same, loras: bool) -> None:
    """Factors of one change nothing, and others do."""
    off = draw(model=base)
    same(draw({"freeu": "Custom"}, model=base), off)
    stage = 1 if base == "tiny_xl" else 3  # what the demo's U-Net has is the last one alone
    on = draw({"freeu": "Custom", f"freeu_b{stage}": 1.4, f"freeu_s{stage}": 0.5}, model=base)
    assert not any(np.array_equal(a, b) for a, b in zip(on.pixels, off.pixels, strict=True))
    assert calls(on)[0] > 0


def check_skipping(draw: Draw, base: str, expert: str, same: Same, loras: bool) -> None:
    """Where nothing is forecast nothing changes; else rows are spared, and the picture stays near."""
    changes = {"steps": 24, "model": base}
    off = draw(**changes)
    same(draw({"skipping": "Forecast", "skip_warmup": 1000}, **changes), off)
    on = draw({"skipping": "Forecast", "skip_tolerance": 0.1}, **changes)
    computed, of_all = rows(on)
    assert computed < of_all
    errors = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(on.pixels, off.pixels, strict=True)]
    assert 10 * np.log10(255**2 / max(*errors, 1e-9)) > 25


CHECKS = {"SNB": check_snb, "Average": check_average, "AFA": check_afa, "FreeU": check_freeu,
          "Skipping": check_skipping}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_it_works(client: Client, names: Names, host: Host, method: str, case: str) -> None:
    base, expert = ("tiny_xl", "tiny_xl_b") if case == "SDXL" else (names.base, names.expert)
    if case == "LoRA":
        shutil.copy(REPOSITORY / f"demo/loras/{LORA}.safetensors", host.data / "models/Lora")
        client.ask("/sdapi/v1/refresh-loras", {})

    def draw(fusion: Any = None, **more: Any) -> Pictures:
        if fusion is None:
            return host_draws(client, case, **more)
        return client.draw(fusion, **(changes_of(case) | more))

    def same(found: Pictures, expected: Pictures) -> None:
        assert len(found.pixels) == len(expected.pixels)
        for a, b in zip(found.pixels, expected.pixels):
            assert np.abs(a.astype(int) - b).max() <= NOISE.get(case, 0)

    assert draw(model=base).pixels[0].std() > 1
    CHECKS[method](draw, base, expert, same, case == "LoRA")
