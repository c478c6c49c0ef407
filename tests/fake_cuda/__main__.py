"""Runs a Python program on the stand-in: ``python -m tests.fake_cuda -m MODULE ..`` or ``python PATH SCRIPT ..``.

Environment: ``FAKE_CUDA_NAME`` and ``FAKE_CUDA_CAPABILITY`` ("7,5") are the card's, ``FAKE_CUDA_LIMIT`` its bytes.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

REPOSITORY = str(Path(__file__).resolve().parents[2])


def main() -> None:
    if REPOSITORY not in sys.path:
        sys.path.append(REPOSITORY)
    from tests import fake_cuda

    major, minor = (int(part) for part in os.environ.get("FAKE_CUDA_CAPABILITY", "8,6").split(","))
    with fake_cuda.installed(os.environ.get("FAKE_CUDA_NAME", "Fake GPU"), (major, minor)):
        fake_cuda.set_limit(int(os.environ.get("FAKE_CUDA_LIMIT", "0")))
        is_module, *program = sys.argv[1:] if sys.argv[1] == "-m" else ["", *sys.argv[1:]]
        sys.argv = program
        if is_module:
            runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(program[0]).resolve().parent)
            runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
