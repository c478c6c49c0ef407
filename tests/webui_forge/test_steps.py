"""What happens within a pass: masks, places, lowered guidance, skipped steps, and ends of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.webui_forge.drawing import (
    ALONE,
    BASE,
    CASES,
    COPY,
    HIRES,
    INPAINT,
    OTHER,
    allowed,
    apart,
    calls,
    draw,
    host_draws,
    rows,
)
from tests.webui_live.client import PICTURE, Client, Pictures, RefusedError, expert

STEPS = {"steps": 20, "prompt": "a fox, flat drawing", "negative_prompt": "", "cfg_scale": 4}
ON = {"skipping": "Forecast", "skip_tolerance": 0.3}
LOWERED = {"guidance": "always", "guidance_until": 1000}


def psnr(a: Pictures, b: Pictures) -> float:
    errors = [np.mean((x.astype(float) - y) ** 2) for x, y in zip(a.pixels, b.pixels, strict=True)]
    return float(10 * np.log10(255**2 / max(*errors, 1e-3)))


# Fusing


def test_a_fused_picture_is_neither_models(client: Client) -> None:
    """And no pixel of it is far from both of them in the places that one of them draws."""
    base, alone = host_draws(client), host_draws(client, model=OTHER)
    fused = draw(client, expert(OTHER))
    assert calls(fused) == [4, 4]
    assert min(apart(fused, base), apart(fused, alone)) > 20


@pytest.mark.parametrize("case", ["txt2img", "batch", "SDXL", "DDIM"])
def test_each_half_is_its_own_models(client: Client, case: str) -> None:
    """By a place, after two steps: each half is nearer to its own model's picture.

    The VAE joins them, and more so what a random U-Net has left.
    """
    other = "tiny_xl_b" if case == "SDXL" else OTHER
    model = CASES[case].get("model", BASE)
    changes = {**CASES[case], "steps": 2}
    base, alone = host_draws(client, **changes), host_draws(client, **{**changes, "model": other})
    fused = draw(client, expert(other, place="columns 1:1 2"), **{**changes, "model": model})
    for i, pixels in enumerate(fused.pixels):
        for half, own, others in ((slice(0, 48), base, alone), (slice(80, None), alone, base)):
            near, far = (np.abs(pixels[:, half].astype(int) - p.pixels[i][:, half]).mean() for p in (own, others))
            assert near < (0.98 if case == "SDXL" else 0.6) * far


def test_a_picture_does_not_depend_on_its_batch(client: Client) -> None:
    both = draw(client, expert(OTHER), batch_size=2)
    for i, pixels in enumerate(both.pixels):
        one = draw(client, expert(OTHER), seed=PICTURE["seed"] + i)
        assert np.abs(pixels.astype(int) - one.pixels[0]).max() <= 2


def test_the_base_with_another_prompt(client: Client) -> None:
    other = host_draws(client, prompt="a car", negative_prompt="blue")
    drawn = draw(client, expert("same as base", prompt="a car", negative_prompt="blue", **ALONE))
    assert apart(drawn, other) == 0


def test_whose_text_encoder_reads(client: Client) -> None:
    """An expert whose U-Net is the base's and whose text encoder is not."""
    other = host_draws(client, model="other_text")
    own, base = (draw(client, expert("other_text", text_encoder=encoder, **ALONE)) for encoder in ("own", "base"))
    assert apart(own, other) == 0
    assert apart(base, host_draws(client)) == 0
    assert apart(own, base) > 20


def test_ngms_keeps_the_mask(client: Client) -> None:
    fused = draw(client, expert(OTHER), s_min_uncond=4.0, steps=8)
    assert "NGMS: 4.0" in fused.infotexts[0]
    assert calls(fused) == [8, 8]


@pytest.mark.parametrize("passes", ["first", "hires"])
def test_passes_of_hires_fix(client: Client, passes: str) -> None:
    """Only the pass that is asked for is fused; steps of the second pass are told by their calls."""
    changes = {**HIRES, "hr_second_pass_steps": 3}
    both = draw(client, expert(OTHER), **changes)
    one = draw(client, expert(OTHER, passes=passes), **changes)
    assert calls(both)[1] > calls(one)[1] > 0
    assert apart(draw(client, expert(COPY, passes=passes), **changes), host_draws(client, **changes)) == 0


def test_a_model_of_another_prediction(client: Client) -> None:
    """An average of one that predicts v and one that predicts the noise is neither; alone each is itself."""
    base, other = (host_draws(client, model=model) for model in ("tiny_xl", "tiny_xl_v"))
    for one, model in ((base, "tiny_xl_v"), (other, "tiny_xl")):
        turned = "tiny_xl" if model == "tiny_xl_v" else "tiny_xl_v"
        assert apart(draw(client, expert(turned, **ALONE), model=model), one) == 0
    ways = [draw(client, expert(b, method="Average"), model=a)
            for a, b in (("tiny_xl", "tiny_xl_v"), ("tiny_xl_v", "tiny_xl"))]  # fmt: skip
    assert apart(*ways) <= 2
    assert min(apart(ways[0], base), apart(ways[0], other)) > 5


def test_an_inpainting_model(client: Client) -> None:
    off = host_draws(client, model="tiny_inpaint", **INPAINT)
    on = draw(client, expert("same as base"), model="tiny_inpaint", **INPAINT)
    assert apart(on, off) <= 1
    with pytest.raises(RefusedError, match="it has 9 input channels; allowed with this base: 4"):
        draw(client, expert("tiny_inpaint"))


# Guidance


#: The host adds AND parts otherwise where it predicts nothing without the prompt.
@pytest.mark.where(lambda case, scale, **_: (case, scale) != ("AND", 1))
@pytest.mark.where(lambda fork, case, scale: fork == "neo" or (scale == 1) == (case in ("DDIM", "batch", "SDXL, v")))
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("case", ["txt2img", "DDIM", "Heun", "AND", "batch", "hires", "inpaint", "SDXL", "SDXL, v"])
def test_a_lower_scale_is_the_hosts_picture_at_that_scale(client: Client, case: str, scale: int) -> None:
    scales = {"cfg_scale": scale} | ({"hr_cfg": scale} if case == "hires" else {})
    host, full = host_draws(client, **CASES[case] | scales), host_draws(client, **CASES[case])
    lowered = draw(client, {**LOWERED, "guidance_after": scale}, **CASES[case])
    assert apart(full, host) > 5
    assert apart(lowered, host) <= max(1, allowed(case))


def test_without_guidance_half_of_the_rows_are_computed(client: Client) -> None:
    drawn = draw(client, expert(OTHER, **LOWERED, guidance_after=1), batch_size=2)
    assert drawn.params["Fusion U-Net rows"] == "base 8, expert 1 8"


# Skipping


@pytest.mark.where(lambda fork, sampler: fork == "neo" or sampler in ("DPM++ 2M", "DDIM"))
@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DDIM", "Euler a", "UniPC"])
def test_calls_are_spared(client: Client, sampler: str) -> None:
    changes = STEPS | {"sampler_name": sampler, "batch_size": 2}
    off, on = host_draws(client, **changes), draw(client, ON, **changes)
    ((computed, of_all),) = rows(on)
    assert of_all == 2 * 2 * (19 if sampler == "DDIM" else 20)  # the host's DDIM leaves out its last one
    assert computed < 0.95 * of_all
    assert psnr(on, off) > 30


@pytest.mark.where(lambda fork, sampler: fork == "neo" or sampler == "Euler")
@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DDIM"])
def test_corrections_bring_the_picture_nearer(client: Client, sampler: str) -> None:
    off = host_draws(client, sampler_name=sampler, **STEPS)
    near, far = (draw(client, ON | {"skip_correct": on, "skip_max": 2}, sampler_name=sampler, **STEPS)
                 for on in (True, False))  # fmt: skip
    assert psnr(near, off) > psnr(far, off)


#: The other cases are in test_what_works.py.
@pytest.mark.parametrize("case", ["NGMS", "SDXL, v"])
def test_skipping_in_other_requests(client: Client, case: str) -> None:
    changes = {**STEPS, **CASES[case], "steps": 20}
    off, on = host_draws(client, **changes), draw(client, ON, **changes)
    computed, of_all = rows(on)[0]
    assert computed < of_all
    assert psnr(on, off) > 25


def test_skipping_without_guidance(client: Client) -> None:
    """At a scale of 1 there are conditional rows only."""
    changes = STEPS | {"cfg_scale": 1}
    off, on = host_draws(client, **changes), draw(client, ON, **changes)
    computed, of_all = rows(on)[0]
    assert computed < of_all <= 20
    assert psnr(on, off) > 30


def test_a_skipped_picture_does_not_depend_on_its_neighbour(client: Client) -> None:
    both = draw(client, ON, batch_size=2, **STEPS)
    alone = [draw(client, ON, **STEPS, seed=PICTURE["seed"] + i) for i in range(2)]
    assert sum(rows(one)[0][0] for one in alone) == rows(both)[0][0]
    for i, one in enumerate(alone):
        assert np.abs(both.pixels[i].astype(int) - one.pixels[0]).max() <= 2


def test_the_papers_policy(client: Client) -> None:
    on = draw(client, {"skipping": "Paper", "skip_threshold": 0.1}, **STEPS)
    computed, of_all = rows(on)[0]
    assert computed < of_all


def test_fused_models_are_skipped_each(client: Client) -> None:
    on = draw(client, expert(OTHER, **ON), **STEPS)
    assert all(computed < of_all for computed, of_all in rows(on))


# Ends


@pytest.mark.parametrize(
    ("what", "fusion"),
    [("interrupt", expert(OTHER)), ("skip", expert(OTHER)), ("skip", ON),
     ("interrupt", expert(OTHER, method="AFA", afa_maps="uniform"))],
    ids=["SNB", "SNB, skipped", "skipping, skipped", "AFA"],
)  # fmt: skip
def test_interrupt(client: Client, what: str, fusion: dict) -> None:
    off = draw(client)  # so that the base is loaded when its state is read
    before = client.state()
    client.ask("/probe/arm", what=what, step=2)
    drawn = draw(client, fusion, steps=8)
    assert 0 < calls(drawn)[0] < 8
    assert apart(draw(client), off) == 0
    assert client.state() == before


@pytest.mark.parametrize(
    "fusion",
    [expert(OTHER), expert(OTHER, method="AFA", afa_maps="uniform"), ON, {"freeu": "Custom", "freeu_b3": 1.2}],
    ids=["SNB", "AFA", "skipping", "FreeU"],
)  # fmt: skip
def test_an_error_in_the_unet_leaves_nothing(client: Client, fusion: dict) -> None:
    off = draw(client)  # so that the base is loaded when its state is read
    before = client.state()
    client.ask("/probe/arm", what="fail", step=2)
    with pytest.raises(RefusedError, match="500"):
        draw(client, fusion)
    assert apart(draw(client), off) == 0
    assert client.state() == before


# What cannot be


@pytest.mark.parametrize(
    ("fusion", "changes", "told"),
    [
        (expert(OTHER), {"cfg_scale": 1}, "cfg_scale: 1.0 is not allowed.*nothing is predicted without the prompt"),
        (expert(OTHER), HIRES | {"hr_cfg": 1}, "hr_cfg: 1.0 is not allowed"),
        (expert("tiny_xl"), {}, "it is sdxl; allowed with this base: sd1"),
        (expert("tiny_xl_v", method="AFA", afa_maps="uniform"), {"model": "tiny_xl"}, "it predicts v; allowed with"),
        (expert("nix"), {}, "no such checkpoint"),
        (expert(OTHER), {"refiner_checkpoint": "food", "refiner_switch_at": 0.5}, "refiner: 'food.*replaces the base"),
        (expert(OTHER, prompt="a AND b"), {}, "AND parts weighted"),
        ({"freeu": "Auto"}, {"model": BASE}, "factors for 4 x or 2 x"),
    ],
)  # fmt: skip
def test_refused_before_sampling(client: Client, fusion: Any, changes: dict, told: str) -> None:
    with pytest.raises(RefusedError, match=f"422: .*{told}"):
        draw(client, fusion, **changes)


@pytest.fixture
def turned(client: Client) -> Iterator[Callable[[str], None]]:
    """Makes the loaded model one of another kind, of the fork's own classes, until the test's end."""
    draw(client, steps=1)

    def turn(into: str) -> None:
        if not client.ask("/probe/turn", into=into)["known"]:
            pytest.skip(f"this fork has no {into}")

    yield turn
    client.ask("/probe/turn")


#: One of each method; an expert of its own would be refused already by its file.
METHODS = {"SNB": expert("same as base", prompt="a dog"), "AFA": expert(COPY, method="AFA", afa_maps="uniform"),
           "FreeU": {"freeu": "SD1.5"}, "skipping": {"skipping": "Forecast"}}  # fmt: skip


@pytest.mark.parametrize("kind", ["Flux", "Z-Image", "Qwen"])
def test_a_transformer_is_refused(client: Client, turned: Callable[[str], None], kind: str) -> None:
    """By a sentence that names the control and the remedy, and without a step."""
    turned(kind)
    told = ("base checkpoint: 'general' is not allowed; it is no U-Net of Stable Diffusion; "
            "allowed: Stable Diffusion 1, 2 and XL")  # fmt: skip
    for fusion in METHODS.values():
        with pytest.raises(RefusedError, match=f"422: .*{told}"):
            draw(client, fusion)


def test_a_compiled_model(client: Client, turned: Callable[[str], None]) -> None:
    """By the fork's own script where it has one. Blocks then run without hooks; what needs these is refused."""
    titles = client.ask("/sdapi/v1/scripts")["txt2img"]
    compiler = next((title for title in titles if title.startswith("torch")), None)
    if compiler is None:
        turned("compiled")
    changes = {"others": {compiler: ["dynamic"]}} if compiler else {}
    try:
        for method in ("AFA", "FreeU"):
            with pytest.raises(RefusedError, match=r"422: .*torch\.compile: 'on' is not allowed; allowed with FreeU"):
                draw(client, METHODS[method], **changes)
    finally:
        draw(client, model=OTHER, steps=1)  # that script leaves a function on the model
