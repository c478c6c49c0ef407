"""A tiny data set and its cache, made once: nine of the demo's pictures at 64 pixels."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from lib_fusion.engine.training_encoders import EngineEncoders
from lib_fusion.training.cache import write_cache
from lib_fusion.training.options import TrainingSettings

DEMO = Path(__file__).resolve().parents[2] / "demo"
MODELS = [str(DEMO / f"{name}.safetensors") for name in ("animals", "vehicles")]
NAMES = ("dog", "fox", "cow", "bus", "car", "tram", "pig", "taxi", "ship")
#: Small enough for a step in a fraction of a second.
QUICK = TrainingSettings(steps=6, batch_size=4, learning_rate=1e-2, hidden=8, layers=1, heads=2, save_every=2)


@dataclass
class Set:
    pictures: Path
    cache: Path
    encoders: EngineEncoders


def write_pictures(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for i, name in enumerate(names):
        shutil.copy(DEMO / "images" / f"{name}-flat.webp", folder)
        entry = {"file_name": f"{name}-flat.webp", "text": f"a {name}, flat drawing", "subset": "ab"[i % 2]}
        lines.append(json.dumps(entry))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Set:
    folder = tmp_path_factory.mktemp("training")
    pictures = write_pictures(folder / "pictures")
    encoders = EngineEncoders(MODELS)
    write_cache(pictures, folder / "cache", encoders, resolution=64, shard_size=4)
    return Set(pictures, folder / "cache", encoders)
