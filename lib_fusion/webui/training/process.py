"""The process of a training: ``python -m lib_fusion.webui.training.process JOB_FOLDER``, run by the host's Python.

Runs the job's commands one after the other, writes its progress into state.json, and puts the finished aggregator file
where the panel finds it.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import traceback
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lib_fusion.cli import COMMANDS, build_parser, read_device, run_cache
from lib_fusion.errors import FusionError, is_out_of_memory
from lib_fusion.files import read_text, write_whole
from lib_fusion.training.jobs import JOB, STATE, Job, write_json

#: What may help where memory does not suffice.
MEMORY_HINT = "a smaller batch size or more accumulate, bfloat16, or activation checkpointing may help"


def run(folder: Path) -> int:
    """All commands of a job; 0 where it came to its end. An error is written into its state, and is its last word."""
    job = Job(**json.loads(read_text(folder / JOB))["job"])
    sys.path.extend(job.paths)
    stage, trained = "", None

    @lru_cache(maxsize=1)
    def load_encoders(models: Sequence[str], device: str) -> Any:
        from lib_fusion.webui.training.host_encoders import HostEncoders

        return HostEncoders(models, job.configs, read_device(device))

    def make_encoders(args: argparse.Namespace) -> Any:
        return load_encoders(tuple(args.model), args.device)

    try:
        for command in job.commands:
            args = build_parser().parse_args(command)
            stage = "cache the held-out pictures" if stage and args.command == "cache" else args.command
            print(f"== {stage}", flush=True)
            write_json(folder / STATE, {"stage": stage})
            if args.command == "cache":
                run_cache(args, make_encoders)
            else:
                load_encoders.cache_clear()
                free_memory()
                COMMANDS[args.command](args)
            if args.command == "train":
                trained = Path(args.out)
        if trained is not None:  # once it is evaluated: what was stopped before is not ready
            publish(trained, Path(job.target))
        write_json(folder / STATE, {"stage": stage, "phase": "finished"})
        return 0
    except Exception as error:
        if not isinstance(error, FusionError):
            traceback.print_exc()
        problem = describe(error)
        print(problem, flush=True)
        write_json(folder / STATE, {"stage": stage, "phase": "failed", "error": problem})
        return 1


def publish(source: Path, target: Path) -> None:
    """Puts a copy where the panel finds it; never half of one."""
    write_whole(target, lambda partial: shutil.copyfile(source, partial))


def describe(error: Exception) -> str:
    """One line for a person."""
    if isinstance(error, FusionError):
        return str(error)
    first = (str(error).splitlines() or [""])[0]
    hint = f" ({MEMORY_HINT})" if is_out_of_memory(error) else ""
    return f"{type(error).__name__}: {first}{hint}"


def free_memory() -> None:
    """So that what one command leaves takes nothing from the next."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(run(Path(sys.argv[1])))
