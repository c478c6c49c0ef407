"""What the training tab asks for becomes commands that the command line takes, without a host."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lib_fusion.cli import build_parser, given_rows
from lib_fusion.errors import FusionError, SettingError
from lib_fusion.requests.parameters import read_rows
from lib_fusion.training.options import CACHE_PARAMETERS, TRAINING_PARAMETERS
from lib_fusion.unet.model_file import LoraFile, ModelFile
from tests.training.conftest import DEMO, write_pictures
from tests.webui_fake import fakes


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    fakes.install(monkeypatch)
    from lib_fusion.webui.training import start as training

    def find(name: str, field: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, filename=str(DEMO / name))

    def config(info: Any) -> str:
        return str(Path(info.filename).with_suffix(".yaml"))

    monkeypatch.setattr(training, "find_checkpoint", find)
    monkeypatch.setattr(training, "check_prediction", lambda *_: None)
    monkeypatch.setattr(training.sd_models_config, "find_checkpoint_config_near_filename", config)
    monkeypatch.setattr(training.paths, "models_path", str(tmp_path))
    packages = {"Stable Diffusion": "/host/ldm", "Stable Diffusion XL": "/host/sgm", "BLIP": "/host/x"}
    monkeypatch.setattr(training.paths, "paths", packages, raising=False)
    monkeypatch.setattr(training.shared, "cmd_opts", SimpleNamespace(hide_ui_dir_config=False), raising=False)
    return training


def form(source: Path, **changes: object) -> dict[str, Any]:
    """As the page gives it: numbers are floats."""
    rows = {row.key: float(row.default) if row.kind == "int" else row.default
            for row in (*CACHE_PARAMETERS, *TRAINING_PARAMETERS)}  # fmt: skip
    models = ["animals.safetensors", "vehicles.safetensors", "food.safetensors"]
    return {"name": " taught ", "source": f' "{source}" ', "held_out": "", "models": models, **rows, **changes}


def test_commands(training: Any, tmp_path: Path) -> None:
    source, held_out = write_pictures(tmp_path / "a"), write_pictures(tmp_path / "b")
    changes = {"steps": 70.0, "checkpointing": True, "schedule": "cosine", "ema": 0.999, "resolution": 64.0,
               "precision": "bfloat16"}  # fmt: skip
    store = training.jobs()
    job = training.make_job(form(source, held_out=str(held_out), **changes), store)
    args = [build_parser().parse_args(command) for command in job.commands]
    assert [a.command for a in args] == ["cache", "cache", "train", "evaluate"]
    folder = tmp_path / "denoiser-fusion/training/taught"
    files = [str(DEMO / f"{name}.safetensors") for name in ("animals", "vehicles", "food")]
    assert all(a.model == files and a.device == "cpu" for a in args)
    assert [a.cache for a in args] == [str(folder / part) for part in ("cache", "held-out", "cache", "held-out")]
    assert args[3].precision == "bfloat16"
    assert (args[0].source, args[1].source) == (str(source), str(held_out))
    assert args[2].out == args[3].aggregator == str(folder / "taught.safetensors")
    read = read_rows(TRAINING_PARAMETERS, given_rows(args[2], TRAINING_PARAMETERS))
    assert read == {row.key: changes.get(row.key, row.default) for row in TRAINING_PARAMETERS}
    assert read_rows(CACHE_PARAMETERS, given_rows(args[1], CACHE_PARAMETERS)) == {"resolution": 64, "shard_size": 64}
    assert job.name == "taught"
    assert job.target == str(tmp_path / "denoiser-fusion/taught.safetensors")
    assert [Path(config).name for config in job.configs] == ["animals.yaml", "vehicles.yaml", "food.yaml"]
    assert job.paths == ["/host/ldm", "/host/sgm"]
    assert not folder.exists()


def test_without_held_out_pictures(training: Any, tmp_path: Path) -> None:
    job = training.make_job(form(write_pictures(tmp_path / "a")), training.jobs())
    args = [build_parser().parse_args(command) for command in job.commands]
    assert [a.command for a in args] == ["cache", "train", "evaluate"]
    assert args[2].cache == args[0].cache


@pytest.fixture
def loras(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's LoRAs in the host's list."""
    files = {path.stem: SimpleNamespace(filename=str(path)) for path in (DEMO / "loras").glob("*.safetensors")}
    networks = ModuleType("networks")
    networks.loaded_networks, networks.forbidden_network_aliases = [], {}
    networks.network_apply_weights = networks.update_available_networks_by_names = lambda *_: None
    networks.available_networks = networks.available_network_aliases = files
    monkeypatch.setitem(sys.modules, "networks", networks)


GENERAL = "general.safetensors"


@pytest.mark.usefixtures("loras")
def test_models_with_loras(training: Any, tmp_path: Path) -> None:
    """As prompts name them, and one checkpoint more than once; the commands have the files."""
    both = f"{GENERAL}<lora:demo-vehicles:0.8> <lora:demo-animals:-0.25>"
    asked = [f"{GENERAL} <lora:demo-animals:1>", GENERAL, both]
    job = training.make_job(form(write_pictures(tmp_path / "a"), models=asked), training.jobs())
    base = DEMO / GENERAL
    animals, vehicles = (DEMO / f"loras/demo-{name}.safetensors" for name in ("animals", "vehicles"))
    wanted = [ModelFile(base, (LoraFile(animals),)), ModelFile(base),
              ModelFile(base, (LoraFile(vehicles, 0.8), LoraFile(animals, -0.25)))]  # fmt: skip
    for command in job.commands:
        assert [ModelFile.of(model) for model in build_parser().parse_args(command).model] == wanted
    assert job.values["models"] == asked
    assert [Path(config).name for config in job.configs] == ["general.yaml"] * 3


@pytest.mark.usefixtures("loras")
@pytest.mark.parametrize(
    ("models", "problem"),
    [
        ([GENERAL, f"{GENERAL} <lora:demo-animal:1>"], "no such LoRA; near it: demo-animals"),
        ([GENERAL, f"{GENERAL} <lora:demo-animals:x>"], "allowed: <lora:NAME:WEIGHT>"),
        ([GENERAL, f"{GENERAL} <lora:demo-animals:1:0.5>"], "one weight for U-Net and text encoder"),
        ([GENERAL, f"{GENERAL} <lora:demo-animals:1:1:4>"], "one weight for U-Net and text encoder"),
        ([GENERAL, f"{GENERAL} <hypernet:demo:1>"], "can't act on one model alone"),
        ([GENERAL, f"{GENERAL} <lora:demo-animals:0>"], "there twice"),
        ([f"{GENERAL} <lora:demo-animals:1> <lora:demo-vehicles:1>",
          f"{GENERAL} <lora:demo-vehicles:1> <lora:demo-animals:1>"], "there twice"),
        ([GENERAL, f"{GENERAL} <lora:other:1>"], "this is LoHa"),
        ([GENERAL, f"{GENERAL} <lora:large:1>"], "layers that general.safetensors (sd1) does not have"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_models_with_loras_that_cannot_be_trained(
    training: Any, tmp_path: Path, models: list[str], problem: str
) -> None:
    for name, key in (("other", "lora_unet_x.hada_w1_a"), ("large", "lora_unet_x.lora_up.weight")):
        save_file({key: torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
        entry = SimpleNamespace(filename=str(tmp_path / f"{name}.safetensors"))
        sys.modules["networks"].available_networks[name] = entry
    with pytest.raises(SettingError) as caught:
        training.make_job(form(write_pictures(tmp_path / "a"), models=models), training.jobs())
    assert caught.value.field == "models"
    assert problem in str(caught.value)
    assert not training.jobs().folder.exists()


@pytest.mark.usefixtures("loras")
def test_a_lora_is_added_to_the_last_model(training: Any) -> None:
    once = training.add_lora([GENERAL, GENERAL], "demo-animals", 0.75)
    assert once == [GENERAL, f"{GENERAL} <lora:demo-animals:0.75>"]
    twice = training.add_lora(once, "demo-vehicles", 1.0)
    assert twice == [GENERAL, f"{GENERAL} <lora:demo-animals:0.75> <lora:demo-vehicles:1>"]
    refused = [([], "demo-animals", "a checkpoint first"), ([GENERAL], "", "one of the list"),
               (twice, "demo-animals", "each LoRA once"), ([GENERAL], "x", "no such LoRA")]  # fmt: skip
    for names, lora, problem in refused:
        with pytest.raises(SettingError, match=problem):
            training.add_lora(names, lora, 1.0)


def test_hidden_folders(training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.shared.cmd_opts, "hide_ui_dir_config", True)
    with pytest.raises(FusionError, match="--hide-ui-dir-config"):
        training.start(form(write_pictures(tmp_path / "a")))


def test_what_trainings_keep_is_not_listed(training: Any, tmp_path: Path) -> None:
    from lib_fusion.webui.models import aggregators

    for name in ("training/a/a", "training/a/cache/shard-00000", "b", "sub/c"):
        path = tmp_path / "denoiser-fusion" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert aggregators.list_aggregators() == ["b", "sub/c"]
