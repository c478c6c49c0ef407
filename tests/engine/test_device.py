"""The engine and the training on a CUDA device: the CPU's pictures, and no dtype that should not be there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lib_fusion.engine.generate import Engine
from lib_fusion.requests.settings import ExpertSettings, FusionSettings, GenerationSettings
from tests.helpers import PLAIN
from tests.webui_live.host import REPOSITORY, environment

DEMO = REPOSITORY / "demo"
ANIMALS, VEHICLES, GENERAL = (DEMO / f"{name}.safetensors" for name in ("animals", "vehicles", "general"))
PICTURE = GenerationSettings(("a fox left of a tractor, flat drawing",), width=128, height=64, steps=6, cfg_scale=5)
EXPERT = (ExpertSettings("vehicles"),)
AFA = {"method": "AFA", "afa_aggregator": str(DEMO / "afa-animals-vehicles.safetensors")}
#: name -> (settings of the fusion, changes of the picture).
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}),
    "SNB, the defaults": ({"experts": EXPERT}, {}),
    "SNB, held, DDIM": ({"experts": EXPERT, **PLAIN, "snb_hold": 900}, {"sampler": "DDIM"}),
    "a place": ({"experts": (ExpertSettings("vehicles", place="columns 1:1 2"),)}, {"sampler": "Euler"}),
    "AFA": ({"experts": EXPERT, **AFA}, {}),
    "FreeU": ({"freeu": "Custom", "freeu_b3": 1.3, "freeu_s3": 0.5}, {}),
    "Forecast": ({"skipping": "Forecast", "skip_tolerance": 0.5}, {"steps": 12, "count": 2, "batch_size": 2}),
    "Paper": ({"skipping": "Paper"}, {"steps": 12, "sampler": "DDIM"}),
}


@pytest.fixture(scope="module")
def on_cpu() -> Engine:
    return Engine(ANIMALS, [VEHICLES])


def draw(engine: Engine, name: str) -> tuple[list[np.ndarray], dict]:
    settings, changes = WAYS[name]
    done = engine.generate(replace(PICTURE, **changes), FusionSettings(**settings))
    return [np.asarray(picture.image).astype(int) for picture in done.pictures], done.record


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", WAYS)
def test_a_picture_is_the_cpus(cuda: ModuleType, on_cpu: Engine, name: str, dtype: torch.dtype) -> None:
    """In float32 within one level, in half precision within two on average; as many calls and rows; no float64."""
    engine = Engine(ANIMALS, [VEHICLES] if "experts" in WAYS[name][0] else [], dtype=dtype, device="cuda")
    reference = on_cpu if "experts" in WAYS[name][0] else Engine(ANIMALS)
    with cuda.recording(("lib_fusion/",)) as found:
        pictures, record = draw(engine, name)
    wanted, expected = draw(reference, name)
    assert (record["unet_calls"], record["unet_rows"]) == (expected["unet_calls"], expected["unet_rows"])
    gaps = np.abs(np.stack(pictures) - np.stack(wanted))
    assert gaps.max() <= 1 if dtype == torch.float32 else gaps.mean() <= 2
    assert found.of("wide") == []


def test_loras_are_merged_on_the_device(cuda: ModuleType) -> None:
    model = f"{GENERAL}+{DEMO / 'loras/demo-vehicles.safetensors'}:0.8"
    pictures = [np.asarray(Engine(model, device=device).generate(PICTURE).pictures[0].image).astype(int)
                for device in ("cuda", "cpu")]  # fmt: skip
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_training_on_the_device(cuda: ModuleType, tmp_path: Path, precision: str) -> None:
    """cache, train and evaluate in processes of their own, since the device must be there before autograd starts."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("dog", "bus"):
        shutil.copy(DEMO / "images" / f"{name}-flat.webp", pictures)
        (pictures / f"{name}-flat.txt").write_text(f"a {name}, flat drawing", "utf-8")
    common = ["--model", str(ANIMALS), "--model", str(VEHICLES), "--device", "cuda"]
    cache, out = str(tmp_path / "cache"), tmp_path / "pair.safetensors"
    small = ["--steps", "3", "--hidden", "8", "--layers", "1", "--heads", "2", "--batch-size", "2"]
    for command in (
        ["cache", "--source", str(pictures), "--cache", cache, "--resolution", "64", *common],
        ["train", "--cache", cache, "--out", str(out), *small, "--precision", precision, *common],
        ["evaluate", "--cache", cache, "--aggregator", str(out), "--out", str(tmp_path / "report"), *common],
    ):
        done = subprocess.run([sys.executable, "-m", "tests.fake_cuda", "-m", "lib_fusion", *command], cwd=REPOSITORY,
                              env=environment(), capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report/evaluation.json").read_text("utf-8"))
    assert report
