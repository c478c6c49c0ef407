"""The same request in AUTOMATIC1111's WebUI and in a fork: pictures differ by what the two differ in themselves.

Where two models are equally salient rounding decides between them, and the pictures go apart from there; in these
requests that is so in few positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from tests.webui_forge.drawing import apart
from tests.webui_forge.forks import copy_others
from tests.webui_live.client import Client, Pictures, expert
from tests.webui_live.host import Host, prepare_data
from tests.webui_live.needs import the_host

#: By how much a fused picture may differ further than those of the host's own: rounding turns a mask here and there.
MORE = 8
ANIMALS = "animals"
FUSIONS: dict[str, dict[str, Any]] = {
    "SNB": expert(ANIMALS),
    "SNB, held": expert(ANIMALS, snb_hold=600, snb_from=800),
    "SNB, divergence": expert(ANIMALS, snb_saliency="divergence", snb_hold=600),
    "two experts": {"experts": [{"checkpoint": ANIMALS, "prompt": "a fox", "place": "columns 1:1 1"},
                                {"checkpoint": "vehicles"}], "place_strength": 0.9, "snb_hold": 600,
                    "guidance": "off"},
    "place": expert(ANIMALS, place="columns 1:1 2"),
    "places only, skipping": expert(ANIMALS, place="columns 1:1 1", place_crop=True, skipping="Forecast",
                                    skip_tolerance=0.5),
    "Average": expert(ANIMALS, method="Average"),
    "AFA": {"method": "AFA", "afa_aggregator": "afa-animals-vehicles", "afa_force": True, "guidance": "off"},
    "FreeU": {"freeu": "Custom", "freeu_b3": 1.3, "freeu_s3": 0.7},
    "skipping": {"skipping": "Forecast", "skip_tolerance": 0.5},
    "lowered guidance": expert(ANIMALS, guidance="always", guidance_until=500, guidance_after=1),
    "LoRA": expert("same as base", prompt="<lora:demo-animals:0.8>", method="Average"),
}  # fmt: skip
PICTURE = {"prompt": "a fox left of a tractor, flat drawing", "negative_prompt": "", "steps": 12, "cfg_scale": 4,
           "width": 256, "height": 128, "model": "general"}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "Euler": {}, "DDIM": {"sampler_name": "DDIM"}, "img2img": {"denoising_strength": 0.6, "seed": 6},
}  # fmt: skip
#: Requests in which they are many positions, so that nothing can be said. A mask that is held is the same in all hosts.
TIED = {("SNB", "img2img"), ("two experts", "Euler")}


@pytest.fixture(scope="session")
def a1111(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    the_host()
    data = tmp_path_factory.mktemp("a1111")
    prepare_data(data)
    copy_others(data / "models")
    running = Host(data, "general")
    yield Client(running.url)
    running.stop()


@pytest.fixture(scope="session")
def start(a1111: Client) -> Image.Image:
    """What img2img begins with: a picture by a model that knows the prompt."""
    return Image.fromarray(a1111.draw(**PICTURE | {"model": ANIMALS, "seed": 5, "steps": 20}).pixels[0])


@pytest.fixture(scope="session")
def of_a1111(a1111: Client, start: Image.Image) -> Callable[[str, str], Pictures]:
    """Its picture by a method, or none, in a case; once for all forks."""
    return functools.cache(lambda method, case: draw_in(a1111, start, method, case))


@pytest.fixture(scope="module")
def off(client: Client, start: Image.Image) -> Callable[[str], Pictures]:
    """The fork's own picture in a case."""
    return functools.cache(lambda case: draw_in(client, start, "", case))


def draw_in(client: Client, start: Image.Image, method: str, case: str) -> Pictures:
    changes = PICTURE | CASES[case] | ({"img2img": start} if case == "img2img" else {})
    return client.draw(FUSIONS.get(method), **changes)


def is_drawn_in_forge(method: str, case: str) -> bool:
    """All of one sampler's; img2img and the other kind of sampler by what acts in different ways on a step."""
    return case == "Euler" or method in ("SNB, held", "AFA", "skipping")


@pytest.mark.where(lambda method, case, **_: (method, case) not in TIED)
@pytest.mark.where(lambda fork, method, case: fork == "neo" or is_drawn_in_forge(method, case))
@pytest.mark.parametrize("method", FUSIONS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_picture(
    client: Client, start: Image.Image, of_a1111: Callable[[str, str], Pictures], off: Callable[[str], Pictures],
    method: str, case: str,
) -> None:  # fmt: skip
    ours = draw_in(client, start, method, case)
    assert apart(ours, of_a1111(method, case)) <= apart(off(case), of_a1111("", case)) + MORE
    assert apart(ours, off(case)) > 2
