"""The guidance interval in the real host: below a timestep its pictures are those of a lower scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.webui_live.client import Client, Pictures, RefusedError, decode, encode, expert
from tests.webui_live.conftest import Names
from tests.webui_live.test_identity import picture
from tests.webui_live.test_places import apart, calls, repaint

SCALE = 7
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
#: The scale is lowered in all of the pass, so that the host's own picture at that scale is what must come out.
ALL: dict[str, Any] = {"guidance": "always", "guidance_until": 1000}
LOWERED: dict[str, Any] = {"guidance": "with experts", "guidance_until": 500, "guidance_after": 2}


def masked() -> dict[str, Any]:
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    return {"img2img": picture(), "mask": encode(mask), "inpainting_fill": 1, "denoising_strength": 0.8, "mask_blur": 0}


def draw(client: Client, fusion: dict | None = None, **changes: Any) -> Pictures:
    """In inpainting the second of two equal requests: the host encodes with chance."""
    given = {"cfg_scale": SCALE, **changes}
    return repaint(client, fusion, **given) if "img2img" in given else client.draw(fusion, **given)


def furthest(one: Pictures, other: Pictures) -> int:
    assert len(one.pixels) == len(other.pixels)
    return max(apart(a, b) for a, b in zip(one.pixels, other.pixels))


#: Changes of the request, by what they show.
CASES: dict[str, dict[str, Any]] = {
    "Euler": {},
    "DDIM": {"sampler_name": "DDIM", "steps": 8},
    "DPM++ 2M": {"sampler_name": "DPM++ 2M", "steps": 8},
    "Heun": {"sampler_name": "Heun"},
    "batch": {"batch_size": 2},
    "AND": {"prompt": "a cat AND a dog :0.6"},
    "in two calls": {"settings": {"batch_cond_uncond": False}},
    "prompts of other lengths": {"prompt": "a cat, " * 30, "negative_prompt": ""},
    "v": {"model": "tiny_v"},
    "v, DDIM": {"model": "tiny_v", "sampler_name": "DDIM"},
    "SDXL": {"model": "tiny_xl"},
    "hires fix": HIRES,
    "inpainting": masked(),
}  # fmt: skip


def rows(drawn: Pictures) -> list[int]:
    """Each model's computed rows; all are told where some were left out."""
    told = drawn.params["Fusion U-Net rows"]
    return [int(part.split(" of ")[0].split()[-1]) for part in told.split(", ")]


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_lower_scale_is_the_hosts_picture_at_that_scale(client: Client, names: Names, case: str, scale: int) -> None:
    """Within rounding; without experts, and with one that draws all."""
    changes = {"model": names.base, **CASES[case]}
    host = draw(client, **changes | {"cfg_scale": scale})
    full = draw(client, **changes)
    lowered = draw(client, {**ALL, "guidance_after": scale}, **changes)
    assert furthest(full, host) > 20
    assert furthest(lowered, host) <= 1
    if scale == 1 and case not in ("AND", "in two calls", "prompts of other lengths"):
        spared = rows(lowered)[0]
        assert spared == calls(lowered)[0] * changes.get("batch_size", 1)
    if changes["model"] == names.base:
        alone = draw(client, expert(names.expert, place="0,0,1,1", guidance_after=scale, **ALL), **changes)
        own = draw(client, **changes | {"cfg_scale": scale, "model": names.expert})
        assert furthest(alone, own) <= 1
        assert calls(alone)[0] == 0


def test_without_guidance_half_of_the_rows_are_computed(client: Client, names: Names) -> None:
    """Of prompts in one part; the unconditional rows of AND prompts stay."""
    lowered = {**ALL, "guidance_after": 1}
    plain = draw(client, expert(names.expert, **lowered), batch_size=2)
    assert rows(plain) == [8, 8]  # 4 steps of 2 pictures
    composed = draw(client, expert(names.expert, **lowered), prompt="a cat AND a dog")
    assert rows(composed) == [12, 12]
    late = draw(client, expert(names.expert, guidance="always", guidance_until=500, guidance_after=1), steps=10)
    assert 10 < rows(late)[0] < 20
    assert rows(late)[0] == rows(late)[1]
    apart_calls = draw(client, {**lowered}, settings={"batch_cond_uncond": False})
    assert calls(apart_calls) == [4]  # the host asks twice in a step, and only the first is computed


def test_off_is_the_papers_and_so_is_a_scale_that_is_not_lower(client: Client, names: Names) -> None:
    paper = draw(client, expert(names.expert))
    assert draw(client, expert(names.expert, guidance="off", guidance_after=1)).same_as(paper)
    for scale in (SCALE, SCALE + 3):
        assert draw(client, expert(names.expert, **LOWERED | {"guidance_after": scale})).same_as(paper)
    assert not draw(client, expert(names.expert, **LOWERED)).same_as(paper)


def test_with_experts_means_pictures_with_experts(client: Client, names: Names) -> None:
    skipping = {"skipping": "Forecast", "skip_tolerance": 0}
    assert draw(client, {**skipping, **LOWERED}).same_as(draw(client, skipping))
    assert not draw(client, {**skipping, **LOWERED, "guidance": "always"}).same_as(draw(client, skipping))


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("all_steps", [False, True])
def test_steps_that_the_host_leaves_unguided_stay_its_own(
    client: Client, names: Names, scale: int, all_steps: bool
) -> None:
    """NGMS: those steps have no guidance at all, at any scale; the others have the lower one."""
    changes = {"s_min_uncond": 8.0, "steps": 8, "settings": {"s_min_uncond_all": all_steps}}
    host = draw(client, **changes, cfg_scale=scale)
    lowered = draw(client, {**ALL, "guidance_after": scale}, **changes)
    assert "NGMS: 8.0" in lowered.infotexts[0]
    assert furthest(lowered, host) <= 1
    fused = draw(client, expert(names.expert, **ALL, guidance_after=scale), **changes)
    assert calls(fused)[0] == 8
    early = {"steps": 8, "settings": {"skip_early_cond": 0.4}}
    host, lowered = draw(client, **early, cfg_scale=scale), draw(client, {**ALL, "guidance_after": scale}, **early)
    assert furthest(lowered, host) <= 1


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("skipping", ["Forecast", "Paper"])
def test_with_skipping(client: Client, names: Names, skipping: str, scale: int) -> None:
    amount = {"skipping": skipping, "skip_tolerance": 0.3, "skip_threshold": 0.1}
    fusion = expert(names.expert, **amount, **LOWERED | {"guidance_after": scale})
    drawn = draw(client, fusion, steps=20)
    computed = rows(drawn)
    assert all(0 < count < 40 for count in computed)
    none = draw(client, fusion | {"skip_tolerance": 0, "skip_threshold": 0}, steps=20)
    assert none.same_as(draw(client, expert(names.expert, **LOWERED | {"guidance_after": scale}), steps=20))
    assert draw(client, fusion, steps=20).same_as(drawn)


def test_the_defaults_and_their_infotext(client: Client, names: Names) -> None:
    """What a first user gets, and again from its infotext."""
    first = draw(client, {"experts": [{"checkpoint": names.expert}]}, steps=10)
    assert not first.same_as(draw(client, expert(names.expert), steps=10))
    assert "Fusion guidance interval: with experts" in first.infotexts[0]
    answer = client.ask("/sdapi/v1/txt2img", {"infotext": first.infotexts[0]})
    assert np.array_equal(decode(answer["images"][0]), first.pixels[0])


@pytest.mark.parametrize(
    ("fusion", "told"),
    [
        ({"guidance": "sometimes"}, "guidance: 'sometimes' is not allowed; allowed: with experts, always, off"),
        ({"guidance_after": 0.5}, "guidance_after: 0.5 is not allowed"),
        ({"guidance_until": 1001}, "guidance_until: 1001 is not allowed"),
        ({"experts": [], "guidance": "with experts"}, "experts: .* is not allowed; allowed: 1 to 3 experts"),
    ],
)
def test_what_is_refused(client: Client, names: Names, fusion: dict, told: str) -> None:
    with pytest.raises(RefusedError, match=f"^422: {told}"):
        draw(client, {**expert(names.expert), **fusion})
