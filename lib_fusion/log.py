"""The extension's log: the standard ``logging`` under one name. Importing it shows nothing; a host calls ``start``."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lib_fusion import __version__

if TYPE_CHECKING:
    from torch import nn

NAME = "denoiser_fusion"
#: A line on the console, where the host has no format of its own.
FORMAT = "%(levelname)s [%(name)s] %(message)s"
ROOT = Path(__file__).resolve().parents[1]

logger = logging.getLogger(NAME)
logger.addHandler(logging.NullHandler())  # without a host, logging would print warnings by itself


@cache  # a reloaded UI calls it again in the same process
def start(host: str, level: str | None = None) -> None:
    """Sets the log up and writes its first line, once in a process.

    ``level``: the level that the host was started with; it has set up the root logger then, and its choice stands.
    Where it was not, lines from INFO on go to the console: by the root's handlers, if there are any, else by our own.
    """
    if not level:
        logger.setLevel(logging.INFO)
        if not logging.root.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter(FORMAT))
            logger.addHandler(handler)
            logger.propagate = False  # else each line would come twice once somebody sets up the root
    commit = commit_of(ROOT)
    logger.info("Denoiser Fusion %s%s in %s", __version__, f" (commit {commit[:8]})" if commit else "", host)


def log_loaded(what: str, module: nn.Module, device: object = None) -> None:
    """Says that a model was loaded, with its size, and on which device it is, or will be."""
    parameters = list(module.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    place = device or (parameters[0].device if parameters else "no device")
    logger.info("loaded %s: %.1f MiB on %s", what, size / 2**20, place)


def commit_of(folder: Path) -> str | None:
    """The commit that a folder has checked out, or None where it is no git repository (or one of an unknown format)."""
    try:
        git = _git_folder(folder)
        head = (git / "HEAD").read_text("utf-8").strip()
        if not head.startswith("ref: "):
            return _hash(head)
        ref = head.removeprefix("ref: ")
        common = git / "commondir"  # a worktree keeps its branches in the repository that it belongs to
        shared = git / common.read_text("utf-8").strip() if common.is_file() else git
        if (shared / ref).is_file():
            return _hash((shared / ref).read_text("utf-8").strip())
        packed = (line.split(" ") for line in (shared / "packed-refs").read_text("utf-8").splitlines())
        return next((_hash(line[0]) for line in packed if line[1:] == [ref]), None)
    except (OSError, ValueError):
        return None


def _git_folder(folder: Path) -> Path:
    """A checkout's ``.git``, which in worktrees and submodules is a file that names the real one."""
    git = folder / ".git"
    return folder / git.read_text("utf-8").strip().removeprefix("gitdir: ") if git.is_file() else git


def _hash(text: str) -> str | None:
    return text if len(text) >= 40 and set(text) <= set("0123456789abcdef") else None
