"""Runs of benchmarks that are kept, so that an interrupted benchmark resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lib_fusion.files import write_whole


def file_name(text: str) -> str:
    """A run's name as a file's, on every system."""
    return "".join(c if c.isalnum() or c in "-.+" else "_" for c in text)


def load_or_make(path: Path, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, np.ndarray]:
    """Arrays by name from a .npz file, which is made and written where it is not there yet."""
    if not path.exists():
        values = make()
        write_whole(path, lambda partial: np.savez_compressed(partial, **values), path.with_suffix(".partial.npz"))
    return np.load(path)
