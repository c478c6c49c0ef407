"""Beside what the fork brings with it: what others do to the U-Net acts on all models, as on each of them alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.webui_forge.drawing import ALONE, BASE, COPY, OTHER, apart, draw
from tests.webui_forge.forks import Fork
from tests.webui_live.client import Client, expert

#: Arguments of Forge's own scripts, by the first word of their titles.
OTHERS: dict[str, list[Any]] = {
    "freeu": [True, 1.3, 1.4, 0.9, 0.2, 0.0, 1.0],
    "dynamicthresholding": [True, 3.0, 0.95, "Constant", 0.0, "Constant", 0.0, 4.0, "enable", "MEAN", "AD", 1.0],
    "selfattentionguidance": [True, 0.8, 2.0, 0.5],
    "perturbedattentionguidance": [True, 3.0, 0.0, 0.0, 1.0],
    "kohya": [True, 3, 2.0, 0.0, 0.35, False, "bicubic", "bicubic"],
}
#: The base, one with its weights, and another model, whose blocks each script finds.
MODELS = {other: ("tiny_xl", "same as base", "tiny_xl_b") if other == "freeu" else (BASE, COPY, OTHER)
          for other in OTHERS}  # fmt: skip
NEUTRAL: dict[str, dict[str, Any]] = {
    "SNB": {"snb_hold": 500},
    "AFA": {"method": "AFA", "afa_maps": "uniform"},
    "skipping": {"skipping": "Forecast", "skip_warmup": 1000},
}


def title_in(client: Client, start: str) -> str:
    """A script's title in this fork, in small letters as the API has them, or "" where it has none of it."""
    titles = client.ask("/sdapi/v1/scripts")["txt2img"]
    return next((title for title in titles if title.split()[0] == start), "")


@pytest.mark.parametrize("method", NEUTRAL)
@pytest.mark.parametrize("other", OTHERS)
def test_a_script_of_the_forks_own(client: Client, fork: Fork, other: str, method: str) -> None:
    title = title_in(client, other)
    if not title:
        pytest.skip(f"{fork.title} has no {other}")
    model, copy, _ = MODELS[other]
    more = {"others": {title: OTHERS[other]}, "model": model}
    off, on = draw(client, model=model), draw(client, **more)
    assert apart(off, on) > 2
    assert apart(draw(client, expert(copy, **NEUTRAL[method]), **more), on) == 0
    assert apart(draw(client, model=model), off) == 0


@pytest.mark.parametrize("other", ["freeu", "dynamicthresholding", "kohya"])
def test_it_acts_on_an_expert_alone(client: Client, fork: Fork, other: str) -> None:
    """The other two call the base once more in a step, past its experts."""
    title = title_in(client, other)
    if not title:
        pytest.skip(f"{fork.title} has no {other}")
    base, _, model = MODELS[other]
    more = {"others": {title: OTHERS[other]}}
    alone = draw(client, model=model, **more)
    assert apart(draw(client, expert(model, **ALONE), model=base, **more), alone) == 0
    draw(client)  # the fork keeps a pass's options until the next
