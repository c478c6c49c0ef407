"""The log: one line at a host's start, nothing on the console without a host, and what models' loading says."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from lib_fusion import __version__, log
from lib_fusion.errors import FusionError
from tests.webui_fake import fakes

COMMIT = "07ac5c8f" + "0" * 32
OTHER = "f" * 40


def console(*statements: str, commit: str | None = None) -> str:
    """What these statements show on the console of a new process; ``commit``: that of the checkout."""
    code = ["import logging", "from lib_fusion import log", f"log.commit_of = lambda folder: {commit!r}", *statements]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=True, cwd=log.ROOT
    )
    return done.stdout + done.stderr


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The records of our logger."""
    monkeypatch.setattr(log.logger, "propagate", True)
    caplog.set_level(logging.DEBUG, log.NAME)
    return caplog


def git(folder: Path, head: str, **files: str) -> Path:
    """A fake ``.git``; ``files`` by their names with ``__`` for a slash and a dash for ``_``."""
    folder.mkdir(parents=True)
    (folder / "HEAD").write_text(f"{head}\n")
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder.parent


def test_first_line_once() -> None:
    twice = ["log.start('WebUI v1.10.1')"] * 2  # the UI was reloaded
    expected = f"INFO [denoiser_fusion] Denoiser Fusion {__version__} (commit 07ac5c8f) in WebUI v1.10.1\n"
    assert console(*twice, commit=COMMIT) == expected


def test_first_line_without_a_commit() -> None:
    assert console("log.start('WebUI v1.10.1')").endswith(f"Denoiser Fusion {__version__} in WebUI v1.10.1\n")


@pytest.mark.parametrize(("level", "shown"), [("INFO", 1), ("WARNING", 0)])
def test_level_of_the_host(level: str, shown: int) -> None:
    """The host's handler prints each line, and ours none; the level that a person has chosen stands."""
    assert console(f"logging.basicConfig(level={level!r})", f"log.start('WebUI', {level!r})").count("WebUI") == shown


def test_root_set_up_by_another_extension() -> None:
    """At its default level, whether before or after ours: each line comes once."""
    basic, start, line = "logging.basicConfig()", "log.start('WebUI')", "log.logger.info('a line')"
    for order in ([basic, start, line], [start, basic, line]):
        shown = console(*order)
        assert (shown.count("WebUI"), shown.count("a line")) == (1, 1)


def test_quiet_without_a_host() -> None:
    assert console("log.logger.warning('a warning')", "log.logger.info('a line')") == ""


def test_commit_of_a_branch(tmp_path: Path) -> None:
    assert log.commit_of(git(tmp_path / ".git", "ref: refs/heads/main", refs__heads__main=f"{COMMIT}\n")) == COMMIT


def test_commit_of_packed_refs(tmp_path: Path) -> None:
    packed = f"# pack-refs with: peeled\n{OTHER} refs/heads/main2\n{COMMIT} refs/heads/main\n^{OTHER}\n"
    assert log.commit_of(git(tmp_path / ".git", "ref: refs/heads/main", packed_refs=packed)) == COMMIT


def test_commit_of_a_detached_head(tmp_path: Path) -> None:
    assert log.commit_of(git(tmp_path / ".git", COMMIT)) == COMMIT


def test_commit_of_a_worktree(tmp_path: Path) -> None:
    git(tmp_path / "main/.git", "ref: refs/heads/main", refs__heads__side=COMMIT)
    git(tmp_path / "main/.git/worktrees/side", "ref: refs/heads/side", commondir="../..\n")
    tree = tmp_path / "side"
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {tmp_path}/main/.git/worktrees/side\n")
    assert log.commit_of(tree) == COMMIT


@pytest.mark.parametrize("head", ["ref: refs/heads/unborn", "no hash", ""])
def test_no_commit(tmp_path: Path, head: str) -> None:
    assert log.commit_of(tmp_path) is None  # a copy without .git, perhaps inside another repository
    assert log.commit_of(git(tmp_path / ".git", head)) is None


def test_loading_says_size_and_device(lines: pytest.LogCaptureFixture) -> None:
    layer = nn.Linear(1024, 256, bias=False)
    log.log_loaded("expert a", layer)
    log.log_loaded("expert a", layer, "cuda")
    assert lines.messages == ["loaded expert a: 1.0 MiB on cpu", "loaded expert a: 1.0 MiB on cuda"]


def test_callback_error_has_a_traceback(monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture) -> None:
    fakes.install(monkeypatch)
    from lib_fusion.webui.runtime import Runtime

    failures: list[Exception] = []

    def begin_step(params: object) -> None:
        raise FusionError("no such row")

    runtime = Runtime()
    runtime.current = SimpleNamespace(begin_step=begin_step, fail=failures.append, detach=lambda: None)
    runtime.begin_step(None)
    record = lines.records[-1]
    assert (record.levelno, str(record.exc_info[1])) == (logging.DEBUG, "no such row")
    assert failures == [record.exc_info[1]]
    lines.clear()
    runtime.drop_leftovers()
    assert [r.levelname for r in lines.records] == ["WARNING"]
    lines.clear()
    runtime.drop_leftovers()
    assert not lines.records
