"""What the training tab asks for becomes commands that the command line takes, without a host."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib_fusion.cli import build_parser, given_rows
from lib_fusion.errors import FusionError
from lib_fusion.requests.parameters import read_rows
from lib_fusion.training.options import CACHE_PARAMETERS, TRAINING_PARAMETERS
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
