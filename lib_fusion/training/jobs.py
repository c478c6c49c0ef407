"""Trainings as jobs: processes of their own, whose state lies on disk, so that they outlive page and WebUI. Host-free.

A job's folder holds ``job.json`` (what was asked for, and the process), ``state.json`` (written by the process: how far
it is), ``log.txt``, and what the training commands write: ``cache``, ``held-out``, ``NAME.run``, ``evaluation``.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.files import read_text, retry, write_whole
from lib_fusion.training.options import CHANGEABLE

JOB, STATE, LOG = "job.json", "state.json", "log.txt"
CACHE, HELD_OUT, EVALUATION = "cache", "held-out", "evaluation"
#: Module that the process runs, and the folder that it is found in.
PROCESS = "lib_fusion.webui.training.process"
REPOSITORY = Path(__file__).resolve().parents[2]
#: Finds the package by its argument: an embedded Python, as in ready-made WebUIs for Windows, is isolated and reads
#: neither PYTHONPATH nor any other variable. Its output is UTF-8 and unbuffered by flags for the same reason.
BOOTSTRAP = """\
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
#: Flags of a process on Windows: neither Ctrl+C nor closing the WebUI's console reaches it.
CREATE_NEW_PROCESS_GROUP, CREATE_NO_WINDOW = 0x200, 0x8000000
NAME = re.compile(r"\w[\w .-]{0,59}")
#: Names that Windows keeps for devices, whatever ending follows.
DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789\u00b9\u00b2\u00b3"
}
#: Seconds that a process has to end by itself.
PATIENCE = 10.0
#: By how much the times may differ that two WebUIs see a process begin at, as clocks are set.
CLOCK_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """``values``: what was asked for, as the tab's form has it. ``commands``: lib_fusion's, one after the other.

    ``configs``: the models' configuration files in the host's format; ``paths``: where the host's own packages lie;
    ``target``: where the aggregator file goes.
    """

    name: str
    values: dict[str, Any]
    commands: list[list[str]]
    configs: list[str]
    paths: list[str]
    target: str


@dataclass
class Status:
    """``phase``: running, finished, failed, stopped (by a person), or lost (ended without a word).

    ``rows`` are the log's: (step, loss, learning rate, seconds). ``saved``: the step that a training resumes from.
    """

    name: str
    phase: str
    stage: str = ""
    error: str = ""
    steps: int = 0
    saved: int = 0
    rows: list[tuple[int, float, float, float]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.rows[-1][0] if self.rows else 0


class Jobs:
    """The jobs in a folder; at most one of them runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The last started first."""
        files = [(path.stat().st_mtime, path.parent.name) for path in self.folder.glob(f"*/{JOB}")]
        return [name for _, name in sorted(files, reverse=True) if not _problem_of(name)]

    def of(self, name: str) -> Path:
        """A job's folder; raises SettingError where the name can't be one."""
        if problem := _problem_of(name):
            raise SettingError("name", name, problem)
        return self.folder / name

    def read(self, name: str) -> Job | None:
        """What was asked for; None where there is no such job, or its file is broken."""
        found = _read_json(self.of(name) / JOB)
        try:
            return Job(**found["job"])
        except (KeyError, TypeError):
            return None

    def running(self) -> str | None:
        """The name of the job that runs."""
        return next((name for name in self.names() if self._process(name) is not None), None)

    def check(self, job: Job) -> None:
        """Refuses a job that can't be started or resumed; raises SettingError."""
        folder = self.of(job.name)
        if (running := self.running()) is not None:
            raise SettingError("name", job.name, f"{running} is being trained; allowed: one training at a time")
        before = self.read(job.name)
        self._check_name(job, is_new=before is None)
        if before is None:
            return
        keys = ["source", "models", "resolution"] if (folder / CACHE).is_dir() else []
        keys += ["held_out"] if (folder / HELD_OUT).is_dir() and before.values.get("held_out") else []
        if (folder / f"{job.name}.run" / "state.pt").is_file():
            keys += [key for key in job.values if key not in (*keys, "held_out", "shard_size", *CHANGEABLE)]
        differ = [key for key in keys if before.values.get(key) != job.values[key]]
        if differ:
            problem = f"it was begun with another {', '.join(differ)} ({before.values.get(differ[0])})"
            raise SettingError("name", job.name, f"{problem}; allowed: the same to go on, or another name")

    def _check_name(self, job: Job, is_new: bool) -> None:
        """Refuses a name that differs from another training's, or from a file's, by capitals only."""
        target = Path(job.target)
        trainings = [name for name in self.names() if name != job.name]
        files = [file.stem for file in target.parent.glob("*") if file.suffix.lower() == target.suffix]
        for kind, names in (("training", trainings), ("aggregator file", files if is_new else [])):
            same = next((name for name in names if _folded(name) == _folded(job.name)), None)
            if same == job.name:
                raise SettingError("name", job.name, f"an {kind} of this name is there; allowed: another name")
            if same is not None:
                problem = f"Windows and macOS take it for that of the {kind} {same}; allowed: another name"
                raise SettingError("name", job.name, problem)

    def start(self, job: Job) -> None:
        """Starts or resumes a job in a process of its own; raises FusionError where it can't."""
        with self._lock:
            self.check(job)
            folder = self.of(job.name)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                retry(lambda: (folder / STATE).unlink(missing_ok=True))
                write_json(folder / JOB, {"job": asdict(job)})
                process = self._launch(folder)
                write_json(folder / JOB, {"job": asdict(job), "pid": process.pid, "created": _created(process.pid)})
            except OSError as error:
                raise FusionError(f"{folder}: the training can't be started ({error})") from error

    def _launch(self, folder: Path) -> subprocess.Popen:
        own_session: dict[str, Any] = {"start_new_session": True}  # so that the WebUI's Ctrl+C does not end it
        if sys.platform == "win32":
            own_session = {"creationflags": CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW}
        with (folder / LOG).open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                process_command(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **own_session
            )

    def stop(self, name: str) -> bool:
        """Ends a job's process; whether there was one. The saved state stays; starting the job again resumes it."""
        with self._lock:
            process = self._process(name)
            if process is None:
                return False
            write_json(self.of(name) / JOB, _read_json(self.of(name) / JOB) | {"stopped": True})
            process.terminate()
            try:
                process.wait(PATIENCE)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(PATIENCE)
            return True

    def status(self, name: str) -> Status | None:
        """How a job is doing; None where there is none of this name."""
        job = self.read(name)
        if job is None:
            return None
        folder = self.of(name)
        runs = self._process(name) is not None  # asked before the state is read, which its end writes last
        state, asked = _read_json(folder / STATE), _read_json(folder / JOB)
        ended = "stopped" if asked.get("stopped") else "lost"
        phase = "running" if runs else state.get("phase", ended)
        every = int(job.values["save_every"])
        rows = read_losses(folder / f"{name}.run" / "log.csv")
        saved = rows[-1][0] // every * every if rows and (folder / f"{name}.run" / "state.pt").is_file() else 0
        stage, error = state.get("stage", ""), state.get("error", "")
        return Status(name, phase, stage, error, int(job.values["steps"]), saved, rows)

    def log(self, name: str, lines: int = 100) -> str:
        """The end of what the process has said."""
        try:
            with (self.of(name) / LOG).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 200 * lines))
                return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
        except OSError:
            return ""

    def _process(self, name: str) -> psutil.Process | None:
        """The process of a job that runs; a number that another process has by now is no such."""
        asked = _read_json(self.of(name) / JOB)
        try:
            process = psutil.Process(asked["pid"])
            is_same = abs(process.create_time() - asked["created"]) < CLOCK_SECONDS
            if is_same and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except (KeyError, TypeError, ValueError, psutil.Error):
            pass
        return None


def process_command(folder: Path) -> list[str]:
    """What a job's process is started with; it needs no variable of the environment."""
    return [sys.executable, "-u", "-X", "utf8", "-c", BOOTSTRAP, str(REPOSITORY), PROCESS, str(folder)]


def _problem_of(name: str) -> str:
    """Why a name can't be that of a folder and a file, on any system; empty where it can."""
    if not NAME.fullmatch(unicodedata.normalize("NFC", name)) or name[-1] in " .":
        return "allowed: up to 60 letters, digits, spaces and . _ -, with no space or . at the end"
    if name.partition(".")[0].rstrip().upper() in DEVICES:
        return "Windows keeps this name for a device; allowed: another name"
    return ""


def _folded(name: str) -> str:
    """Equal for names that are one file to a system that ignores capitals and how accents are composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def read_losses(path: Path) -> list[tuple[int, float, float, float]]:
    """The rows of a training's log; one that is half written is left out."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in list(csv.reader(file))[1:]:
                step, loss, rate, seconds = row
                rows.append((int(step), float(loss), float(rate), float(seconds)))
    except (OSError, ValueError):
        pass
    return rows


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(values, indent=1), "utf-8"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _created(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0
