"""Aggregator files: written and read back exactly; everything foreign, broken, or of other models is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_fusion.errors import CheckpointError, FusionError
from lib_fusion.fusion.aggregator_files import (
    Card,
    convert_official,
    identify_model,
    load_aggregators,
    load_for,
    read_card,
    save_aggregators,
)
from lib_fusion.fusion.lockstep import sizes_for
from lib_fusion.unet.model import load_unet
from tests.helpers import SMALL, random_weights
from tests.methods.test_afa import randomize

UNET = load_unet(random_weights(SMALL["sd1"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three checkpoints and an aggregator file for the first two."""
    folder = tmp_path_factory.mktemp("aggregators")
    for i, name in enumerate("abc"):
        save_file(random_weights(SMALL["sd1"], i, "model.diffusion_model."), folder / f"{name}.safetensors")
    card, aggregators = make(folder, "ab")
    save_aggregators(folder / "ab.aggregator.safetensors", card, aggregators.state_dict(), torch.float32)
    return folder


def make(folder, names, **sizes):
    sizes = sizes_for(UNET, len(names), **({"hidden": 16, "layers": 1, "heads": 2} | sizes))
    models = tuple(identify_model(folder / f"{name}.safetensors") for name in names)
    card = Card("sd1", "epsilon", sizes, models, {"data": "none", "steps": 3, "loss": 0.123456})
    return card, randomize(sizes.make())


def load(folder, names, path=None, **more):
    models = [identify_model(folder / f"{name}.safetensors") for name in names]
    return load_for(path or folder / "ab.aggregator.safetensors", UNET, models, ["epsilon"] * len(names), **more)


def test_round_trip(folder):
    card, aggregators = make(folder, "ab")
    read, loaded = load_aggregators(folder / "ab.aggregator.safetensors")
    assert read == card
    assert all(torch.equal(v, aggregators.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert read_card(folder / "ab.aggregator.safetensors").describe() == (
        "a + b (sd1, N = 2, hidden 16, layers 1); data none, steps 3, loss 0.1235"
    )
    assert load(folder, "ab").state_dict().keys() == aggregators.state_dict().keys()


def test_a_card_names_the_loras_of_its_models(folder):
    card, _ = make(folder, "ab")
    models = (card.models[0], replace(card.models[1], loras=("x:0.5", "y:1")))
    read = Card.from_json(replace(card, models=models).to_json())
    assert read.models == models
    assert read.describe().startswith("a + (b + x:0.5 + y:1) (sd1")
    earlier = json.loads(card.to_json())  # written before there were LoRAs
    for model in earlier["models"]:
        del model["loras"]
    assert Card.from_json(json.dumps(earlier)) == card
    with pytest.raises(FusionError, match=r"b in the place of b \+ x:0.5 \+ y:1 \(force"):
        replace(card, models=(models[0], replace(models[1], unet="other"))).check_models(card.models)
    with pytest.raises(ValueError, match="names: allowed"):
        Card.from_json(replace(card, models=(models[0], replace(models[1], loras=(1,)))).to_json())


def test_half_precision_copies_of_a_checkpoint_are_the_same_model(folder, tmp_path):
    tensors = load_file(folder / "a.safetensors")
    half = tmp_path / "half.safetensors"
    save_file({key.removeprefix("model.diffusion_model."): value.half() for key, value in tensors.items()}, half)
    assert identify_model(half).unet == identify_model(folder / "a.safetensors").unet
    assert identify_model(folder / "b.safetensors").unet != identify_model(folder / "a.safetensors").unet


@pytest.mark.parametrize(
    ("names", "says"),
    [("ba", "in the order a, b"), ("abc", "for 2 models"), ("a", "for 2 models"), ("ac", "c in the place of b")],
)
def test_other_models_are_refused(folder, names, says):
    with pytest.raises(FusionError, match=says) as caught:
        load(folder, names)
    assert len(str(caught.value).splitlines()) == 1


def test_force_lets_other_weights_through_but_not_another_number(folder):
    assert len(load(folder, "ac", force=True)) == 25
    with pytest.raises(FusionError, match="for 2 models"):
        load(folder, "abc", force=True)


def test_other_widths_and_predictions_are_refused(folder, tmp_path):
    sdxl = load_unet(random_weights(SMALL["sdxl"]))
    models = [identify_model(folder / f"{name}.safetensors") for name in "ab"]
    path = folder / "ab.aggregator.safetensors"
    with pytest.raises(FusionError, match="other widths"):
        load_for(path, sdxl, models, ["epsilon"] * 2)
    with pytest.raises(FusionError, match="predict epsilon"):
        load_for(path, UNET, models, ["v", "v"])


def broken(folder, how):
    """A file that is wrong in one way."""
    path = folder / f"broken-{how}.safetensors"
    good = folder / "ab.aggregator.safetensors"
    card, aggregators = make(folder, "ab")
    tensors = {key: value.detach().clone() for key, value in aggregators.state_dict().items()}
    metadata = {"format": "denoiser-fusion-aggregator", "card": card.to_json()}
    if how == "truncated":
        path.write_bytes(good.read_bytes()[:5000])
        return path
    if how == "nan":
        tensors["3.conv_in.bias"][2] = float("nan")
    elif how == "lacking":
        del tensors["24.conv_out.weight"]
    elif how == "reshaped":
        tensors["0.conv_in.weight"] = torch.zeros(16, 3, 1, 1)
    elif how == "version":
        metadata["card"] = json.dumps(json.loads(card.to_json()) | {"version": 99})
    elif how == "card":
        metadata["card"] = "{}"
    elif how == "foreign":
        metadata = {"format": "pt"}
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("how", "says"),
    [("truncated", "truncated or not"), ("nan", "not finite, such as 3.conv_in.bias"),
     ("lacking", "24.conv_out.weight"),
     ("reshaped", "0.conv_in.weight"), ("version", "version 1"), ("card", "card can't be read"),
     ("foreign", "not an aggregator file")],
)  # fmt: skip
def test_broken_and_foreign_files_are_refused(folder, how, says):
    path = broken(folder, how)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(folder, "ab", path)
    assert path.name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_is_not_an_aggregator(folder):
    with pytest.raises(CheckpointError, match="not an aggregator file"):
        read_card(folder / "a.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        read_card(folder / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"only \.safetensors"):
        read_card(__file__)


def official(folder, card, aggregators):
    """The folder that the official code's save_pretrained leaves."""
    for i, aggregator in enumerate(aggregators):
        part = folder / f"aggregator_{i}"
        part.mkdir(parents=True)
        tensors = {key: value.detach().contiguous() for key, value in aggregator.state_dict().items()}
        save_file(tensors, part / "aggregator.safetensors")
        (part / "config.json").write_text(json.dumps({"num_attn_heads": card.sizes.heads}))


@pytest.mark.parametrize("as_list", [False, True])
def test_official_aggregators_are_converted(folder, tmp_path, as_list):
    card, aggregators = make(folder, "abc", hidden=32, layers=2, heads=4)
    source = tmp_path / "official"
    if as_list:
        source = tmp_path / "list.safetensors"
        save_file({f"aggregators.{k}": v.detach() for k, v in aggregators.state_dict().items()}, source)
    else:
        official(source, card, aggregators)
    paths = [folder / f"{name}.safetensors" for name in "abc"]
    converted, tensors = convert_official(source, paths, heads=4 if as_list else None)
    assert converted.sizes == card.sizes
    assert converted.models == card.models
    save_aggregators(tmp_path / "out.safetensors", converted, tensors, torch.float32)
    loaded = load_aggregators(tmp_path / "out.safetensors")[1]
    assert all(torch.equal(v, aggregators.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_conversion_refuses_what_is_something_else(folder, tmp_path):
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    with pytest.raises(CheckpointError, match="not aggregators"):
        convert_official(folder / "c.safetensors", paths)
    with pytest.raises(CheckpointError, match="aggregator_0"):
        convert_official(tmp_path, paths)
    card, aggregators = make(folder, "abc")
    official(tmp_path / "three", card, aggregators)
    with pytest.raises(CheckpointError, match="for 3 models, 2 checkpoints"):
        convert_official(tmp_path / "three", paths)


def test_a_failed_write_leaves_nothing(folder, tmp_path, monkeypatch):
    card, aggregators = make(folder, "ab")
    full = lambda *_: (_ for _ in ()).throw(OSError("disk full"))  # noqa: E731
    monkeypatch.setattr("lib_fusion.fusion.aggregator_files.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save_aggregators(tmp_path / "x.safetensors", card, aggregators.state_dict())
    assert list(tmp_path.iterdir()) == []
