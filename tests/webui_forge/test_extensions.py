"""Beside other extensions, those of the fork among them: what they do to a U-Net acts on all models of a pass."""

from __future__ import annotations

from typing import Any

import pytest

from tests.webui_forge.drawing import ALONE, BASE, COPY, OTHER, apart, draw, picture
from tests.webui_forge.forks import Fork
from tests.webui_live.client import Client, encode, expert

CONTROL = {"enabled": True, "module": "None", "model": "tiny_control", "image": encode(picture()), "weight": 0.6}
MERGING = {"token_merging_ratio": 0.5, "token_merging_downsample": 2, "token_merging_no_rand": True}
#: Changes of a request. A script's arguments by the first word of its title; "patched" is the tests' own (probe.py).
OTHERS: dict[str, dict[str, Any]] = {
    "FreeU": {"others": {"freeu": [True, 1.3, 1.4, 0.9, 0.2, 0.0, 1.0]}},
    "Kohya HRFix": {"others": {"kohya": [True, 3, 2.0, 0.0, 0.35, False, "bicubic", "bicubic"]}},
    "ControlNet": {"others": {"controlnet": [CONTROL]}},
    "token merging": {"settings": MERGING},
    "Dynamic Thresholding": {"others": {"dynamicthresholding": [
        True, 3.0, 0.95, "Constant", 0.0, "Constant", 0.0, 4.0, "enable", "MEAN", "AD", 1.0]}},
    "attention": {"others": {"patched": ["attention"]}},
    "replaced attention": {"others": {"patched": ["replaced attention"]}},
    "encoder": {"others": {"patched": ["encoder"]}},
    "decoder": {"others": {"patched": ["decoder"]}},
    "SAG": {"others": {"selfattentionguidance": [True, 0.8, 2.0, 0.5]}},
    "PAG": {"others": {"perturbedattentionguidance": [True, 3.0, 0.0, 0.0, 1.0]}},
}  # fmt: skip
#: They call the base once more in a step, past its experts.
OF_THE_BASE = {"SAG", "PAG"}
#: Requests that change nothing, with a copy of the base; and those in which the expert alone draws.
NOTHING: dict[str, dict[str, Any]] = {
    "SNB": {"snb_hold": 500},
    "AFA": {"method": "AFA", "afa_maps": "uniform"},
    "skipping": {"skipping": "Forecast", "skip_warmup": 1000},
}
ONE: dict[str, dict[str, Any]] = {"SNB": ALONE, "AFA": {"method": "AFA", "afa_maps": "only expert 1"}}


def changes_of(client: Client, fork: Fork, other: str) -> dict[str, Any]:
    """The request's changes in this fork, where scripts have titles of several words; skips what it has not."""
    changes = dict(OTHERS[other])
    if other == "token merging" and not MERGING.keys() <= client.ask("/sdapi/v1/options").keys():
        pytest.skip(f"{fork.title} merges tokens at random, and only where the tiny U-Net has no attention")
    titles = client.ask("/sdapi/v1/scripts")["txt2img"]
    for start, args in changes.get("others", {}).items():
        title = next((title for title in titles if title.split()[0] == start), None)
        if title is None:
            pytest.skip(f"{fork.title} has no {other}")
        if start == "controlnet":  # Forge adds a hash to the name
            models = client.ask("/controlnet/model_list")["model_list"]
            args = [{**args[0], "model": next(name for name in models if name.startswith("tiny_control"))}]
        changes["others"] = {title: args}
    return changes


@pytest.mark.parametrize("other", OTHERS)
def test_it_acts_on_every_model(client: Client, fork: Fork, other: str) -> None:
    """A copy of the base changes nothing of its picture, and an expert alone is that checkpoint under the same."""
    more = changes_of(client, fork, other)
    # Forge's FreeU finds its blocks in a U-Net of SDXL's width alone.
    base, copy, model = ("tiny_xl", "same as base", "tiny_xl_b") if other == "FreeU" else (BASE, COPY, OTHER)
    off, on = draw(client, model=base), draw(client, model=base, **more)
    assert apart(off, on) > 2
    for name, fusion in NOTHING.items():
        assert apart(draw(client, expert(copy, **fusion), model=base, **more), on) == 0, name
    if other not in OF_THE_BASE:
        alone = draw(client, model=model, **more)
        for name, fusion in ONE.items():
            assert apart(draw(client, expert(model, **fusion), model=base, **more), alone) == 0, name
    assert apart(draw(client, model=base), off) == 0  # and the fork keeps a pass's options until the next
