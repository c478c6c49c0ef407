"""A real WebUI for tests and for people: found, prepared in a data directory of its own, started, stopped.

Needs the standard library only; the host runs in its own Python.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
EXTENSION = "sd-webui-denoiser-fusion"
VERSION = "1.10.1"
DEMO = ("general", "animals", "vehicles", "food")
ON_THE_CPU = ("--use-cpu", "all", "--no-half", "--precision", "full")
FLAGS = ("--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-python-version-check", *ON_THE_CPU,
         "--api", "--do-not-download-clip", "--no-download-sd-model")  # fmt: skip
#: With ``FUSION_FAKE_CUDA`` the WebUI runs on the stand-in for a CUDA device (``tests/fake_cuda``), with these flags.
ON_FAKE_CUDA = {
    "full": ("--no-half", "--precision", "full"), "half": (), "medvram": ("--medvram",), "lowvram": ("--lowvram",),
}  # fmt: skip
#: So long a start may take on a machine that others use, too.
START_SECONDS = 600


def fake_cuda() -> str:
    """The kind of device that ``FUSION_FAKE_CUDA`` asks for; empty: none. Raises ValueError for an unknown one."""
    kind = os.environ.get("FUSION_FAKE_CUDA", "")
    if kind and kind not in ON_FAKE_CUDA:
        raise ValueError(f"FUSION_FAKE_CUDA: {kind!r} is not allowed; allowed: {', '.join(ON_FAKE_CUDA)}")
    return kind


class NoHostError(Exception):
    """There is no usable WebUI; the message says what is missing."""


@dataclass(frozen=True)
class Installation:
    """A WebUI on this machine: its folder, its Python, and the flags with which it runs on the CPU."""

    folder: Path
    python: Path
    flags: tuple[str, ...] = FLAGS


def find_host() -> tuple[Path, Path]:
    """(the WebUI's folder, its Python); raises NoHostError with a sentence on what is missing."""
    folder = Path(os.environ.get("WEBUI_DIR") or Path.home() / "stable-diffusion-webui")
    if not (folder / "launch.py").is_file():
        raise NoHostError(f"no WebUI in {folder}; set WEBUI_DIR to a checkout of v{VERSION}")
    changelog = folder / "CHANGELOG.md"
    found = re.search(r"^## (\S+)", changelog.read_text("utf-8"), re.MULTILINE) if changelog.is_file() else None
    if found is None or found[1] != VERSION:
        raise NoHostError(f"the WebUI in {folder} is {found[1] if found else 'of an unknown version'}, not {VERSION}")
    return folder, find_python("WEBUI_PYTHON", Path.home() / "webui-venv", folder / "venv")


def find_python(variable: str, *venvs: Path) -> Path:
    """The Python that an environment variable names, or else that of the first of ``venvs``; raises NoHostError."""
    named = os.environ.get(variable)
    own = ("bin/python", "Scripts/python.exe")
    choices = [Path(named)] if named else [venv / python for venv in venvs for python in own]
    python = next((path for path in choices if path.is_file()), None)
    if python is None:
        raise NoHostError(f"no Python for the WebUI: {' or '.join(map(str, choices))}; set {variable} to it")
    return python


def environment() -> dict[str, str]:
    """Offline, on the CPU, one thread."""
    drop = ("COMMANDLINE_ARGS", "PYTHONPATH", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    threads = os.environ.get("WEBUI_THREADS", "1")
    return kept | {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def prepare_data(data: Path, settings: dict | None = None) -> list[str]:
    """A data directory with this checkout as an extension and the demo's checkpoints; returns their names."""
    models, extensions = data / "models/Stable-diffusion", data / "extensions"
    models.mkdir(parents=True, exist_ok=True)
    extensions.mkdir(exist_ok=True)
    link = extensions / EXTENSION
    if not link.exists():
        link_folder(link)
    config = data / "config.json"
    if not config.exists():
        config.write_text(json.dumps({"show_progress_type": "Approx cheap", **(settings or {})}), "utf-8")
    return [name for name in DEMO if copy_demo(name, models)]


def link_folder(link: Path) -> None:
    """This checkout under another name; as a junction where Windows allows no links."""
    try:
        link.symlink_to(REPOSITORY, target_is_directory=True)
    except OSError:
        if sys.platform != "win32":
            raise
        import _winapi

        _winapi.CreateJunction(str(REPOSITORY), str(link))


def copy_demo(name: str, models: Path, target: str | None = None) -> bool:
    """Puts a demo checkpoint among the host's models; its tokenizer's folder becomes an absolute path."""
    weights = REPOSITORY / "demo" / f"{name}.safetensors"
    config = weights.with_suffix(".yaml")
    if not weights.is_file() or not config.is_file():
        return False
    shutil.copy(weights, models / f"{target or name}.safetensors")
    clip = REPOSITORY / "demo" / "clip"
    text = re.sub(r"(version:\s*).*", lambda match: f"{match[1]}{clip}", config.read_text("utf-8"))
    (models / f"{target or name}.yaml").write_text(text, "utf-8")
    return True


def make_checkpoints(data: Path, python: Path, folder: Path, *which: str) -> None:
    """Tiny checkpoints with random weights, made by the host's own classes in its own Python."""
    script = Path(__file__).with_name("make_checkpoints.py")
    command = [str(python), str(script), str(data), str(folder), *which]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"making checkpoints failed:\n{done.stderr[-3000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class HostDiedError(Exception):
    """The WebUI has ended by itself; the message has the end of its log."""


class Host:
    """A running WebUI. ``url`` is where it listens; ``log`` its output since it was last started.

    ``checkpoint``: that to begin with, where no setting of the data directory says so. ``device``: a key of
    ``ON_FAKE_CUDA``, or empty for the CPU; by default what ``FUSION_FAKE_CUDA`` says.
    """

    def __init__(self, data: Path, checkpoint: str | None, port: int | None = None, extra: tuple[str, ...] = (),
                 python: Path | None = None, installation: Installation | None = None,
                 device: str | None = None) -> None:  # fmt: skip
        found = installation or Installation(*find_host())
        self._folder = found.folder
        self.data, self.port = data, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        file = data / "models/Stable-diffusion" / f"{checkpoint}.safetensors"
        first = ("--ckpt", str(file)) if checkpoint else ()
        program, flags = ["launch.py"], found.flags
        if installation is None and (kind := fake_cuda() if device is None else device):
            program = [str(REPOSITORY / "tests/fake_cuda/__main__.py"), "launch.py"]
            flags = (*(flag for flag in flags if flag not in ON_THE_CPU), *ON_FAKE_CUDA[kind])
        self._command = [str(python or found.python), *program, *flags, "--port", str(self.port),
                         "--data-dir", str(data), *first, *extra]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Starts it and waits until it has started."""
        self._log = (self.data / "host.log").open("w", encoding="utf-8")
        self.process = subprocess.Popen(self._command, cwd=self._folder, env=environment(), stdout=self._log,
                                        stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT,
                                        start_new_session=True)  # fmt: skip
        self.starts = 0
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise

    @property
    def log(self) -> str:
        return (self.data / "host.log").read_text("utf-8", errors="replace")

    def wait(self) -> None:
        """Until the host has started (once more): asking any earlier would break its startup."""
        deadline = time.monotonic() + START_SECONDS
        while self.log.count("Startup time") <= self.starts:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise HostDiedError(f"the WebUI did not start:\n{self.log[-3000:]}")
            time.sleep(0.1)
        self.starts += 1

    def revive(self) -> None:
        """Where it has ended by itself, starts it again, and raises HostDiedError with the end of its log."""
        if self.process.poll() is None:
            return
        end = self.log[-3000:]
        self.stop()
        self.start()
        raise HostDiedError(f"the WebUI ended in this test (a new one was started):\n{end}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


if __name__ == "__main__":
    sys.exit("this is a module; to start a WebUI for yourself: python -m tests.webui_live.serve")
