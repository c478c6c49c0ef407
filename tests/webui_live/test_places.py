"""Where experts draw: painted masks, rectangles, the inpaint mask, and weights, in the real host."""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.webui_live.client import Client, Pictures, RefusedError, decode, encode, expert
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host
from tests.webui_live.test_identity import picture
from tests.webui_live.test_requests import without_seconds

SIZE = 128
#: How far pictures are apart where batches of different sizes have made them.
ROUNDING = 2
#: The host's linear picture of the latents, a pixel for each: no decoder carries what one place shows to another.
LATENTS = {"sd_vae_decode_method": "Approx cheap"}
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}


def mask(*boxes: tuple[int, int, int, int], size: int = SIZE) -> str:
    """A black picture with white rectangles (left, top, right, bottom)."""
    image = Image.new("L", (size, size))
    for box in boxes:
        image.paste(255, box)
    return encode(image)


BLACK, WHITE = mask(), mask((0, 0, SIZE, SIZE))
RIGHT = mask((SIZE // 2, 0, SIZE, SIZE))


def painted(name: str, image: str, **more: Any) -> dict[str, Any]:
    """An expert that draws in the white of a mask."""
    fusion = expert(name, place="mask", **more)
    fusion["experts"][0]["mask"] = image
    return fusion


def calls(drawn: Pictures) -> list[int]:
    return [int(part.split()[-1]) for part in drawn.params["Fusion U-Net calls"].split(", ")]


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
@pytest.mark.parametrize("feather", [0, 2])
def test_a_black_mask_is_the_base_and_a_white_one_the_expert(
    client: Client, names: Names, sampler: str, feather: float
) -> None:
    """Bit for bit, and the other model is never called."""
    changes = {"sampler_name": sampler, "batch_size": 2}
    black = client.draw(painted(names.expert, BLACK, place_feather=feather), **changes)
    assert black.same_as(client.draw(**changes))
    assert calls(black)[1] == 0
    white = client.draw(painted(names.expert, WHITE, place_feather=feather), **changes)
    assert calls(white)[0] == 0
    assert white.same_as(client.draw(model=names.expert, **changes))


def test_each_half_is_its_own_models(client: Client, names: Names) -> None:
    """After one step, in the latents: every position of the base's half is the base's, the others the expert's."""
    with client.settings(LATENTS):
        base = client.draw(steps=1, model=names.base).pixels[0]
        alone = client.draw(steps=1, model=names.expert).pixels[0]
        sharp, soft = (
            client.draw(painted(names.expert, RIGHT, place_feather=feather), steps=1, model=names.base).pixels[0]
            for feather in (0, 1)
        )
    side = SIZE // 8
    edge = side // 2
    assert base.shape == (side, side, 3)
    assert (base != alone).any(-1).mean() > 0.9
    assert np.array_equal(sharp[:, :edge], base[:, :edge])
    assert np.array_equal(sharp[:, edge:], alone[:, edge:])
    assert apart(soft[:, : edge - 3], base[:, : edge - 3]) <= 1
    assert apart(soft[:, edge + 3 :], alone[:, edge + 3 :]) <= 1
    assert not np.array_equal(soft, sharp)


def test_in_the_whole_picture_each_half_is_nearer_to_its_own_model(client: Client, names: Names) -> None:
    """The models see each other's halves, so that these are not the same after many steps."""
    changes = {"steps": 10}
    base, alone = client.draw(**changes).pixels[0], client.draw(model=names.expert, **changes).pixels[0]
    fused = client.draw(painted(names.expert, RIGHT, place_feather=0), model=names.base, **changes).pixels[0]

    def distance(one: np.ndarray, columns: slice) -> float:
        return float(np.abs(one.astype(int) - fused)[:, columns].mean())

    left, right = slice(0, SIZE // 2 - 16), slice(SIZE // 2 + 16, SIZE)
    assert distance(base, left) < distance(alone, left) * 0.7  # 38 against 61 of 255 as this is written
    assert distance(alone, right) < distance(base, right) * 0.7  # 27 against 52


@pytest.mark.parametrize("method", ["SNB", "Average"])
def test_without_weight_the_expert_never_runs(client: Client, names: Names, method: str) -> None:
    off = client.draw(expert(names.expert, weight=0, method=method))
    assert off.same_as(client.draw())
    assert calls(off)[1] == 0


def test_weights_between_lead_from_the_base_to_the_expert(client: Client, names: Names) -> None:
    """Each weight is another picture, the further from the base the larger it is."""
    base = client.draw().pixels[0].astype(int)
    drawn = [client.draw(painted(names.expert, WHITE, weight=weight)).pixels[0] for weight in (0.1, 0.5, 1)]
    far = [np.abs(one - base).mean() for one in drawn]
    assert 0 < far[0] < far[1] < far[2]


def test_windows_of_experts(client: Client, names: Names) -> None:
    changes = {"sampler_name": "DDIM", "steps": 8}
    early = client.draw(expert(names.expert, window=[1000, 500]), **changes)
    assert 0 < calls(early)[1] < calls(early)[0]
    assert early.same_as(client.draw(expert(names.expert, snb_window=[1000, 500]), **changes))
    assert 'Fusion expert 1 window: "1000:500"' in early.infotexts[0]
    assert calls(client.draw(expert(names.expert, window=[0, 0])))[1] == 0


def test_places_without_strength_do_nothing(client: Client, names: Names) -> None:
    plain = client.draw(expert(names.expert))
    assert client.draw(painted(names.expert, RIGHT, place_strength=0)).same_as(plain)
    between = client.draw(painted(names.expert, RIGHT, place_strength=0.5))
    assert not between.same_as(plain)
    assert not between.same_as(client.draw(painted(names.expert, RIGHT)))


@pytest.mark.parametrize("text", ["columns 1:1 2", "0.5,0,0.5,1", " 0.5 ,0, 0.5,0.5; 0.5,0.5,0.5,0.5"])
def test_a_named_part_is_the_painted_one(client: Client, names: Names, text: str) -> None:
    named = client.draw(expert(names.expert, place=text))
    assert named.same_as(client.draw(painted(names.expert, RIGHT)))


CASES: dict[str, dict[str, Any]] = {
    "2 x 2": {"batch_size": 2, "n_iter": 2},
    "AND": {"prompt": "a cat AND a dog :0.6"},
    "hires fix": HIRES,
    "another side": {"width": 192, "height": 64},
    "in two calls": {"settings": {"batch_cond_uncond": False}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_mask_and_its_hash(client: Client, names: Names, case: str) -> None:
    """The kept mask makes the same picture and the same infotext, and so does the infotext pasted."""
    changes = CASES[case]
    fused = client.draw(painted(names.expert, RIGHT, place_strength=0.8), **changes)
    assert not fused.same_as(client.draw(**changes))
    (place,) = set(re.findall(r"Fusion expert 1 place: (mask \w{12})", "".join(fused.infotexts)))
    again = client.draw(expert(names.expert, place=place, place_strength=0.8), **changes)
    assert again.same_as(fused)
    assert [*map(without_seconds, again.infotexts)] == [*map(without_seconds, fused.infotexts)]
    if case == "hires fix":
        return  # the host's API refuses its own infotext of hires fix
    with client.settings(changes.get("settings", {})):
        answer = client.ask("/sdapi/v1/txt2img", {"infotext": fused.infotexts[0], "n_iter": 1})
    assert apart(decode(answer["images"][0]), fused.pixels[0]) <= ROUNDING


@pytest.mark.parametrize("case", CASES)
def test_halves_of_two_experts(client: Client, names: Names, case: str) -> None:
    """Places that cover the picture leave the base out; equal experts make the picture of one."""
    changes = CASES[case]
    halves = [{"checkpoint": names.expert, "place": f"columns 1:1 {i}"} for i in (1, 2)]
    fusion = {**expert(names.expert), "experts": halves, "place_feather": 0}
    drawn = client.draw(fusion, **changes)
    assert calls(drawn)[0] == 0
    alone = client.draw(painted(names.expert, WHITE), **changes)
    assert drawn.same_as(alone)


def inpainting(**more: Any) -> dict[str, Any]:
    box = (32, 32, 96, 96)
    return {"img2img": picture(), "mask": mask(box), "inpainting_fill": 1, "denoising_strength": 0.8, "steps": 6,
            "mask_blur": 0, **more}  # fmt: skip


def repaint(client: Client, fusion: dict | None = None, **changes: Any) -> Pictures:
    """The second of two equal requests: the host encodes with chance, which the request before has left as it is."""
    client.draw(fusion, **changes)
    return client.draw(fusion, **changes)


@pytest.mark.parametrize("region", [False, True])
@pytest.mark.parametrize("model", ["", "tiny_inpaint"])
def test_the_inpaint_mask_as_a_place(client: Client, names: Names, region: bool, model: str) -> None:
    """The expert repaints alone: what the base would draw lies outside, where the picture stays as it was."""
    changes = inpainting(inpaint_full_res=region, inpaint_full_res_padding=16)
    base, other = (model, f"{model}_copy") if model else (names.base, names.expert)
    off = repaint(client, model=base, **changes)
    fused = repaint(client, expert(other, place="inpaint", place_feather=0), model=base, **changes)
    assert fused.same_as(off) == bool(model)  # a copy draws what the base draws
    kept = np.ones((SIZE, SIZE), bool)
    kept[24:104, 24:104] = False
    assert np.array_equal(fused.pixels[0][kept], off.pixels[0][kept])
    assert "Fusion expert 1 place: inpaint" in fused.infotexts[0]
    assert all(calls(fused))
    same = repaint(client, painted(other, changes["mask"], place_feather=0), model=base, **changes)
    assert same.same_as(fused)


def test_only_masked_cuts_a_painted_mask_to_the_region(client: Client, names: Names) -> None:
    """The region is the repainted square; the mask is given for the whole picture, in any size."""
    changes = inpainting(inpaint_full_res=True, inpaint_full_res_padding=0)

    def draw(fusion: dict | None) -> Pictures:
        return repaint(client, fusion, model=names.base, **changes)

    off = draw(None)
    white = draw(painted(names.expert, WHITE, place_feather=0))
    inside = draw(painted(names.expert, mask((32, 32, 96, 96)), place_feather=0))
    assert calls(inside)[0] == 0
    assert inside.same_as(white)
    assert not white.same_as(off)
    outside = draw(painted(names.expert, mask((0, 0, 30, SIZE)), place_feather=0))
    assert calls(outside)[1] == 0
    assert outside.same_as(off)
    # The region's right three quarters are not the picture's: they begin at its pixel 48.
    strip = draw(painted(names.expert, mask((48, 0, SIZE, SIZE)), place_feather=0))
    assert all(calls(strip))
    assert not strip.same_as(off)
    assert not strip.same_as(white)
    assert strip.same_as(draw(expert(names.expert, place="0.375,0,0.625,1", place_feather=0)))
    assert strip.same_as(draw(painted(names.expert, mask((96, 0, 256, 256), size=256), place_feather=0)))


def test_the_edge_of_the_region_is_where_it_was_painted(client: Client, names: Names) -> None:
    """The square's left quarter is the base's, the rest the expert's, in the latents after one step."""
    changes = inpainting(inpaint_full_res=True, inpaint_full_res_padding=0, steps=1, denoising_strength=1.0)
    with client.settings({"return_mask_composite": False}):
        base, white, strip = (
            repaint(client, fusion, model=names.base, **changes).pixels[0].astype(int)
            for fusion in (
                None, painted(names.expert, WHITE, place_feather=0),
                painted(names.expert, mask((64, 0, SIZE, SIZE)), place_feather=0),
            )
        )  # fmt: skip

    def distance(one: np.ndarray, columns: slice) -> float:
        return float(np.abs(one - strip)[32:96, columns].mean())

    left, right = slice(32, 56), slice(72, 96)
    assert distance(base, left) < distance(white, left) * 0.5
    assert distance(white, right) < distance(base, right) * 0.5


def test_masks_are_saved_where_the_host_saves_its_own(client: Client, host: Host, names: Names) -> None:
    settings = {"samples_save": True, "save_mask": True}
    client.draw(painted(names.expert, RIGHT), settings=settings, save_images=True)
    (file,) = host.data.rglob("*-fusion-mask.png")
    saved = Image.open(file)
    assert encode(saved.convert("L")) == RIGHT
    assert "Fusion expert 1 place: mask " in saved.info["parameters"]


def test_a_comparison_draws_the_expert_alone_in_the_whole_picture(client: Client, names: Names) -> None:
    drawn = client.draw({**painted(names.expert, RIGHT, weight=0.5), "compare": True})
    alone = client.draw(model=names.expert)
    column = drawn.first[-SIZE:, -2 * SIZE : -SIZE]
    assert np.array_equal(column, alone.pixels[0])
    client.draw(model=names.base)


def test_a_mask_that_is_kept_stays_one_file(client: Client, host: Host, names: Names) -> None:
    folder = host.data / "denoiser-fusion-masks"
    before = len([*folder.iterdir()])
    image = mask((3, 5, 70, 90))
    for text in (image, f"data:image/png;base64,{image}"):
        client.draw(painted(names.expert, text), steps=1)
    assert len([*folder.iterdir()]) == before + 1
    assert not [*folder.glob("*.partial")]


NAME = "tiny_b"
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "an unknown hash": (r"experts\[0\].place: 'mask 0123456789ab' is not allowed; .*not in denoiser-fusion-masks",
                        expert(NAME, place="mask 0123456789ab")),
    "a path": (r"experts\[0\].place: 'mask ../config' is not allowed", expert(NAME, place="mask ../config")),
    "a mask without its place": (r"experts\[0\].place: 'auto' is not allowed; allowed with a mask: mask",
                                 {"experts": [{"checkpoint": NAME, "mask": RIGHT}]}),
    "a place without its mask": (r"experts\[0\].mask: '' is not allowed; .*paint on expert 1's canvas",
                                 expert(NAME, place="mask")),
    "nonsense": (r"experts\[0\].place: 'over there' is not allowed; allowed: auto;", expert(NAME, place="over there")),
    "a rectangle beyond": (r"experts\[0\].place: '0.5,0,0.6,1' is not allowed", expert(NAME, place="0.5,0,0.6,1")),
    "AFA with a weight": (r"experts\[0\].weight: 0.5 is not allowed; allowed with method AFA: 1",
                          expert(NAME, weight=0.5, method="AFA", afa_maps="uniform")),
    "AFA with a place": (r"experts\[0\].place: 'rows 1:1 1' is not allowed; allowed with method AFA: auto",
                         expert(NAME, place="rows 1:1 1", method="AFA", afa_maps="uniform")),
    "the average with a place": (r"experts\[0\].place: 'rows 1:1 1' is not allowed; allowed with method Average: auto",
                                 expert(NAME, place="rows 1:1 1", method="Average")),
    "no picture": (r"experts\[0\].mask: .* is not allowed; allowed: a picture file",
                   painted(NAME, base64.b64encode(b"not a picture").decode())),
    "no base64": (r"experts\[0\].mask: '!!' is not allowed; allowed: a picture file in base64", painted(NAME, "!!")),
    "inpaint without a mask": (r"experts\[0\].place: 'inpaint' is not allowed; allowed in img2img with an inpaint mask",
                               expert(NAME, place="inpaint")),
    "a weight beyond": (r"experts\[0\].weight: 1.5 is not allowed", expert(NAME, weight=1.5)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(client: Client, case: str) -> None:
    told, fusion = WRONG[case]
    with pytest.raises(RefusedError) as caught:
        client.draw(fusion, model="tiny_a")
    assert caught.value.status == 422
    detail = caught.value.answer["detail"]
    assert re.match(told, detail), detail
    assert "\n" not in detail
    assert len(detail) < 400


def test_a_picture_without_an_inpaint_mask_has_no_such_place(client: Client) -> None:
    with pytest.raises(RefusedError, match=r"422: experts\[0\].place: 'inpaint' is not allowed"):
        client.draw(expert(NAME, place="inpaint"), model="tiny_a", img2img=picture())
