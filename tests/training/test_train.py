"""Training: it learns, resumes exactly even after a kill, and is the same over processes."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_fusion.cli import main
from lib_fusion.errors import FusionError, SettingError
from lib_fusion.fusion.aggregator_files import identify_model, load_aggregators
from lib_fusion.fusion.lockstep import sizes_for
from lib_fusion.training.cache import Cache
from lib_fusion.training.ensemble import Ensemble, add_noise, alphas_cumprod, load_models
from lib_fusion.training.evaluate import MEAN_FEATURES, TRAINED, evaluate
from lib_fusion.training.options import CACHE_PARAMETERS, TRAINING_PARAMETERS, TrainingSettings
from lib_fusion.training.train import Batches, _weights, train
from tests.training.conftest import DEMO, MODELS, QUICK

ROOT = DEMO.parent


def losses(out: Path) -> list[float]:
    with (out.with_suffix(".run") / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    out = tmp_path_factory.mktemp("run") / "finished.safetensors"
    train(data.cache, MODELS, out, QUICK)
    return out


def test_writes_a_file_with_its_card(finished, data):
    card, aggregators = load_aggregators(finished)
    assert card.models == tuple(identify_model(path) for path in MODELS)
    assert card.training["pictures"] == 9
    assert card.training["steps"] == 6
    assert card.training["loss"] == pytest.approx(sum(losses(finished)) / 6, abs=1e-6)
    assert any(a.conv_out.weight.abs().max() > 0 for a in aggregators)


def test_the_first_loss_is_the_uniform_averages(finished, data):
    """The loss as written out: MSE between the plain mean's prediction and the noise."""
    from lib_fusion.methods.afa import uniform

    cache = Cache(data.cache)
    unets = load_models(MODELS, cache, torch.float32, torch.device("cpu"))
    latents, texts, noise, t = Batches(cache, QUICK).draw(0, slice(0, 4))
    noisy, target = add_noise(latents, noise, alphas_cumprod()[t], "epsilon")
    with torch.no_grad():
        output = Ensemble(unets, uniform(2))(noisy, t, texts)
    assert losses(finished)[0] == pytest.approx((output - noise).square().mean().item(), rel=1e-4)
    assert torch.equal(target, noise)


def test_learns(tmp_path, data):
    """It gets better than the plain mean on what it was trained on."""
    out = tmp_path / "x.safetensors"
    train(data.cache, MODELS, out, replace(QUICK, steps=60, learning_rate=3e-3, caption_dropout=0))
    result = evaluate(data.cache, MODELS, out, (150, 400, 650))
    assert result.mean(TRAINED) < 0.9 * result.mean(MEAN_FEATURES)


def test_the_experts_are_frozen(data):
    unets = load_models(MODELS, Cache(data.cache), torch.float32, torch.device("cpu"))
    ensemble = Ensemble(unets, sizes_for(unets[0], 2, 8, 1, 2).make())
    assert {id(p) for p in ensemble.parameters()} == {id(p) for p in ensemble.aggregators.parameters()}
    assert not any(p.requires_grad for unet in unets for p in unet.parameters())


def test_goes_on_to_more_steps(tmp_path, data, finished):
    out = tmp_path / "x.safetensors"
    train(data.cache, MODELS, out, replace(QUICK, steps=4))
    train(data.cache, MODELS, out, QUICK)
    assert losses(out) == losses(finished)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumes_exactly(tmp_path, data, finished, stop, monkeypatch):
    """Stopped after any step, also one that was not saved, it repeats what an unbroken run does."""
    out = tmp_path / "x.safetensors"
    settings = replace(QUICK, ema=0.9)
    told = []

    def tell(text: str) -> None:
        told.append(text)
        if text.startswith(f"step {stop}/") and len(told) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data.cache, MODELS, out, settings, tell=tell)
    assert not out.exists()
    train(data.cache, MODELS, out, settings)
    whole = tmp_path / "whole.safetensors"
    train(data.cache, MODELS, whole, settings)
    assert losses(out) == losses(whole) == losses(finished)
    a, b = load_file(out), load_file(whole)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_killed_and_resumed(tmp_path, data):
    """kill -9 in the middle, then the same command again."""
    steps = 40
    flags = ["--cache", str(data.cache), "--steps", str(steps), "--batch-size", "4", "--hidden", "8", "--layers", "1",
             "--heads", "2", "--save-every", "5", *(x for path in MODELS for x in ("--model", path))]  # fmt: skip
    out, whole = tmp_path / "x.safetensors", tmp_path / "whole.safetensors"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lib_fusion", "train", *flags, "--out"]
    process = subprocess.Popen([*command, str(out)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    log = out.with_suffix(".run") / "log.csv"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 13):
        time.sleep(0.05)
    process.kill()
    assert process.wait() != 0
    assert not out.exists()
    for path in (out, whole):
        subprocess.run([*command, str(path)], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert len(losses(out)) == steps
    assert losses(out) == losses(whole)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_are_one(tmp_path, data):
    """torchrun with gloo: the same global batch, the same losses and weights."""
    flags = ["--cache", str(data.cache), "--steps", "5", "--batch-size", "4", "--hidden", "8", "--layers", "1",
             "--heads", "2", "--learning-rate", "0.01", *(x for path in MODELS for x in ("--model", path))]  # fmt: skip
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert main(["train", *flags, "--out", str(one)]) == 0
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command = [sys.executable, "-m", *launch, "--master-port", str(free_port()), "-m", "lib_fusion", "train", *flags,
               "--accumulate", "2", "--out", str(two)]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
                   timeout=900)  # fmt: skip
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=1e-4, atol=1e-6)
    a, b = load_file(one), load_file(two)
    # Adam turns rounding into steps of the learning rate where a gradient is next to nothing: compare in the mean.
    assert max((a[key] - b[key]).abs().mean().item() for key in a) < 2e-3


def test_accumulation_and_checkpointing_change_nothing(tmp_path, data, finished):
    for name, settings in (("parts", replace(QUICK, accumulate=2)), ("again", replace(QUICK, checkpointing=True))):
        train(data.cache, MODELS, tmp_path / f"{name}.safetensors", settings)
        found, expected = (torch.tensor(losses(path)) for path in (tmp_path / f"{name}.safetensors", finished))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_mixed_precision_and_options(tmp_path, data, finished):
    settings = replace(QUICK, precision="bfloat16", ema=0.9, min_snr=5.0, schedule="cosine", warm_up=2)
    train(data.cache, MODELS, tmp_path / "x.safetensors", settings)
    found = losses(tmp_path / "x.safetensors")
    assert len(found) == 6
    assert all(0 < loss < 2 for loss in found)
    plain = replace(QUICK, precision="bfloat16")
    train(data.cache, MODELS, tmp_path / "y.safetensors", plain)
    assert losses(tmp_path / "y.safetensors")[0] == pytest.approx(losses(finished)[0], rel=0.03)


def test_min_snr_weights():
    """min(SNR, gamma) / SNR for noise, / (SNR + 1) for v."""
    snr = torch.tensor([0.1, 1.0, 5.0, 50.0])
    alphas = snr / (1 + snr)
    torch.testing.assert_close(_weights(alphas, 5, "epsilon"), torch.tensor([1, 1, 1, 0.1]))
    torch.testing.assert_close(_weights(alphas, 5, "v"), torch.tensor([0.1 / 1.1, 0.5, 5 / 6, 5 / 51]))
    assert torch.equal(_weights(alphas, 0, "epsilon"), torch.ones(4))


def test_v_target():
    x, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    a = torch.tensor([0.25, 0.9])
    noisy, v = add_noise(x, noise, a, "v")
    b = a.view(-1, 1, 1, 1)
    torch.testing.assert_close(b.sqrt() * noisy - (1 - b).sqrt() * v, x)
    torch.testing.assert_close((1 - b).sqrt() * noisy + b.sqrt() * v, noise)


def test_schedule_is_stable_diffusions():
    diffusers = pytest.importorskip("diffusers")
    from lib_fusion.engine.samplers import SCHEDULE

    theirs = diffusers.DDPMScheduler(**SCHEDULE).alphas_cumprod
    torch.testing.assert_close(alphas_cumprod(), theirs, rtol=1e-4, atol=1e-6)


def test_repeats_and_sizes_decide_how_often(tmp_path, data):
    import json

    from lib_fusion.training.cache import write_cache

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("dog", "bus"):
        shutil.copy(DEMO / "images" / f"{name}-flat.webp", pictures)
    lines = [{"file_name": "dog-flat.webp", "text": "x", "repeats": 3}, {"file_name": "bus-flat.webp", "text": "y"}]
    (pictures / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    write_cache(pictures, tmp_path / "cache", data.encoders, 64)
    batches = Batches(Cache(tmp_path / "cache"), replace(QUICK, batch_size=64))
    first = batches.draw(0, slice(0, 64))[0]
    dogs = sum(torch.equal(x, batches.cache.read(batches.cache.entries[0])[0]) for x in first)
    assert 38 <= dogs <= 58


def test_no_caption_is_always_dropped_or_never(data):
    cache = Cache(data.cache)
    texts = Batches(cache, replace(QUICK, caption_dropout=1.0)).draw(0, slice(0, 4))[1]
    assert all(torch.equal(row, cache.empty[m].states) for m, text in enumerate(texts) for row in text.states)
    texts = Batches(cache, replace(QUICK, caption_dropout=0.0)).draw(0, slice(0, 4))[1]
    assert not any(torch.equal(row, cache.empty[0].states) for row in texts[0].states)


def test_goes_on_from_other_weights(tmp_path, data, finished):
    """--init: the first loss is that of the weights given, and another shape is refused."""
    out = tmp_path / "x.safetensors"
    card = train(data.cache, MODELS, out, QUICK, init=finished)
    assert card.training["init"] == "finished.safetensors"
    assert losses(out)[0] != pytest.approx(losses(finished)[0], rel=1e-3)
    with pytest.raises(FusionError, match="other sizes"):
        train(data.cache, MODELS, tmp_path / "y.safetensors", replace(QUICK, hidden=16), init=finished)


def test_refusals(tmp_path, data, finished):
    def refused(says: str, **changes) -> None:
        with pytest.raises(FusionError, match=says) as caught:
            train(data.cache, MODELS, tmp_path / "x.safetensors", replace(QUICK, **changes))
        assert len(str(caught.value).splitlines()) == 1

    refused("heads", heads=3)
    refused("hidden", hidden=136, heads=8)
    refused("batch_size: 4", accumulate=3)
    with pytest.raises(SettingError, match="out"):
        train(data.cache, MODELS, tmp_path / "x.ckpt", QUICK)
    with pytest.raises(FusionError, match="made with the text encoders of animals, vehicles"):
        train(data.cache, MODELS[:1], tmp_path / "x.safetensors", QUICK)
    with pytest.raises(FusionError, match="no cache there"):
        train(tmp_path, MODELS, tmp_path / "x.safetensors", QUICK)
    with pytest.raises(FusionError, match=r"other settings \(seed\)"):
        train(data.cache, MODELS, finished, replace(QUICK, seed=1))
    (finished.with_suffix(".run") / "state.pt").write_bytes(b"x")
    with pytest.raises(FusionError, match=r"delete .* to start again"):
        train(data.cache, MODELS, finished, QUICK)


def test_a_loss_that_is_not_finite_stops(tmp_path, data, monkeypatch):
    monkeypatch.setattr("lib_fusion.training.train._weights", lambda a, *_: a * float("nan"))
    with pytest.raises(FusionError, match="the loss is nan at step 1"):
        train(data.cache, MODELS, tmp_path / "x.safetensors", QUICK)
    assert not (tmp_path / "x.safetensors").exists()


def test_settings_are_the_tables():
    assert {row.key: row.default for row in TRAINING_PARAMETERS} == vars(TrainingSettings())
    assert all(row.read(row.show(row.default)) == row.default for row in (*TRAINING_PARAMETERS, *CACHE_PARAMETERS))
