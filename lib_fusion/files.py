"""Files that other processes read meanwhile: written whole or not at all, and never given up at the first refusal.

Windows refuses to replace, remove or open a file while another process has it open: a page that reads a training's
state, a virus scanner. That passes within milliseconds, so it is tried again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

#: How often a refused file is tried, and the seconds between two tries: half a second in all.
TRIES, PAUSE = 11, 0.05


def retry(act: Callable[[], T]) -> T:
    """The result of ``act``, called again while it raises PermissionError; the last one is raised."""
    for _ in range(TRIES - 1):
        try:
            return act()
        except PermissionError:
            time.sleep(PAUSE)
    return act()


def write_whole(path: Path, write: Callable[[Path], Any], partial: Path | None = None) -> None:
    """Lets ``write`` make a file under another name (``partial``; default: NAME.partial), and puts it into place.

    Where that fails, the error is raised, ``path`` is what it was before, and nothing else is left.
    """
    partial = partial or path.with_name(f"{path.name}.partial")
    try:
        write(partial)
        retry(lambda: partial.replace(path))
    except BaseException:
        with contextlib.suppress(OSError):
            retry(lambda: partial.unlink(missing_ok=True))
        raise


def file_version(path: str | Path) -> tuple[int, int]:
    """Another one for a file that was written since: its time alone stays where a copy keeps it."""
    found = Path(path).stat()
    return found.st_mtime_ns, found.st_size


def read_text(path: Path) -> str:
    """A text file of ours, which another process may be replacing."""
    return retry(lambda: path.read_text("utf-8"))
