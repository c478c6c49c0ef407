"""Trainings as processes: they outlive who started them, can be stopped and gone on with, and say how they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import psutil
import pytest

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.fusion.aggregator_files import read_card
from lib_fusion.training import view as training_view
from lib_fusion.training.jobs import BOOTSTRAP, DEVICES, Job, Jobs, Status, process_command, read_losses
from lib_fusion.training.options import CACHE_PARAMETERS, TRAINING_PARAMETERS
from lib_fusion.training.train import WINDOW, train
from lib_fusion.webui.training import process
from lib_fusion.webui.training.process import describe, publish
from tests.training.conftest import MODELS, QUICK
from tests.training.test_cache import small_disk  # noqa: F401

LONG = replace(QUICK, steps=40, save_every=5)


def make_job(jobs: Jobs, data, name: str = "pair", settings=QUICK, evaluate: bool = False) -> Job:
    """A job as the tab makes it, but on a cache that is there: encoding takes the host's classes."""
    models = [part for path in MODELS for part in ("--model", path)]
    out = jobs.of(name) / f"{name}.safetensors"
    flags = [part for row in TRAINING_PARAMETERS for part in (row.flag, row.show(getattr(settings, row.key)))]
    commands = [["train", "--cache", str(data.cache), "--out", str(out), *models, *flags]]
    if evaluate:
        commands.append(["evaluate", "--cache", str(data.cache), "--aggregator", str(out), *models,
                         "--out", str(jobs.of(name) / "evaluation"), "--timesteps", "400"])  # fmt: skip
    values = {"source": str(data.pictures), "held_out": "", "models": MODELS,
              **{row.key: row.default for row in CACHE_PARAMETERS}, **asdict(settings)}  # fmt: skip
    return Job(name, values, commands, [], [], str(jobs.folder.parent / f"{name}.safetensors"))


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch) -> Iterator[Jobs]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    jobs = Jobs(tmp_path / "denoiser-fusion" / "training")
    yield jobs
    if running := jobs.running():
        jobs.stop(running)


def wait(jobs: Jobs, name: str = "pair", step: int | None = None) -> Status:
    """Until the job is over, or at a step."""
    deadline = time.monotonic() + 480
    while time.monotonic() < deadline:
        status = jobs.status(name)
        if status.phase != "running" or (step is not None and status.step >= step):
            return status
        time.sleep(0.05)
    raise AssertionError(f"{name} takes too long:\n{jobs.log(name)}")


def test_runs_to_its_end(jobs, data):
    job = make_job(jobs, data, evaluate=True)
    jobs.start(job)
    assert jobs.running() == "pair"
    status = wait(jobs)
    assert (status.phase, status.step, jobs.running()) == ("finished", 6, None), jobs.log("pair")
    assert read_card(job.target).training["steps"] == 6
    assert jobs.read("pair") == job
    assert "== train" in jobs.log("pair")
    text = training_view.evaluation_html(jobs.of("pair") / "evaluation", is_held_out=False)
    assert "best single model" in text
    assert "flatters the aggregator" in text
    assert "data:image/png" in text
    assert "| AFA |" in training_view.evaluation_tables(jobs.of("pair") / "evaluation")
    assert "flatters" not in training_view.evaluation_html(jobs.of("pair") / "evaluation", is_held_out=True)


def test_stopped_and_gone_on_with(jobs, data, tmp_path):
    """Another WebUI finds the job that runs; after a stop it ends with the losses of one that was never stopped."""
    job = make_job(jobs, data, settings=LONG)
    jobs.start(job)
    wait(jobs, step=7)
    later = Jobs(jobs.folder)
    assert later.running() == "pair"
    with pytest.raises(SettingError, match="pair is being trained; allowed: one training at a time"):
        later.start(make_job(jobs, data, "other"))
    assert later.stop("pair")
    assert not later.stop("pair")
    status = later.status("pair")
    assert status.phase == "stopped"
    assert 5 <= status.saved <= status.step < 40
    assert f"Start goes on from step {status.saved}." in training_view.sentence(status)
    assert not Path(job.target).exists()
    later.start(job)
    assert wait(jobs).phase == "finished", jobs.log("pair")
    whole = tmp_path / "whole.safetensors"
    train(data.cache, MODELS, whole, LONG)
    found = read_losses(jobs.of("pair") / "pair.run" / "log.csv")
    assert [row[:3] for row in found] == [row[:3] for row in read_losses(whole.with_suffix(".run") / "log.csv")]


def test_killed(jobs, data):
    jobs.start(make_job(jobs, data, settings=LONG))
    wait(jobs, step=1)
    psutil.Process(json.loads((jobs.of("pair") / "job.json").read_text("utf-8"))["pid"]).kill()
    status = wait(jobs)
    assert status.phase == "lost"
    assert "without a word" in training_view.sentence(status)


def test_an_error_is_its_last_word(jobs, data, tmp_path):
    job = make_job(jobs, data)
    job.commands[0][job.commands[0].index("--cache") + 1] = str(tmp_path)
    jobs.start(job)
    status = wait(jobs)
    assert status.phase == "failed"
    assert status.error == f"{tmp_path}: no cache there (index.json can't be read)"
    assert status.error in training_view.sentence(status)
    assert not Path(job.target).exists()


def test_the_number_of_another_process(jobs, data):
    """After a restart of the machine the number may be another's."""
    write_job(jobs, make_job(jobs, data), pid=os.getpid(), created=1.0)
    assert jobs.running() is None
    assert jobs.status("pair").phase == "lost"
    assert not jobs.stop("pair")


def write_job(jobs: Jobs, job: Job, **more: object) -> Path:
    folder = jobs.of(job.name)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"job": asdict(job), **more}))
    return folder


@pytest.mark.parametrize("name", [
    "", "../x", "a/b", "a\\b", ".x", "x" * 61, "a\n", "con", "AUX.style", "nul .x", "com1", "LPT\u00b9", "a.", "a ",
])  # fmt: skip
def test_names(jobs, name):
    """Also what Windows has no file for is refused everywhere: such a file could not be copied there."""
    with pytest.raises(SettingError, match="name: "):
        jobs.of(name)
    (jobs.folder / "good").mkdir(parents=True)
    (jobs.folder / "good" / "job.json").touch()
    if name and "/" not in name:
        (jobs.folder / name).mkdir()
        (jobs.folder / name / "job.json").touch()
    assert jobs.names() == ["good"]
    assert jobs.running() is None


@pytest.mark.parametrize("name", ["a", "Con cert", "console", "com", "com10", "nullpunkt", "a.b", "x" * 60, "\u732b"])
def test_names_that_are_good(jobs, name):
    assert jobs.of(name) == jobs.folder / name


@pytest.mark.skipif(not hasattr(PureWindowsPath, "is_reserved"), reason="gone from this Python")
def test_the_names_of_devices_are_pythons():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in (f"{stem}{end}" for stem in ("con", "prn", "aux", "nul", "com", "lpt", "a", "conx")
                     for end in ("", "1", "9", "10", "\u00b2", ".txt", "1.a.b")):  # fmt: skip
            assert PureWindowsPath(name).is_reserved() == (name.partition(".")[0].upper() in DEVICES), name


@pytest.mark.parametrize(("first", "second"), [
    ("Pair", "pair"), ("stra\u00dfe", "STRASSE"), ("caf\u00e9", "cafe\u0301"),
])  # fmt: skip
def test_names_that_are_one_to_windows_and_macos(jobs, data, first, second):
    write_job(jobs, make_job(jobs, data, first))
    jobs.check(make_job(jobs, data, first))
    with pytest.raises(SettingError, match=f"Windows and macOS take it for that of the training {first}"):
        jobs.check(make_job(jobs, data, second))
    (jobs.of(first) / "job.json").unlink()
    Path(make_job(jobs, data, first).target).touch()
    with pytest.raises(SettingError, match=f"take it for that of the aggregator file {first}"):
        jobs.check(make_job(jobs, data, second))


def test_an_isolated_python_runs_a_job_too(jobs, data, tmp_path):
    """As an embedded one is, which reads no variable: neither where the package lies, nor that output is UTF-8."""
    train = ["train", "--cache", "\u732b", "--out", "x.safetensors", "--model", MODELS[0], "--model", MODELS[1]]
    folder = write_job(jobs, replace(make_job(jobs, data), commands=[train]))
    python, *rest = process_command(folder)
    done = subprocess.run([python, "-I", *rest], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "== train\n\u732b" in done.stdout.decode("utf-8").replace("\r", "")
    assert "\u732b" in jobs.status("pair").error
    rest[rest.index(BOOTSTRAP)] = "import sys; print(sys.flags.utf8_mode, sys.stdout.write_through)"
    shown = subprocess.check_output([python, "-I", *rest], env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert shown.split() == [b"1", b"True"]


def test_on_windows_neither_ctrl_c_nor_a_closed_console_ends_a_job(jobs, data, monkeypatch):
    started = {}

    def popen(command, **options):
        started.update(options)
        return SimpleNamespace(pid=2**31 - 1)  # which no process has

    monkeypatch.setattr(subprocess, "Popen", popen)
    jobs.start(make_job(jobs, data, "posix"))
    assert started["start_new_session"]
    started.clear()
    monkeypatch.setattr(sys, "platform", "win32")
    jobs.start(make_job(jobs, data))
    new_process_group, no_window = 0x00000200, 0x08000000  # as in the Windows API's documentation
    assert started["creationflags"] == new_process_group | no_window
    assert "start_new_session" not in started


def test_what_can_not_go_on(jobs, data):
    job = make_job(jobs, data)
    Path(job.target).parent.mkdir(parents=True)
    Path(job.target).write_bytes(b"somebody's")
    with pytest.raises(SettingError, match="an aggregator file of this name is there"):
        jobs.check(job)
    folder = write_job(jobs, job)
    jobs.check(replace(job, values=job.values | {"hidden": 16}))
    (folder / "cache").mkdir()
    with pytest.raises(SettingError, match=r"begun with another resolution \(512\)"):
        jobs.check(replace(job, values=job.values | {"resolution": 64}))
    (folder / "pair.run").mkdir()
    (folder / "pair.run" / "state.pt").touch()
    jobs.check(replace(job, values=job.values | {"steps": 9, "save_every": 3, "shard_size": 2, "held_out": "x"}))
    with pytest.raises(SettingError, match=r"begun with another hidden, seed \(8\); allowed: the same to go on"):
        jobs.check(replace(job, values=job.values | {"hidden": 16, "seed": 1}))
    assert Path(job.target).read_bytes() == b"somebody's"


def test_broken_files_do_not_break_the_list(jobs, data):
    folder = write_job(jobs, make_job(jobs, data))
    (jobs.folder / "broken").mkdir()
    (jobs.folder / "broken" / "job.json").write_text("{")
    assert set(jobs.names()) == {"pair", "broken"}
    assert jobs.status("broken") is None
    assert jobs.running() is None
    (folder / "pair.run").mkdir()
    (folder / "pair.run" / "log.csv").write_text("step,loss,learning_rate,seconds\n1,0.5,0.1,0.2\n2,0.")
    assert read_losses(folder / "pair.run" / "log.csv") == [(1, 0.5, 0.1, 0.2)]
    assert jobs.log("pair") == ""


def test_disk_full_at_the_start(small_disk, data):  # noqa: F811
    jobs = Jobs(small_disk / "training")
    (small_disk / "filling").write_bytes(bytes(100 * 1024))
    with pytest.raises(FusionError, match="the training can't be started"):
        jobs.start(make_job(jobs, data))
    assert jobs.running() is None


@pytest.mark.parametrize("how", [FusionError("out of pictures"), None])
def test_what_is_not_evaluated_is_not_listed(jobs, data, monkeypatch, how):
    """A training that ends in its evaluation has no file for the panel; the next start puts it there."""
    job = make_job(jobs, data, evaluate=True)
    folder = write_job(jobs, job)
    target = Path(job.target)

    def train_quickly(args):
        Path(args.out).write_bytes(b"trained")

    def evaluate_or_not(args):
        assert not target.exists()
        if how is not None:
            raise how

    monkeypatch.setattr(process, "COMMANDS", {"train": train_quickly, "evaluate": evaluate_or_not})
    assert process.run(folder) == (0 if how is None else 1)
    assert target.exists() == (how is None)
    if how is not None:
        assert "the AFA tab lists it once Start has evaluated it" in training_view.sentence(jobs.status("pair"))


def test_published_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="nothing"):
        publish(tmp_path / "nothing.safetensors", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_errors_in_one_line():
    assert describe(FusionError("x: y")) == "x: y"
    told = describe(RuntimeError("CUDA out of memory. Tried\nmore"))
    assert told.startswith("RuntimeError: CUDA out of memory. Tried (a smaller batch size")
    assert "smaller batch size" in describe(MemoryError())
    assert describe(KeyError("a")) == "KeyError: 'a'"


def rows(losses: list[float]) -> list[tuple[int, float, float, float]]:
    return [(i + 1, loss, 1e-4, 0.5 * (i + 1)) for i, loss in enumerate(losses)]


def test_sentences():
    running = Status("<a>", "running", "train", steps=100, rows=rows([0.5] * 60))
    assert training_view.sentence(running) == "<a>: step 60 of 100, loss 0.5000, 0:20 left"
    shown = training_view.status_html(running, "<a>")
    assert 'data-running="1"' in shown
    assert "width:60.0%" in shown
    assert "<a>" not in shown
    assert "encoding the pictures" in training_view.sentence(Status("a", "running", "cache", steps=5))
    other = training_view.status_html(Status("a", "stopped", "cache", steps=5), "b")
    assert 'data-running="1"' in other
    assert "b is being trained" in other
    assert "Start goes on with what is done" in other


def test_the_curve_of_losses():
    assert training_view.loss_svg(rows([0.5])) == ""
    for count in (2, 37, 5000):
        svg = training_view.loss_svg(rows([1 + (i % 2) for i in range(count)]))
        found = re.findall(r'points="([^"]*)"', svg)
        lines = [[tuple(map(float, point.split(","))) for point in line.split()] for line in found]
        assert len(lines) == 2
        assert all(2 <= len(line) <= training_view.POINTS + 2 for line in lines)
        assert all(0 <= x <= training_view.WIDTH and 0 <= y <= training_view.HEIGHT for line in lines for x, y in line)
        assert f">{count}</text>" in svg
    ends = [y for _, y in lines[1][WINDOW // 10 :]]
    assert max(ends) - min(ends) < 2  # the mean is smooth
    assert training_view.loss_svg(rows([0.5, float("nan"), 0.4]))


def test_a_zero_loss_is_drawn():
    assert "nan" not in training_view.loss_svg(rows([0.0, 0.0, 0.0]))
