"""What changes nothing changes nothing, and an expert alone draws what the fork draws with that checkpoint loaded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.webui_forge.drawing import ALONE, CASES, allowed, apart, calls, draw, host_draws, models_of
from tests.webui_live.client import Client, expert

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


def is_diagonal(rows: Any, row: str, case: str) -> bool:
    """Of a table of rows by cases one row in each case, in turn."""
    return list(rows).index(row) == list(CASES).index(case) % len(rows)


@pytest.mark.where(lambda fork, method, case: fork == "neo" or method == "all" or is_diagonal(NOTHING, method, case))
@pytest.mark.parametrize("method", NOTHING)
@pytest.mark.parametrize("case", CASES)
def test_what_changes_nothing(client: Client, method: str, case: str) -> None:
    base, copy, other = models_of(case)
    names = {"COPY": copy, "OTHER": other}
    experts = [{"checkpoint": names[e]} for e in NOTHING[method].get("experts", ())]
    fusion = {"guidance": "off"} | NOTHING[method] | {"experts": experts}
    if case == "SDXL, v" and method == "AFA, base":  # whose other model predicts the noise
        fusion["experts"] = [{"checkpoint": copy}]
    if not fusion["experts"]:
        del fusion["experts"]
    off = host_draws(client, **{**CASES[case], "model": base})
    on = draw(client, fusion, **{**CASES[case], "model": base})
    assert apart(on, off) <= allowed(case)
    assert off.pixels[0].std() > 1
    assert all(calls(on))


@pytest.mark.where(lambda method, case, **_: (method, case) != ("AFA", "SDXL, v"))  # they predict otherwise
@pytest.mark.where(lambda fork, method, case: fork == "neo" or is_diagonal(ONE, method, case))
@pytest.mark.parametrize("method", ONE)
@pytest.mark.parametrize("case", CASES)
def test_an_expert_alone(client: Client, method: str, case: str) -> None:
    base, _, other = models_of(case)
    alone, off = (host_draws(client, **{**CASES[case], "model": model}) for model in (other, base))
    on = draw(client, expert(other, **ONE[method]), **{**CASES[case], "model": base})
    assert apart(on, alone) <= allowed(case)
    assert apart(alone, off) > 20
