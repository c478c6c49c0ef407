"""AFA in the embedded engine, on the demo's checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib_fusion.cli import main
from lib_fusion.engine.demo_sheet import ENSEMBLES
from lib_fusion.engine.generate import Engine, single
from lib_fusion.errors import FusionError, SettingError
from lib_fusion.fusion.aggregator_files import Card, identify_model, read_card, save_aggregators
from lib_fusion.fusion.lockstep import sizes_for
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import ExpertSettings, FusionSettings, GenerationSettings
from tests.helpers import PLAIN, relative_error
from tests.methods.test_afa import randomize

DEMO = Path(__file__).resolve().parents[2] / "demo"
ANIMALS, VEHICLES, FOOD = (DEMO / f"{name}.safetensors" for name in ("animals", "vehicles", "food"))
PROMPT = "a fox left of a tractor, flat drawing"
GENERATION = GenerationSettings((PROMPT,), width=256, height=128, steps=4, cfg_scale=5)
AFA = FusionSettings(experts=(ExpertSettings("expert"),), method="AFA", **PLAIN)
UNIFORM = replace(AFA, afa_maps="uniform")


@pytest.fixture(scope="module")
def pair() -> Engine:
    return Engine(ANIMALS, [VEHICLES])


def make_file(folder: Path, *paths: Path, random: bool = True) -> str:
    engine = Engine(paths[0])
    sizes = sizes_for(engine.models[0].unet, len(paths), hidden=8, layers=1, heads=2)
    made = sizes.make()
    card = Card("sd1", "epsilon", sizes, tuple(identify_model(path) for path in paths))
    save_aggregators(folder / "x.safetensors", card, (randomize(made) if random else made).state_dict())
    return str(folder / "x.safetensors")


def latents(engine: Engine, fusion: FusionSettings) -> torch.Tensor:
    return engine.denoise([(PROMPT, 0)], GENERATION, FusionSession(fusion))


def test_one_hot_is_the_single_models_picture(pair):
    for i, maps in enumerate(("only base", "only expert 1")):
        alone = latents(pair, single(AFA, i))
        assert torch.equal(latents(pair, replace(AFA, afa_maps=maps)), alone)


def test_copies_of_the_base_are_the_base(tmp_path):
    engine = Engine(ANIMALS, [ANIMALS])
    alone = latents(engine, FusionSettings())
    told = replace(AFA, afa_aggregator=make_file(tmp_path, ANIMALS, ANIMALS))
    assert relative_error(latents(engine, told), alone) < 1e-4


def test_untrained_aggregators_are_uniform(pair, tmp_path):
    told = replace(AFA, afa_aggregator=make_file(tmp_path, ANIMALS, VEHICLES, random=False))
    assert relative_error(latents(pair, told), latents(pair, UNIFORM)) < 1e-4
    assert (latents(pair, UNIFORM) - latents(pair, replace(AFA, method="Average"))).abs().mean() > 0.01


@pytest.mark.parametrize("file", ENSEMBLES)
def test_the_demos_files_belong_to_its_checkpoints(file):
    card = read_card(DEMO / f"{file}.safetensors")
    card.check_models([identify_model(DEMO / f"{name}.safetensors") for name in ENSEMBLES[file]])
    assert card.training["steps"] > 100
    assert (DEMO / f"{file}.safetensors").stat().st_size < 400_000  # all of demo/ stays under 27 MB


def test_window_and_counts(pair):
    session = FusionSession(replace(UNIFORM, snb_window=(1000, 500)))
    pair.denoise([(PROMPT, 0)], GENERATION, session)
    assert session.calls == [4, 2]
    empty = replace(UNIFORM, snb_window=(0, 0), snb_outside="expert")
    assert torch.equal(latents(pair, empty), latents(pair, single(AFA, 1)))


def test_the_average_outside_the_window(pair):
    average = replace(AFA, method="Average")
    never = replace(UNIFORM, snb_window=(0, 0), snb_outside="average")
    assert torch.equal(latents(pair, never), latents(pair, average))
    session = FusionSession(replace(UNIFORM, snb_window=(500, 0), snb_outside="average"))
    both = pair.denoise([(PROMPT, 0)], GENERATION, session)
    assert session.calls == [4, 4]
    assert not torch.equal(both, latents(pair, average))
    assert not torch.equal(both, latents(pair, UNIFORM))


def test_nothing_stays_on_the_models(pair):
    latents(pair, UNIFORM)
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in pair.models for m in model.unet.modules())


def test_refusals(pair, tmp_path):
    with pytest.raises(SettingError, match="afa_aggregator"):
        pair.check_settings(AFA)
    with pytest.raises(SettingError, match="only expert 2"):
        pair.check_settings(replace(AFA, afa_maps="only expert 2"))
    with pytest.raises(SettingError, match="it needs an expert"):
        pair.check_settings(replace(AFA, experts=()))
    swapped = replace(AFA, afa_aggregator=make_file(tmp_path, VEHICLES, ANIMALS))
    with pytest.raises(FusionError, match="in the order vehicles, animals"):
        pair.check_settings(swapped)
    pair.check_settings(replace(swapped, afa_force=True))


def test_command_line(tmp_path, capsys):
    file = make_file(tmp_path, ANIMALS, VEHICLES, FOOD)
    argv = ["generate", "--base", str(ANIMALS), "--expert", str(VEHICLES), "--prompt", "a fox", "--method", "afa",
            "--afa-aggregator", file, "--out", str(tmp_path / "out"), "--width", "64", "--height", "64", "--steps", "2"]
    assert main(argv) == 2
    assert "for 3 models (animals, vehicles, food), not 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--expert", str(FOOD), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unet_calls"] == [2, 2, 2]


def test_convert_command(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    tensors = load_file(make_file(tmp_path, ANIMALS, VEHICLES))
    save_file(tensors, tmp_path / "official.safetensors")
    out = tmp_path / "converted.safetensors"
    argv = ["convert-afa", "--source", str(tmp_path / "official.safetensors"), "--model", str(ANIMALS),
            "--model", str(VEHICLES), "--heads", "2", "--out", str(out)]  # fmt: skip
    assert main(argv) == 0
    assert "animals + vehicles (sd1, N = 2, hidden 8, layers 1)" in capsys.readouterr().out
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(out).items())
    assert main([*argv[:3], *argv[5:]]) == 2
    assert "for 2 models, 1 checkpoints" in capsys.readouterr().err
