"""The methods on a device in each way that people run the WebUI, against the CPU in float32 and against each other.

The differences are printed (``-s``), in levels of 255, and kept in docs/measurements/costs.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.webui_device.conftest import Start
from tests.webui_live.client import Client, Pictures, expert

SIZE = {"prompt": "a fox left of a tractor, flat drawing", "negative_prompt": "", "width": 256, "height": 128,
        "steps": 8, "cfg_scale": 7, "seed": 3, "sampler_name": "Euler"}  # fmt: skip
VEHICLES = "vehicles.safetensors"
TWO = {"experts": [{"checkpoint": VEHICLES}, {"checkpoint": "food.safetensors"}]}
HELD = {"snb_hold": 900}
AFA = {"method": "AFA", "afa_aggregator": "afa-animals-vehicles"}
AFA3 = {"method": "AFA", "afa_aggregator": "afa-animals-vehicles-food"}
FREEU = {"freeu": "Custom", "freeu_b3": 1.3, "freeu_s3": 0.5}
FREEU1 = {"freeu": "Custom", "freeu_version": "1", "freeu_b3": 1.2, "freeu_s3": 0.4, "freeu_high3": 1.1,
          "freeu_cutoff3": 0.5, "freeu_width3": 0.7, "freeu_offset3": 0.6}  # fmt: skip
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7, "steps": 5}
LORA = {"experts": [{"checkpoint": "same as base", "prompt": "a tractor, flat drawing <lora:demo-vehicles:1>"}]}
#: name -> (fusion, changes of the request).
SCENARIOS: dict[str, tuple[Any, dict]] = {
    "base": (None, {}),
    "SNB, the panel's defaults": ({"experts": [{"checkpoint": VEHICLES}]}, {}),
    "SNB, the paper's rule": (expert(VEHICLES), {}),
    "SNB, held at once": (expert(VEHICLES, **HELD), {}),
    "SNB, two experts": (TWO | HELD, {}),
    "SNB, places": ({"experts": [{"checkpoint": VEHICLES, "place": "columns 1:1 2"}]}, {}),
    "SNB, held, AND, batch 2": (expert(VEHICLES, **HELD), {"prompt": "a fox AND a tractor :0.8", "batch_size": 2}),
    "SNB, held, DDIM": (expert(VEHICLES, **HELD), {"sampler_name": "DDIM"}),
    "SNB, held, hires": (expert(VEHICLES, **HELD), HIRES),
    "SNB, held, img2img": (expert(VEHICLES, **HELD), {"img2img": True, "denoising_strength": 0.7}),
    "SNB, held, LoRA": (LORA | HELD, {}),
    "Average": (expert(VEHICLES, method="Average"), {}),
    "Average, v beside noise": (expert("tiny_v.safetensors", method="Average"), {"model": "tiny_a"}),
    "AFA, trained": (expert(VEHICLES, **AFA), {}),
    "AFA, trained, three": (TWO | AFA3, {}),
    "AFA, only expert 1": (expert(VEHICLES, method="AFA", afa_maps="only expert 1"), {}),
    "FreeU 2": (FREEU, {}),
    "FreeU 1, filtered": (FREEU1, {}),
    "SNB, held, FreeU 2": (expert(VEHICLES, **HELD, **FREEU), {}),
    "SDXL, held": (expert("tiny_xl_b.safetensors", **HELD), {"model": "tiny_xl", "steps": 4}),
    "Forecast": ({"skipping": "Forecast"}, {"steps": 16}),
    "Forecast, Euler a": ({"skipping": "Forecast"}, {"steps": 16, "sampler_name": "Euler a"}),
    "Forecast, SNB, held": (expert(VEHICLES, skipping="Forecast", **HELD), {"steps": 16}),
    "Paper, DDIM": ({"skipping": "Paper"}, {"steps": 16, "sampler_name": "DDIM"}),
}
#: How far half precision may be off on average, in levels of 255, where that is more than 2: the last bit decides who
#: draws at the border of a mask, and the second pass draws another picture from there.
HALF = {"SNB, held, hires": 4.0}


def draw_all(client: Client) -> dict[str, Pictures]:
    rng = np.random.default_rng(1)
    start = Image.fromarray(rng.integers(0, 255, (16, 32, 3), np.uint8)).resize((256, 128))
    drawn = {}
    for name, (fusion, changes) in SCENARIOS.items():
        body = SIZE | {"model": "animals"} | changes
        drawn[name] = client.draw(fusion, **(body | ({"img2img": start} if "img2img" in body else {})))
    return drawn


@pytest.fixture(scope="module")
def on_cpu(start: Start) -> dict[str, Pictures]:
    with start("") as client:
        return draw_all(client)


@pytest.fixture(scope="module")
def in_half(half: Client) -> dict[str, Pictures]:
    return draw_all(half)


def differences(found: dict[str, Pictures], wanted: dict[str, Pictures], title: str) -> dict[str, tuple[float, float]]:
    """(mean, most) in levels of 255, for each scenario."""
    result = {}
    for name, pictures in found.items():
        pairs = zip(pictures.pixels, wanted[name].pixels, strict=True)
        gaps = np.stack([np.abs(a.astype(int) - b.astype(int)) for a, b in pairs])
        result[name] = (float(gaps.mean()), float(gaps.max()))
        print(f"{title:24s} {name:28s} mean {gaps.mean():6.3f}  most {gaps.max():3d}")
    return result


def test_float32_is_the_cpus(start: Start, on_cpu: dict[str, Pictures]) -> None:
    with start("full") as client:
        assert client.ask("/device/dtypes")["unet"] == ["float32"]
        found = differences(draw_all(client), on_cpu, "float32")
    assert {name: most for name, (_, most) in found.items() if most > 1} == {}


def test_half_precision_is_near(in_half: dict[str, Pictures], on_cpu: dict[str, Pictures]) -> None:
    found = differences(in_half, on_cpu, "float16")
    assert {name: mean for name, (mean, _) in found.items() if mean > HALF.get(name, 2.0)} == {}
    assert all(np.isfinite(mean) for mean, _ in found.values())


@pytest.mark.parametrize("kind", ["medvram", "lowvram"])
def test_a_host_that_moves_models_draws_the_same(start: Start, in_half: dict[str, Pictures], kind: str) -> None:
    with start(kind) as client:
        found = draw_all(client)
    assert [name for name, pictures in found.items() if not pictures.same_as(in_half[name])] == []


@pytest.mark.parametrize("place", ["RAM between pictures", "RAM between U-Net calls"])
def test_where_experts_wait_changes_nothing(half: Client, in_half: dict[str, Pictures], place: str) -> None:
    with half.settings({"denoiser_fusion_place": place}):
        found = draw_all(half)
    assert [name for name, pictures in found.items() if not pictures.same_as(in_half[name])] == []


def test_fp8_weights_round_nothing_else(half: Client) -> None:
    """AFA with one model alone is that model, time embedding and all, where the host keeps weights in 8 bits."""
    with half.settings({"fp8_storage": "Enable"}):
        alone = half.draw(expert(VEHICLES, snb_window=[0, 0], snb_outside="expert"), model="animals", **SIZE)
        joint = half.draw(expert(VEHICLES, method="AFA", afa_maps="only expert 1"), model="animals", **SIZE)
    assert joint.same_as(alone)
