"""What can't be trained with is told of in one line, and nothing that was done before is lost."""

from __future__ import annotations

import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_fusion.errors import FusionError
from lib_fusion.fusion.aggregator_files import read_card, save_aggregators
from lib_fusion.training.evaluate import evaluate
from lib_fusion.training.train import check_precision, train
from tests.training.conftest import DEMO, MODELS, QUICK
from tests.training.test_cache import small_disk  # noqa: F401
from tests.training.test_train import losses

THREE = str(DEMO / "food.safetensors")


@pytest.fixture
def finished(tmp_path: Path, data) -> Path:
    out = tmp_path / "good.safetensors"
    train(data.cache, MODELS, out, QUICK)
    return out


def spoil(how: str, path: Path, target: Path) -> Path:
    """A broken copy of a file."""
    if how == "truncated":
        whole = path.read_bytes()
        target.write_bytes(whole[: len(whole) // 2])
    elif how == "foreign":
        save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, target)
    else:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        key = next(key for key in tensors if key.endswith("to_q.weight"))
        tensors[key].view(-1)[3] = float("nan")
        save_file(tensors, target, metadata)
    return target


def refused(says: str, act) -> None:
    with pytest.raises(FusionError, match=says) as caught:
        act()
    assert len(str(caught.value).splitlines()) == 1


BROKEN = {
    "truncated": "truncated or not a safetensors file",
    "foreign": "looks like a LoRA",
    "nan": "not finite, such as",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_model(tmp_path, data, how):
    bad = spoil(how, Path(MODELS[1]), tmp_path / "bad.safetensors")
    refused(BROKEN[how], lambda: train(data.cache, [MODELS[0], bad], tmp_path / "x.safetensors", QUICK))
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_aggregator(tmp_path, data, finished, how):
    bad = spoil(how, finished, tmp_path / "bad.safetensors")
    refused(BROKEN[how], lambda: train(data.cache, MODELS, tmp_path / "x.safetensors", QUICK, init=bad))
    refused(BROKEN[how], lambda: evaluate(data.cache, MODELS, bad))
    assert not list(tmp_path.glob("x.*"))


def test_another_number_or_order_of_models(tmp_path, data, finished):
    """A run that is there belongs to its models in their order, and stays as it is when others are given."""
    before, done = finished.read_bytes(), losses(finished)
    refused("made with the text encoders of animals, vehicles, not with those of animals, vehicles, food",
            lambda: train(data.cache, [*MODELS, THREE], finished, QUICK))  # fmt: skip
    refused("another cache or other models; delete it to start again",
            lambda: train(data.cache, MODELS[::-1], finished, replace(QUICK, steps=8)))  # fmt: skip
    assert (finished.read_bytes(), losses(finished)) == (before, done)
    refused("in the order animals, vehicles", lambda: evaluate(data.cache, MODELS[::-1], finished))
    card = read_card(finished)
    three = replace(card, sizes=replace(card.sizes, num_models=3), models=(*card.models, card.models[0]))
    save_aggregators(tmp_path / "three.safetensors", three, three.sizes.make().state_dict())
    refused("is for 3 models", lambda: evaluate(data.cache, MODELS, tmp_path / "three.safetensors"))
    refused("other sizes", lambda: train(data.cache, MODELS, tmp_path / "x.safetensors", QUICK,
                                         init=tmp_path / "three.safetensors"))  # fmt: skip


def test_disk_full_loses_nothing(small_disk: Path, data):  # noqa: F811
    """The state that was saved last stays, and with room again the run ends as one that was never broken off."""
    subprocess.run(["mount", "-o", "remount,size=5m", small_disk], check=True)
    out = small_disk / "x.safetensors"
    train(data.cache, MODELS, out, replace(QUICK, steps=2))
    state = out.with_suffix(".run") / "state.pt"
    kept = state.read_bytes()
    filling = small_disk / "filling"
    filling.write_bytes(bytes(5 * 2**20 - sum(f.stat().st_size for f in small_disk.rglob("*") if f.is_file()) - 2**17))
    refused("the last saved state stays", lambda: train(data.cache, MODELS, out, QUICK))
    assert state.read_bytes() == kept
    assert not list(state.parent.glob("*.partial"))
    filling.unlink()
    train(data.cache, MODELS, out, QUICK)
    whole = small_disk / "whole.safetensors"
    subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
    train(data.cache, MODELS, whole, QUICK)
    assert losses(out) == losses(whole)
    assert all(torch.equal(value, load_file(whole)[key]) for key, value in load_file(out).items())


@pytest.mark.parametrize("device", ["privateuseone", "cpu"])
def test_a_precision_that_autocast_does_not_know_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS before torch 2.4 and on DirectML, and float16 on the CPU before 2.3."""
    check_precision("float32", torch.device(device))
    if device == "cpu":
        check_precision("bfloat16", torch.device(device))

        def autocast(*_: object) -> None:
            warnings.warn("the target dtype is not supported. Disabling autocast.", stacklevel=1)

        monkeypatch.setattr(torch, "autocast", autocast)
    precision = "bfloat16" if device != "cpu" else "float16"
    refused(
        f"precision: '{precision}' is not allowed; allowed on {device} with torch .*: float32",
        lambda: check_precision(precision, torch.device(device)),
    )


def test_training_checks_the_precision_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_: (_ for _ in ()).throw(RuntimeError("unsupported autocast")))
    half = replace(QUICK, precision="float16")
    refused("precision: ", lambda: train(tmp_path / "nothing", MODELS, tmp_path / "a.safetensors", half))
