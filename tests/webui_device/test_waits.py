"""How often a step of the real WebUI waits for the device, in half precision: at most once in the extension's code."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.webui_live.client import Client, expert

SIZE = {"prompt": "a fox left of a tractor, flat drawing", "negative_prompt": "", "width": 128, "height": 128}
FEW, MANY = 6, 14
FORECAST = {"skipping": "Forecast"}
AFA = {"method": "AFA", "afa_aggregator": "afa-animals-vehicles"}
#: name -> (fusion, changes of the request, waits a step that are allowed in lib_fusion).
WAYS: dict[str, tuple[Any, dict, float]] = {
    "SNB": (expert("vehicles"), {}, 1),
    "SNB, the panel's defaults": ({"experts": [{"checkpoint": "vehicles"}]}, {}, 1),
    "SNB, batch 4": (expert("vehicles"), {"batch_size": 4}, 1),
    "SNB, AND": (expert("vehicles"), {"prompt": "a fox AND a tractor :0.8"}, 1),
    "SNB, DPM++ 2M": (expert("vehicles"), {"sampler_name": "DPM++ 2M"}, 1),
    "Average": (expert("vehicles", method="Average"), {}, 1),
    "AFA": (expert("vehicles", **AFA), {}, 1),
    "AFA, batch 4": (expert("vehicles", **AFA), {"batch_size": 4}, 1),
    "FreeU": ({"freeu": "Custom", "freeu_b3": 1.3, "freeu_s3": 0.5}, {}, 1),
    "Forecast": (FORECAST, {}, 1),
    "Forecast, batch 4": (FORECAST, {"batch_size": 4}, 1),
    "Forecast, SNB": (expert("vehicles", **FORECAST), {}, 1),
    "Forecast, Euler a": (FORECAST, {"sampler_name": "Euler a"}, 1),
    "Forecast, DDIM": (FORECAST, {"sampler_name": "DDIM"}, 1.2),  # and what the host costs by itself there
    "Paper": ({"skipping": "Paper", "skip_threshold": 0.0}, {}, 1),
    "a LoRA": ({"experts": [{"checkpoint": "same as base", "prompt": "a bus <lora:demo-vehicles:1>"}]}, {}, 1),
}


def waits(client: Client, fusion: Any, changes: dict, steps: int) -> Counter:
    """Waits by (kind, operator, place) of a generation with everything loaded."""
    body = SIZE | {"sampler_name": "Euler"} | changes | {"steps": steps}
    client.draw(fusion, model="animals", **body)
    client.ask("/device/record")
    client.draw(fusion, model="animals", **body)
    found: Counter = Counter()
    for times, kind, operator, place in client.ask("/device/recorded"):
        found[kind, operator, place] += times
    return found


@pytest.mark.parametrize("name", WAYS)
def test_a_step_waits_once(half: Client, name: str) -> None:
    """By two numbers of steps: their difference is what a step costs, without what a pass costs."""
    fusion, changes, allowed = WAYS[name]
    few, many = (waits(half, fusion, changes, steps) for steps in (FEW, MANY))
    each = {key: (many[key] - few[key]) / (MANY - FEW) for key in many.keys() | few.keys()}
    ours = {key: value for key, value in each.items() if "lib_fusion" in key[2] and value}
    assert sum(ours.values()) <= allowed, ours
