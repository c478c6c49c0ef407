"""The training tab's process on a device, in the WebUI's own Python."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from lib_fusion.training.jobs import JOB, STATE, Job
from tests import fake_cuda
from tests.webui_live.host import REPOSITORY, copy_demo, environment
from tests.webui_live.needs import the_host

NAMES = ("animals", "vehicles")
OBJECTS = ("dog", "fox", "bus", "car")
REPOSITORIES = ("stable-diffusion-stability-ai", "generative-models")


def run_on_device(*words: object) -> subprocess.CompletedProcess:
    """Runs a program of the WebUI's Python on the stand-in."""
    _, python = the_host()
    if sentence := fake_cuda.obstacle():
        pytest.skip(sentence)
    command = [str(python), str(REPOSITORY / "tests/fake_cuda/__main__.py"), *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_encoders_compute_what_they_compute_on_the_cpu(tmp_path: Path, kind: str) -> None:
    """Text encoders and VAE go to the device, all of them; against the host's whole models on the CPU."""
    folder, _ = the_host()
    done = run_on_device(REPOSITORY / "tests/webui_live/encode_kinds.py", tmp_path, folder, kind, "cuda")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    allowed = 1e-5 if kind != "sdxl" else 5e-3  # whose class of OpenCLIP computes under CUDA's autocast
    assert max([*found["states"], *found["vectors"]]) < allowed
    assert found["latent"] < 1e-5


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_a_training_comes_to_its_end(tmp_path: Path, precision: str) -> None:
    """Pictures are encoded, aggregators trained and evaluated, and the losses are numbers."""
    webui, _ = the_host()
    pictures, checkpoints = tmp_path / "pictures", tmp_path / "checkpoints"
    for folder in (pictures, checkpoints):
        folder.mkdir()
    for name in OBJECTS:
        shutil.copy(REPOSITORY / "demo/images" / f"{name}-flat.webp", pictures)
        (pictures / f"{name}-flat.txt").write_text(f"a {name}, flat drawing", "utf-8")
    if not all(copy_demo(name, checkpoints) for name in NAMES):
        pytest.skip("the demo's checkpoints are not there")
    files = [str(checkpoints / f"{name}.safetensors") for name in NAMES]
    common = [*(word for file in files for word in ("--model", file)), "--device", "cuda"]
    cache, out = str(tmp_path / "cache"), str(tmp_path / "pair.safetensors")
    small = ["--steps", "4", "--hidden", "8", "--layers", "1", "--heads", "2", "--batch-size", "2"]
    commands = [
        ["cache", "--source", str(pictures), "--cache", cache, "--resolution", "64", *common],
        ["train", "--cache", cache, "--out", out, *small, "--precision", precision, *common],
        ["evaluate", "--cache", cache, "--aggregator", out, "--out", str(tmp_path / "evaluation"), *common],
    ]
    job = Job(
        name="pair", values={}, commands=commands, configs=[str(Path(file).with_suffix(".yaml")) for file in files],
        paths=[str(webui / "repositories" / name) for name in REPOSITORIES],
        target=str(tmp_path / "target.safetensors"),
    )  # fmt: skip
    (tmp_path / JOB).write_text(json.dumps({"job": asdict(job)}), "utf-8")
    done = run_on_device("-m", "lib_fusion.webui.training.process", tmp_path)
    assert json.loads((tmp_path / STATE).read_text("utf-8")).get("phase") == "finished", done.stdout + done.stderr
    with (tmp_path / "pair.run/log.csv").open() as file:
        losses = [float(line["loss"]) for line in csv.DictReader(file)]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    assert (tmp_path / "target.safetensors").is_file()
