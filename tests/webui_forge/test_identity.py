"""What changes nothing changes nothing, and an expert alone draws what the fork draws with that checkpoint loaded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.webui_forge.drawing import ALONE, CASES, allowed, apart, calls, draw, models_of
from tests.webui_live.client import Client, Pictures, expert

#: Requests that must draw what the host draws alone; COPY stands for a checkpoint with the base's own weights.
NOTHING: dict[str, dict[str, Any]] = {
    "SNB": {"experts": ["COPY"], "snb_hold": 500},
    "Average": {"experts": ["COPY"], "method": "Average"},
    "AFA": {"experts": ["COPY"], "method": "AFA", "afa_maps": "uniform"},
    "AFA, base": {"experts": ["OTHER"], "method": "AFA", "afa_maps": "only base"},
    "FreeU": {"freeu": "Custom"},
    "skipping": {"skipping": "Forecast", "skip_warmup": 1000},
    "all": {"experts": ["COPY"], "freeu": "Custom", "skipping": "Forecast", "skip_warmup": 1000, "guidance": "always",
            "guidance_after": 30},
}  # fmt: skip
#: Requests that must draw what the host draws with the other checkpoint.
ONE: dict[str, dict[str, Any]] = {
    "SNB": ALONE,
    "place": {"place": "0,0,1,1"},
    "AFA": {"method": "AFA", "afa_maps": "only expert 1"},
}


@pytest.fixture(scope="module")
def drawn() -> dict[Any, Pictures]:
    """The host's own pictures, by fork, checkpoint and case."""
    return {}


def host_draws(client: Client, drawn: dict[Any, Pictures], model: str, case: str) -> Pictures:
    key = (client.url, model, case)
    if key not in drawn:
        drawn[key] = draw(client, **{**CASES[case], "model": model})
    return drawn[key]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", NOTHING)
def test_what_changes_nothing(client: Client, drawn: dict[Any, Pictures], method: str, case: str) -> None:
    base, copy, other = models_of(case)
    names = {"COPY": copy, "OTHER": other}
    experts = [{"checkpoint": names[e]} for e in NOTHING[method].get("experts", ())]
    fusion = {"guidance": "off"} | NOTHING[method] | {"experts": experts}
    if case == "SDXL, v" and method == "AFA, base":  # whose other model predicts the noise
        fusion["experts"] = [{"checkpoint": copy}]
    if not fusion["experts"]:
        del fusion["experts"]
    off = host_draws(client, drawn, base, case)
    on = draw(client, fusion, **{**CASES[case], "model": base})
    assert apart(on, off) <= allowed(case)
    assert off.pixels[0].std() > 1
    assert all(calls(on))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ONE)
def test_an_expert_alone(client: Client, drawn: dict[Any, Pictures], method: str, case: str) -> None:
    base, _, other = models_of(case)
    if case == "SDXL, v" and method == "AFA":
        pytest.skip("AFA is for models of one prediction")
    alone = host_draws(client, drawn, other, case)
    on = draw(client, expert(other, **ONE[method]), **{**CASES[case], "model": base})
    assert apart(on, alone) <= allowed(case)
    assert apart(alone, host_draws(client, drawn, base, case)) > 20
