"""Other people's extensions beside ours, in a WebUI of their own: all that are in FUSION_TEST_EXTENSIONS.

By default that is ``~/webui-extensions``, with a folder for each, named as its repository (more after the name does not
matter). They need Python packages that the WebUI has not: FUSION_TEST_EXTENSIONS_PYTHON names an interpreter with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.webui_live.client import TITLE, Client, Pictures, RefusedError, decode, encode, expert
from tests.webui_live.host import EXTENSION, Host, find_host, make_checkpoints, prepare_data
from tests.webui_live.needs import the_host
from tests.webui_live.test_identity import picture

#: Two WebUIs with all of them are started before the first test.
pytestmark = pytest.mark.timeout(1800)

FOLDER = Path(os.environ.get("FUSION_TEST_EXTENSIONS") or Path.home() / "webui-extensions")
#: Folder in the WebUI -> title of its script.
EXTENSIONS = {"sd-webui-controlnet": "ControlNet", "adetailer": "ADetailer", "sd-webui-freeu": "FreeU",
              "sd-dynamic-thresholding": "Dynamic Thresholding (CFG Scale Fix)",
              "multidiffusion-upscaler-for-automatic1111": "Tiled Diffusion"}  # fmt: skip
YOLO = "import torch, ultralytics; torch.manual_seed(0); ultralytics.YOLO('yolov8n.yaml').save({path!r})"

ALONE = {"snb_window": [0, 0], "snb_outside": "expert"}
NEUTRAL = {"freeu": "Custom", "freeu_offset1": 0.5}
BASE, COPY, OTHER, WIDE = "tiny_a", "tiny_copy", "tiny_b", "tiny_2x"
UNIFORM = expert(COPY, method="AFA", afa_maps="uniform")
EVERYWHERE = {"ad_only_selected_scripts": False}


def find_extensions() -> dict[str, Path]:
    found = {name: sorted(FOLDER.glob(f"{name}*/scripts")) for name in EXTENSIONS}
    return {name: paths[-1].parent for name, paths in found.items() if paths}


def find_python() -> Path:
    named = os.environ.get("FUSION_TEST_EXTENSIONS_PYTHON") or Path.home() / "webui-ext-venv/bin/python"
    return Path(named) if Path(named).is_file() else the_host()[1]


def control(model: str = "tiny_control", **changes: object) -> dict[str, list]:
    unit = {"enabled": True, "module": "none", "model": model, "image": encode(picture()), "weight": 1.0, **changes}
    return {"ControlNet": [unit]}


def reference() -> dict[str, list]:
    return control("None", module="reference_adain+attn", threshold_a=0.5)


def other_freeu(version: str) -> dict[str, list]:
    factors = ((1.3, 0.6), (1.4, 0.3), (1.2, 0.8))
    stages = [{"backbone_factor": b, "skip_factor": s} for b, s in factors]
    return {"FreeU": [{"enable": True, "version": version, "stage_infos": stages}]}


def our_freeu(version: str) -> dict:
    return {"freeu": "Custom", "freeu_version": version, "freeu_b1": 1.3, "freeu_s1": 0.6, "freeu_b2": 1.4,
            "freeu_s2": 0.3, "freeu_b3": 1.2, "freeu_s3": 0.8}  # fmt: skip


def threshold() -> dict[str, list]:
    args = [True, 3.0, 90.0, "Constant", 0, "Constant", 0, 4, True, "MEAN", "AD", 1.0]
    return {EXTENSIONS["sd-dynamic-thresholding"]: args}


def detail(**changes: object) -> dict[str, list]:
    """With a detector of random weights, which always finds something."""
    unit = {"ad_model": "tiny_yolo.pt", "ad_confidence": 0.0, "ad_mask_k": 1, "ad_denoising_strength": 0.6,
            "ad_use_inpaint_width_height": True, "ad_inpaint_width": 128, "ad_inpaint_height": 128}  # fmt: skip
    return {"ADetailer": [True, False, unit | changes]}


#: What the host draws with the other extensions alone: (their arguments, changes of the request).
CASES = {
    "nothing": ({}, {}),
    "ControlNet": (control(), {}),
    "ControlNet, batch": (control(), {"batch_size": 2, "prompt": "a cat AND a dog :0.7"}),
    "ControlNet, for the prompt": (control(control_mode="My prompt is more important"), {}),
    "ControlNet, for itself": (control(control_mode="ControlNet is more important"), {}),
    "ControlNet, reference": (reference(), {}),
    "FreeU": (other_freeu("2"), {}),
    "Dynamic Thresholding": (threshold(), {"cfg_scale": 12}),
    "Dynamic Thresholding, hires": (threshold(), {"cfg_scale": 12, "enable_hr": True, "hr_scale": 1.5,
                                                  "hr_upscaler": "Latent", "denoising_strength": 0.7}),
    "ADetailer": (detail(), {}),
    "ADetailer, with all scripts": (detail(), {"override_settings": EVERYWHERE}),
    "all": ({**control(), **detail(), **threshold(), **other_freeu("1")}, {}),
}  # fmt: skip


class Crowd(Client):
    """``absent``: what the same WebUI drew without our extension, by case.

    ``left``: what another extension leaves on the model instance by itself.
    """

    def __init__(self, url: str, titles: set[str], absent: dict[str, Pictures]) -> None:
        super().__init__(url)
        self.titles, self.absent = titles, absent
        self.left: set[str] = set()

    def need(self, others: dict[str, list]) -> None:
        for title in others:
            if title.lower() not in self.titles:
                pytest.skip(f"{title} is not in {FOLDER}, or can't run in the WebUI's Python")

    def case(self, name: str, fusion: dict | None = None, **changes: object) -> Pictures:
        others, own = CASES[name]
        self.need(others)
        return self.draw(fusion, others=others, **own, **changes)


def prepare(data: Path, found: dict[str, Path], python: Path) -> None:
    folder, own_python = find_host()
    prepare_data(data, {"samples_save": False, "grid_save": False})
    make_checkpoints(data, own_python, folder, "extensions")
    for name, path in found.items():
        (data / "extensions" / name).symlink_to(path, target_is_directory=True)
    probe = data / "extensions/fusion-probe/scripts"
    probe.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("probe.py"), probe)
    if "adetailer" in found:
        models = data / "models/adetailer"
        models.mkdir()
        command = [str(python), "-c", YOLO.format(path=str(models / "tiny_yolo.pt"))]
        subprocess.run(command, capture_output=True, check=False)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    python = find_python()
    found = find_extensions()
    if not found:
        pytest.skip(f"none of {', '.join(EXTENSIONS)} is in {FOLDER}; FUSION_TEST_EXTENSIONS names another folder")
    data = tmp_path_factory.mktemp("crowd")
    prepare(data, found, python)
    flags = ("--ad-no-huggingface",) if "adetailer" in found else ()
    ours = data / "extensions" / EXTENSION
    checkout = ours.readlink()
    ours.unlink()
    absent = {}
    running = Host(data, BASE, extra=flags, python=python)
    try:
        titles = set(Client(running.url).ask("/sdapi/v1/scripts")["txt2img"])
        plain = Crowd(running.url, titles, {})
        for name, (others, _) in CASES.items():
            if all(title.lower() in titles for title in others):
                absent[name] = plain.case(name)
    finally:
        running.stop()
    ours.symlink_to(checkout, target_is_directory=True)
    running = Host(data, BASE, extra=flags, python=python)
    yield Crowd(running.url, titles, absent)
    running.stop()
    shutil.rmtree(data / "models", ignore_errors=True)


@pytest.fixture(autouse=True)
def _nothing_of_ours_stays(crowd: Crowd) -> Iterator[None]:
    yield
    state = crowd.state()
    assert state["hooks"] == 0
    assert "apply_model" not in set(state["replaced"]) - crowd.left
    assert not crowd.fusion()["running"]


def distance(one: Pictures, other: Pictures) -> float:
    return float(np.abs(one.pixels[0].astype(int) - other.pixels[0]).mean())


@pytest.mark.parametrize("case", CASES)
def test_off_is_as_absent_and_a_copy_changes_nothing(crowd: Crowd, case: str) -> None:
    """Also after it was on; and fused with its own weights the base draws what it draws under the other extensions."""
    off = crowd.case(case)
    assert off.same_as(crowd.absent[case])
    # ControlNet does not act on experts
    neutral = expert(OTHER, snb_window=[0, 0]) if "ControlNet" in CASES[case][0] else expert(COPY)
    assert crowd.case(case, neutral).same_as(off)
    fused = crowd.case(case, expert(OTHER))
    assert not fused.same_as(off)
    assert "base 4" in fused.infotexts[0] or "base 8" in fused.infotexts[0]
    assert crowd.case(case).same_as(off)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("ControlNet")])
def test_controlnet_does_not_act_on_other_checkpoints(crowd: Crowd, case: str) -> None:
    changes = CASES[case][1]
    controlled = crowd.case(case)
    plain = crowd.draw(**changes)
    assert distance(controlled, plain) > 2
    assert crowd.case(case, expert(COPY, **ALONE)).same_as(plain)
    fused = crowd.case(case, expert(OTHER))
    assert not fused.same_as(crowd.draw(expert(OTHER), **changes))


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("ControlNet") and "reference" not in name])
def test_controlnet_acts_on_experts_that_are_the_base_with_loras(crowd: Crowd, case: str) -> None:
    """One that draws all is what ControlNet makes of the base with that LoRA; with the base's own, of the base."""
    changes = CASES[case][1]
    lora = f"{changes.get('prompt', 'a cat')} <lora:tiny_lora:1>"
    others = CASES[case][0]
    crowd.need(others)
    rest = {key: value for key, value in changes.items() if key != "prompt"}
    wanted = crowd.draw(others=others, **rest, prompt=lora)
    assert distance(wanted, crowd.draw(**rest, prompt=lora)) > 2
    alone = expert("same as base", prompt=lora, **ALONE)
    assert crowd.draw(alone, others=others, **rest, prompt=changes.get("prompt", "a cat")).same_as(wanted)
    assert crowd.draw(expert("same as base", **ALONE), others=others, **changes).same_as(crowd.case(case))


def test_controlnet_with_everything_else(crowd: Crowd) -> None:
    controlled = crowd.case("ControlNet")
    assert crowd.case("ControlNet", UNIFORM).same_as(controlled)  # AFA's models share what it adds
    assert crowd.case("ControlNet", NEUTRAL).same_as(controlled)
    assert distance(crowd.case("ControlNet", {"freeu": "Auto"}), controlled) > 1
    steps = {"steps": 12}
    skipped = crowd.case("ControlNet", {"skipping": "Forecast"}, **steps)
    unskipped = crowd.case("ControlNet", **steps)
    assert distance(skipped, unskipped) < 1
    assert crowd.case("ControlNet", {"skipping": "Forecast", "skip_warmup": 1000}, **steps).same_as(unskipped)
    computed, _, rows = skipped.params["Fusion U-Net rows"].removeprefix("base ").partition(" of ")
    assert int(computed) < int(rows)


def test_controlnets_reference_acts_on_the_bases_blocks(crowd: Crowd) -> None:
    """In AFA's lockstep, too, where the expert's blocks go without."""
    case = "ControlNet, reference"
    assert crowd.case(case, NEUTRAL).same_as(crowd.case(case))
    plain, mixed = crowd.draw(), crowd.case(case, UNIFORM)
    assert 0 < distance(mixed, plain) < distance(crowd.case(case), plain)


def test_controlnet_refuses_crops(crowd: Crowd) -> None:
    cropped = expert(OTHER, place="columns 1:1 2", place_crop=True)
    with pytest.raises(RefusedError, match="place_crop: True is not allowed; allowed without ControlNet"):
        crowd.case("ControlNet", cropped)


def test_skipping_after_controlnet_is_as_before(crowd: Crowd) -> None:
    crowd.need(control())
    crowd.draw(model=OTHER)
    changes = {"steps": 12, "batch_size": 2, "prompt": "a [cat:dog:0.3]"}
    crowd.draw(model=BASE)
    before = crowd.draw({"skipping": "Forecast"}, **changes)
    crowd.case("ControlNet")
    assert crowd.draw({"skipping": "Forecast"}, **changes).same_as(before)


def test_the_other_freeu(crowd: Crowd) -> None:
    crowd.need(other_freeu("2"))
    few = {"steps": 2, "width": 64, "height": 64}
    with crowd.settings({"sd_model_checkpoint": f"{WIDE}.safetensors"}):
        off = crowd.draw(**few)
        before = crowd.state()
        for version in ("1", "2"):
            theirs = crowd.draw(others=other_freeu(version), **few)
            ours = crowd.draw(our_freeu(version), **few)
            assert distance(ours, theirs) < 0.1 * distance(ours, off)  # theirs takes one channel more
        both = crowd.draw(our_freeu("2"), others=other_freeu("2"), n_iter=2, **few)
        told = [comment for comment in crowd.ask("/probe/comments") if "FreeU" in comment]
        assert told == ["Denoiser Fusion: another FreeU was on as well; both have acted, one after the other."]
        assert distance(both, off) > distance(ours, off)
        assert crowd.state() == before
        assert crowd.draw(others=other_freeu("2"), **few).same_as(theirs)
        assert crowd.ask("/probe/comments") == []
        assert crowd.draw(**few).same_as(off)


def test_infotext_of_the_other_freeu(crowd: Crowd, client: Client) -> None:
    """What that extension itself has written, pasted in a WebUI that has ours alone."""
    crowd.need(other_freeu("1"))
    text = crowd.draw(others=other_freeu("1")).infotexts[0]
    assert "FreeU Stages" in text
    with client.settings({"sd_model_checkpoint": f"{BASE}.safetensors"}):
        answer = client.ask("/sdapi/v1/txt2img", {"infotext": text, "width": 128, "height": 128})
        ours = client.draw(our_freeu("1"))
    assert np.array_equal(decode(answer["images"][0]), ours.pixels[0])


def test_dynamic_thresholding(crowd: Crowd) -> None:
    case = "Dynamic Thresholding"
    theirs = crowd.case(case, sampler_name="DPM++ 2M")
    assert not theirs.same_as(crowd.draw(cfg_scale=12, sampler_name="DPM++ 2M"))
    assert crowd.case(case, expert(COPY), sampler_name="DPM++ 2M").same_as(theirs)
    skipped = crowd.case(case, {"skipping": "Forecast"}, steps=14)
    assert distance(skipped, crowd.case(case, steps=14)) < 1


def test_adetailer(crowd: Crowd) -> None:
    """Its inpainting goes without our extension, unless it is told to use all."""
    fused = crowd.case("ADetailer", expert(OTHER))
    assert not fused.same_as(crowd.draw(expert(OTHER)))
    inside = crowd.case("ADetailer, with all scripts", expert(OTHER))
    assert not inside.same_as(crowd.case("ADetailer", expert(OTHER), override_settings={}))
    compared = crowd.draw(expert(OTHER, compare=True), others=detail())
    assert compared.first is not None
    assert compared.same_as(fused)
    many = crowd.case("ADetailer", expert(OTHER), n_iter=2, steps=2)
    assert len(many.infotexts) == 2
    assert all("Fusion U-Net calls" in text for text in many.infotexts)


TILES = {"width": 256, "height": 192, "steps": 12}
WAYS = [expert(OTHER), expert(OTHER, method="Average"), UNIFORM, {"skipping": "Forecast"}, {"skipping": "Paper"}]


def tiled(crowd: Crowd, method: str) -> dict[str, list]:
    """Tiled Diffusion, with tiles of 16 x 16 latent pixels, four in a call."""
    title = EXTENSIONS["multidiffusion-upscaler-for-automatic1111"]
    crowd.need({title: []})
    scripts = crowd.ask("/sdapi/v1/script-info")
    ours = next(s for s in scripts if s["name"] == title.lower() and not s["is_img2img"])
    values = {"method": method, "latent tile width": 16, "latent tile height": 16, "latent tile overlap": 8,
              "latent tile batch size": 4}  # fmt: skip
    args = [values.get(str(arg["label"]).lower(), arg["value"]) for arg in ours["args"]]
    return {title: [True, *args[1:]]}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.get("method", way.get("skipping", "SNB")))
def test_multidiffusions_tiles_are_refused(crowd: Crowd, way: dict) -> None:
    """They are cut outside the model's call, so the rows of a step are unknown."""
    others = tiled(crowd, "MultiDiffusion")
    off = crowd.draw(others=others, **TILES)
    with pytest.raises(RefusedError, match=r"Denoiser Fusion .*rows") as refused:
        crowd.draw(way, others=others, **TILES)
    assert refused.value.status == 422
    assert crowd.draw(others=others, **TILES).same_as(off)
    assert crowd.draw({"freeu": "Custom"}, others=others, **TILES).same_as(off)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.get("method", way.get("skipping", "SNB")))
def test_mixture_of_diffusers(crowd: Crowd, way: dict) -> None:
    """It cuts its tiles inside the model's call, once for each model; AFA's lockstep would mix up their prompts."""
    others = tiled(crowd, "Mixture of Diffusers")
    off = crowd.draw(others=others, **TILES)
    crowd.left |= set(crowd.state()["replaced"])
    if way == UNIFORM:
        with pytest.raises(RefusedError, match=r"AFA could not act: .* such as tiles"):
            crowd.draw(way, others=others, **TILES)
    elif "skipping" in way:
        skipped = crowd.draw(way, others=others, **TILES)
        assert distance(skipped, off) < 3
    else:
        same = {**way, "experts": [{"checkpoint": COPY}]}
        assert crowd.draw(same, others=others, **TILES).same_as(off)
        assert not crowd.draw(way, others=others, **TILES).same_as(off)
    assert crowd.draw(others=others, **TILES).same_as(off)


def test_interrupts_and_errors_under_all(crowd: Crowd) -> None:
    off = crowd.draw()
    crowd.ask("/probe/arm", what="interrupt", step=2)
    crowd.case("all", expert(OTHER, freeu="Auto"))
    assert crowd.draw().same_as(off)
    crowd.ask("/probe/arm", what="fail", step=2)
    with pytest.raises(RefusedError, match="the probe made the U-Net fail"):
        crowd.case("all", expert(OTHER, freeu="Auto"))
    assert TITLE.lower() in crowd.ask("/sdapi/v1/scripts")["txt2img"]
    crowd.case("nothing")  # ControlNet takes itself off at the next generation
    assert crowd.draw().same_as(off)
