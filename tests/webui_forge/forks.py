"""The WebUIs with Forge's backend that tests know: where they are looked for, and how they are started on a CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.webui_forge import checkpoints
from tests.webui_live.host import (
    DEMO,
    EXTENSION,
    REPOSITORY,
    Host,
    Installation,
    NoHostError,
    find_python,
    link_folder,
)

HERE = Path(__file__).parent
SETTINGS = {"samples_save": False, "grid_save": False, "do_not_show_images": False, "live_previews_enable": False,
            "show_progress_type": "Approx cheap",  # else ersatzForge wants to download a model
            "CLIP_stop_at_last_layers": 1, "sd_model_checkpoint": "general.safetensors"}  # fmt: skip


@dataclass(frozen=True)
class Fork:
    """One of them. ``variable`` names its folder and, with ``_PYTHON`` in place of ``_DIR``, its Python."""

    name: str
    title: str
    variable: str
    folder: str
    flags: tuple[str, ...]

    def find(self) -> Installation:
        """Raises NoHostError with a sentence on what is missing."""
        home = Path.home() / self.folder
        folder = Path(os.environ.get(self.variable) or home)
        if not (folder / "launch.py").is_file() or not (folder / "backend/sampling").is_dir():
            raise NoHostError(f"no {self.title} in {folder}; set {self.variable} to a checkout of it")
        python = find_python(self.variable.replace("_DIR", "_PYTHON"), Path(f"{home}-venv"), folder / "venv")
        # Elsewhere than its data directory, its own folder must be allowed, or the page gets no scripts.
        return Installation(folder, python, ("--skip-prepare-environment", "--api", *self.flags,
                                             "--gradio-allowed-path", str(folder)))  # fmt: skip


FORKS = (
    Fork("neo", "Forge Neo", "FORGE_NEO_DIR", "forge-neo", ("--cpu", "--force-fp32")),
    Fork("forge", "Forge", "FORGE_DIR", "forge", ("--always-cpu", "--all-in-fp32", "--skip-torch-cuda-test")),
    Fork("ersatzforge", "ersatzForge", "ERSATZFORGE_DIR", "ersatzforge",
         ("--always-cpu", "--all-in-fp32", "--skip-torch-cuda-test")),
)  # fmt: skip


def prepare_data(data: Path, installation: Installation) -> None:
    """A data directory with this checkout and the tests' extensions, the demo's checkpoints, LoRAs and aggregators."""
    models, extensions = data / "models", data / "extensions"
    for folder in ("Stable-diffusion", "Lora", "denoiser-fusion"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    (data / "tmp").mkdir(exist_ok=True)  # where a fork puts the pictures that a page shows, and which it does not make
    demo = REPOSITORY / "demo"
    for name in DEMO:
        shutil.copy(demo / f"{name}.safetensors", models / "Stable-diffusion")
    copy_others(models)
    checkpoints.write(demo, models / "Stable-diffusion")
    (extensions / "fusion-tests/scripts").mkdir(parents=True, exist_ok=True)
    for name in ("tiny_models.py", "probe.py"):
        shutil.copy(HERE / name, extensions / "fusion-tests/scripts")
    if not (extensions / EXTENSION).exists():
        link_folder(extensions / EXTENSION)
    config = data / "config.json"
    if not config.exists():
        config.write_text(json.dumps(SETTINGS | version_of(installation)), "utf-8")


def copy_others(models: Path) -> None:
    """The demo's LoRAs and aggregators."""
    for source, target in (("loras/*.safetensors", "Lora"), ("afa-*.safetensors", "denoiser-fusion")):
        (models / target).mkdir(parents=True, exist_ok=True)
        for file in (REPOSITORY / "demo").glob(source):
            shutil.copy(file, models / target)


def version_of(installation: Installation) -> dict[str, str]:
    """What Forge Neo wants to read in its settings; else it takes them for an older version's and waits for a key."""
    text = (installation.folder / "modules/launch_utils.py").read_text("utf-8")
    found = re.search(r'^VERSION_UID\b.*=\s*"(.+)"', text, re.MULTILINE)
    return {"VERSION_UID": found[1]} if found else {}


def start(data: Path, installation: Installation) -> Host:
    return Host(data, None, installation=installation)
