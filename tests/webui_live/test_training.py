"""The tab "Fusion training" in the real host: from a handful of pictures to a file that the panel uses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.webui_live.client import Client, RefusedError, expert
from tests.webui_live.conftest import Names
from tests.webui_live.host import REPOSITORY, Host, environment
from tests.webui_live.needs import the_host
from tests.webui_live.pages import SECONDS, choose
from tests.webui_live.test_lifecycle import reload_ui

TAB = "#denoiser_fusion_training_"
SMALL = {"hidden": 8, "layers": 1, "heads": 2, "save_every": 5, "batch_size": 4}
PICTURES = ("dog", "fox", "cow", "bus", "car", "tram")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "pictures"
    folder.mkdir()
    for name in PICTURES:
        shutil.copy(REPOSITORY / "demo/images" / f"{name}-flat.webp", folder)
        (folder / f"{name}-flat.txt").write_text(f"a {name}, flat drawing", "utf-8")
    return folder


@pytest.fixture
def trainings(host: Host) -> Iterator[Path]:
    """The folder of the host's trainings; none is left running, and no file is left."""
    from lib_fusion.training.jobs import Jobs

    folder = host.data / "models/denoiser-fusion/training"
    yield folder
    store = Jobs(folder)
    if running := store.running():
        store.stop(running)
    shutil.rmtree(folder, ignore_errors=True)
    (folder.parent / "taught.safetensors").unlink(missing_ok=True)


def open_tab(page: Any) -> None:
    page.locator("#tabs > .tab-nav button", has_text="Fusion training").click()
    page.locator(f"{TAB}state [data-phase]").first.wait_for()


def fill(page: Any, **values: object) -> None:
    for key, value in values.items():
        page.locator(f"{TAB}{key} input, {TAB}{key} textarea").first.fill(str(value))
    page.locator(f"{TAB}source textarea").click()


def name_it(page: Any, name: str) -> None:
    box = page.locator(f"{TAB}name input").first
    box.fill(name)
    box.press("Enter")


def wait_for_state(page: Any, part: str) -> str:
    """Until the line about the training matches; returns it."""
    page.wait_for_function(
        "([element, part]) => new RegExp(part).test(document.querySelector(element).innerText)",
        arg=[f"{TAB}state", part], timeout=480 * SECONDS,
    )  # fmt: skip
    return page.locator(f"{TAB}state").first.inner_text()


def step_of(line: str) -> int:
    return int(line.partition("step ")[2].split()[0].rstrip("."))


def test_from_pictures_to_a_file_that_the_panel_uses(
    page: Any, client: Client, host: Host, names: Names, pictures: Path, trainings: Path
) -> None:
    """Started, the page loaded and the UI built anew while it runs, stopped, gone on with, evaluated, used."""
    client.draw(model=names.expert)
    open_tab(page)
    name_it(page, "taught")
    fill(page, source=pictures)
    page.locator(f"{TAB}start").click()
    page.get_by_text("Models, the base first: [] is not allowed; allowed: 2 to 4 models").wait_for()
    for name in (names.expert, names.other):
        choose(page, f"{TAB}models", f"{name}.safetensors")
    page.locator(f"{TAB}source textarea").click()  # closes the list
    page.locator(f"{TAB}more .label-wrap").click()
    fill(page, resolution=64, steps=2000, learning_rate=0.003, **SMALL)
    page.locator(f"{TAB}start").click()
    wait_for_state(page, r"step \d+ of 2000, loss 0\.\d+, \S+ left")

    reload_ui(client, host)
    page.reload()
    open_tab(page)
    line = wait_for_state(page, r"taught: step [1-9]\d+ of 2000")
    assert page.locator(f"{TAB}hidden input").input_value() == "8"
    assert page.locator(f"{TAB}source textarea").input_value() == str(pictures)
    page.locator(f"{TAB}losses svg .mean").first.wait_for()
    page.locator(f"{TAB}stop").click()
    line = wait_for_state(page, r"taught: stopped while training, at step \d+ of 2000. Start goes on from step \d+")
    saved = step_of(line.partition("goes on from ")[2])
    assert saved >= 5
    assert not (trainings.parent / "taught.safetensors").exists()

    held_out = pictures.parent / "held-out"
    held_out.mkdir()
    for suffix in (".webp", ".txt"):
        shutil.copy(pictures / f"fox-flat{suffix}", held_out)
    fill(page, steps=saved + 7, held_out=held_out)
    page.locator(f"{TAB}start").click()
    wait_for_state(page, f"taught: finished after {saved + 7} steps")
    page.get_by_text("Measured on held-out pictures.").first.wait_for()
    assert page.locator(f"{TAB}verdict img").first.is_visible()
    page.locator(f"{TAB}evaluation .label-wrap").click()
    page.get_by_text("average of predictions").first.wait_for()
    page.locator(f"{TAB}evaluation .label-wrap").click()

    same_as_the_engines(trainings / "taught/cache", pictures, names)
    on = client.draw({"method": "AFA", "afa_aggregator": "taught"}, model=names.expert)
    assert on.params["Fusion expert 1 checkpoint"] == f"{names.other}.safetensors"
    assert not on.same_as(client.draw(model=names.expert))
    with pytest.raises(RefusedError, match=r"no such aggregator; allowed: taught$"):
        client.draw({"method": "AFA", "afa_aggregator": "taught/cache/shard-00000"}, model=names.expert)


def same_as_the_engines(cache: Path, pictures: Path, names: Names) -> None:
    """What the host's classes have encoded is what the engine's encode, up to the float16 that a cache holds."""
    if not (REPOSITORY / "demo" / f"{names.expert}.safetensors").is_file():
        return
    import torch

    from lib_fusion.engine.training_encoders import EngineEncoders
    from lib_fusion.training.cache import Cache, write_cache

    encoders = EngineEncoders([REPOSITORY / "demo" / f"{name}.safetensors" for name in (names.expert, names.other)])
    write_cache(pictures, cache.parent / "engine", encoders, 64)
    found, expected = Cache(cache), Cache(cache.parent / "engine")
    assert found.index == expected.index
    assert len(found.entries) == len(PICTURES)
    for a, b in zip(found.entries, expected.entries):
        assert (a.name, a.caption) == (b.name, b.caption)
        torch.testing.assert_close(found.read(a)[0], expected.read(b)[0], rtol=1e-3, atol=1e-4)
        for x, y in zip(found.read(a)[1], expected.read(b)[1]):
            torch.testing.assert_close(x.states, y.states, rtol=1e-3, atol=1e-4)
    for x, y in zip(found.empty, expected.empty):
        torch.testing.assert_close(x.states, y.states, rtol=1e-3, atol=1e-4)


def wait_for_end(trainings: Path, steps: int) -> None:
    """Until the training has finished after so many steps."""
    from lib_fusion.training.jobs import Jobs

    store, deadline = Jobs(trainings), time.monotonic() + 480
    while store.status("taught").phase == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    status = store.status("taught")
    assert (status.phase, status.step) == ("finished", steps), store.log("taught")
    assert all(0 < loss < 10 for _, loss, *_ in status.rows)


def test_checkpoints_with_loras(client: Client, host: Host, pictures: Path, trainings: Path) -> None:
    """One checkpoint as two models; their texts are those of the host under the LoRA; the panel uses the file."""
    import torch

    from lib_fusion.training.cache import Cache

    two = ["tiny_a.safetensors", "tiny_a.safetensors <lora:tiny_lora:0.8>"]
    asked = form(pictures, name="taught", models=two, resolution=64, steps=4)
    assert client.ask("/probe/train", values=json.dumps(asked))["refused"] == ""
    wait_for_end(trainings, 4)
    cache = Cache(trainings / "taught/cache")
    entry = cache.entries[0]
    client.draw(model="tiny_a")
    found = []
    for lora, text in zip(("", "tiny_lora"), cache.read(entry)[1], strict=True):
        theirs = client.ask("/probe/condition", text=entry.caption, width=64, height=64, lora=lora, weight=0.8)
        found.append(torch.tensor(theirs["states"]))
        torch.testing.assert_close(text.states, found[-1], rtol=1e-3, atol=2e-3)
    assert (found[0] - found[1]).abs().max() > 0.1

    on = client.draw({"method": "AFA", "afa_aggregator": "taught"}, model="tiny_a")
    assert on.params["Fusion expert 1 checkpoint"] == "tiny_a.safetensors"
    assert on.params["Fusion expert 1 prompt"] == "<lora:tiny_lora:0.8>"
    assert not on.same_as(client.draw(model="tiny_a"))
    other = {"prompt": "<lora:tiny_lora:0.7>", "method": "AFA", "afa_aggregator": "taught"}
    with pytest.raises(RefusedError, match=r"tiny_lora:0.7 in the place of"):
        client.draw(expert("tiny_a", **other), model="tiny_a")


def test_a_lora_is_added_to_the_last_model(page: Any, client: Client, trainings: Path) -> None:
    """In the form: with its weight, and the same checkpoint can be chosen again; errors name the remedy."""
    open_tab(page)
    page.locator(f"{TAB}lora_add").click()
    page.get_by_text("allowed: a checkpoint first, which the LoRA is added to").wait_for()
    choose(page, f"{TAB}models", "tiny_a.safetensors")
    page.locator(f"{TAB}source textarea").click()  # closes the list
    choose(page, f"{TAB}lora", "tiny_lora")
    fill(page, lora_weight=0.5)
    page.locator(f"{TAB}lora_add").click()
    page.locator(f"{TAB}models .token", has_text="tiny_a.safetensors <lora:tiny_lora:0.5>").wait_for()
    choose(page, f"{TAB}models", "tiny_a.safetensors")
    page.locator(f"{TAB}source textarea").click()
    page.wait_for_timeout(SECONDS)
    shown = page.locator(f"{TAB}models .token").all_inner_texts()
    assert [text.strip() for text in shown] == ["tiny_a.safetensors <lora:tiny_lora:0.5>", "tiny_a.safetensors"]


def test_sdxl(client: Client, host: Host, pictures: Path, trainings: Path) -> None:
    """From pictures to a file that the panel uses; the cache has what the host tells its own models."""
    import torch

    from lib_fusion.training.cache import Cache
    from lib_fusion.unet.vector import sdxl_vector

    two = models("tiny_xl", "tiny_xl_b")["models"]
    asked = form(pictures, name="taught", models=two, resolution=64, steps=6, precision="bfloat16", checkpointing=True)
    assert client.ask("/probe/train", values=json.dumps(asked))["refused"] == ""
    wait_for_end(trainings, 6)
    cache = Cache(trainings / "taught/cache")
    told = [*((entry.caption, cache.read(entry)[1], False) for entry in cache.entries[:2]), ("", cache.empty, True)]
    for m, name in enumerate(two):
        with client.settings({"sd_model_checkpoint": name}):
            for caption, texts, negative in told:
                theirs = client.ask("/probe/condition", text=caption, width=64, height=64, negative=negative)
                vector = sdxl_vector(texts[m].pooled[None], 64, 64)[0]
                torch.testing.assert_close(texts[m].states, torch.tensor(theirs["states"]), rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(vector, torch.tensor(theirs["vector"]), rtol=1e-3, atol=1e-3)
    assert not any(text.states.any() or text.pooled.any() for text in cache.empty)

    on = client.draw({"method": "AFA", "afa_aggregator": "taught"}, model="tiny_xl")
    assert on.params["Fusion expert 1 checkpoint"] == "tiny_xl_b.safetensors"
    assert not on.same_as(client.draw(model="tiny_xl"))


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_encoded_as_the_host_does(tmp_path: Path, kind: str) -> None:
    """The host's classes with OpenCLIP, built without weights and loaded part by part, against its whole models."""
    folder, python = the_host()
    command = [str(python), str(Path(__file__).with_name("encode_kinds.py")), str(tmp_path), str(folder), kind]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["models"] == ["two_a", "two_b"]
    assert len(found["vectors"]) == (2 if kind == "sdxl" else 0)
    assert max(found["latent"], *found["states"], *found["vectors"]) < 1e-5


def form(pictures: Path, **changes: object) -> dict[str, Any]:
    from lib_fusion.training.options import CACHE_PARAMETERS, TRAINING_PARAMETERS

    rows = {row.key: row.default for row in (*CACHE_PARAMETERS, *TRAINING_PARAMETERS)}
    models = ["tiny_a.safetensors", "tiny_b.safetensors"]
    return {"name": "refused", "source": str(pictures), "held_out": "", "models": models, **rows, **SMALL, **changes}


def models(*names: str) -> dict[str, list[str]]:
    return {"models": [f"{name}.safetensors" for name in names]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "../x"}, "name: '../x' is not allowed; allowed: up to 60 letters"),
        ({"source": ""}, "source: '' is not allowed; allowed: a folder of captioned pictures"),
        ({"source": "/nowhere"}, "source: .*no folder of pictures and no .tar"),
        ({"source": str(REPOSITORY / "docs")}, "source: .*neither metadata.jsonl nor a .txt"),
        ({"held_out": str(REPOSITORY / "docs")}, "held_out: .*neither metadata.jsonl nor a .txt"),
        (models("tiny_a"), "models: .*allowed: 2 to 4 models, the base first"),
        (models("tiny_a", "nobody"), "models: 'nobody.safetensors' is not allowed; no such checkpoint"),
        (models("tiny_a", "tiny_a"), "models: .*there twice"),
        (models("tiny_xl", "tiny_a"), "models: 'tiny_a.safetensors' .*its U-Net is of another kind or size"),
        (models("tiny_xl", "tiny_xl_v"), "they predict different things"),
        (models("tiny_inpaint", "tiny_inpaint_copy"), "it is for inpainting or editing"),
        (models("tiny_a", "tiny_inpaint"), "its U-Net is of another kind or size"),
        (models("tiny_a", "tiny_v"), "they predict different things"),
        ({"models": ["tiny_a", "tiny_a <lora:tiny_lor:1>"]}, "models: .*no such LoRA; near it: tiny_lora"),
        ({"models": ["tiny_a", "tiny_a <lora:lora_loha:1>"]}, "models: .*this is LoHa .*allowed: LoRA and LoCon"),
        ({"models": ["tiny_a", "tiny_a <lora:xl_lora:1>"]}, "models: .*changes a weight .*, tiny_a.safetensors has"),
        ({"models": ["tiny_xl", "tiny_xl <lora:lora_xl:1>"]}, "text encoder of SDXL; allowed .*one of the U-Net alone"),
        (models("tiny_a", "tiny_unet"), r"no text encoder \(cond_stage_model.\*\)"),
        ({"steps": 0}, "steps: 0 is not allowed; allowed: a whole number at least 1"),
        ({"learning_rate": None}, "learning_rate: None is not allowed; allowed: a number"),
        ({"resolution": 100}, "resolution: 100 is not allowed; allowed: a whole number divisible by 8"),
        ({"heads": 3}, r"heads: 3 is not allowed; allowed: a number that divides hidden \(8\)"),
        ({"accumulate": 3}, "batch_size: 4 is not allowed"),
        ({"precision": "float16"}, "precision: 'float16' is not allowed; allowed on cpu with torch"),
    ],
)  # fmt: skip
def test_refused_before_anything_starts(
    client: Client, pictures: Path, trainings: Path, changes: dict, says: str
) -> None:
    told = client.ask("/probe/train", values=json.dumps(form(pictures, **changes)))["refused"]
    assert "\n" not in told
    assert re.search(says, told), told
    assert not trainings.exists()
