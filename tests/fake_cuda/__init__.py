"""A CUDA device for machines without one: PyTorch's own ``cuda:0``, computed by the CPU. ``fake_cuda.cpp`` says how.

It shows what a device refuses (tensors of two devices or dtypes), what makes the host wait for it, and how much memory
is used. It can't show time, the kernels' own rounding, streams, pinned memory, CUDA's random numbers, or two devices.

    with fake_cuda.installed(), fake_cuda.recording() as found:
        model.cuda()(x.cuda())
    print(found.waits(), fake_cuda.memory())

Tests take the fixture ``cuda``. ``python -m tests.fake_cuda -m MODULE ARGUMENTS`` runs a program on it.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
#: The memory that the device claims to have where no limit is set.
TOTAL = 24 << 30
#: Kinds of a Recording's events that make the host wait until a real device has done all it was given.
WAITS = ("item", "d2h", "h2d", "index", "wait", "synchronize")

_native: ModuleType | None = None
_recording: Recording | None = None
_limit = 0


def obstacle() -> str:
    """Why the device can't be made here, as one sentence; empty where it can."""
    if torch.cuda.is_available() and _native is None:
        return "the stand-in for a CUDA device is for machines without one, and this one has one"
    compiler = os.environ.get("CXX", "c++")
    needs = {
        f"a C++ compiler ({compiler})": shutil.which(compiler),
        "ninja": shutil.which("ninja"),
        "Python's headers": (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
    }
    missing = [name for name, found in needs.items() if not found]
    return f"the stand-in for a CUDA device needs {' and '.join(missing)} to be built" if missing else ""


def build() -> ModuleType:
    """The C++ part, built the first time (about half a minute) into ``FAKE_CUDA_BUILD`` or ``outputs/fake-cuda``."""
    global _native
    if _native is None:
        import fcntl

        from torch.utils.cpp_extension import load

        root = Path(os.environ.get("FAKE_CUDA_BUILD") or REPOSITORY / "outputs/fake-cuda")
        folder = root / f"torch-{torch.__version__}-python-{sys.version_info.major}.{sys.version_info.minor}"
        folder.mkdir(parents=True, exist_ok=True)
        source = str(Path(__file__).with_name("fake_cuda.cpp"))
        with (folder / "one-at-a-time").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)  # of a build that was killed; torch would wait for it forever
            _native = load("fake_cuda_native", [source], build_directory=str(folder), extra_cflags=["-O1", "-w"])
    return _native


@contextmanager
def installed(name: str = "Fake GPU", capability: tuple[int, int] = (8, 6)) -> Iterator[None]:
    """Within, there is a device ``cuda:0``. Afterwards ``torch.cuda`` is what it was, and tensors on it remain usable.

    Autograd must not have started before the first time in a process: it has no thread for a device that comes later.
    """
    native = build()
    native.install()
    with (
        mock.patch.multiple(torch.cuda, create=True, **_answers(name, capability)),
        mock.patch.object(torch.cuda.memory, "mem_get_info", _mem_get_info),
        mock.patch.object(torch.cuda.memory, "memory_stats", _memory_stats),
        torch.backends.cudnn.flags(enabled=False),
    ):
        try:
            yield
        finally:
            set_limit(0)


def set_limit(size: int) -> None:
    """The device's memory in bytes, 0 for no limit. What needs more raises ``torch.cuda.OutOfMemoryError``."""
    global _limit
    _limit = size
    build().set_limit(size)


def memory() -> tuple[int, int]:
    """Bytes in use on the device now, and the most since ``reset_peak``."""
    return build().memory()


def reset_peak() -> None:
    build().reset_peak()


@dataclass
class Recording:
    """The events on the device: (kind, operator, place in the code) -> how often.

    Kinds: ``item`` (a number was read), ``d2h`` and ``h2d`` (copies between the memories; with `` async`` those that
    do not block), ``index`` (by a mask, or by indices on the CPU), ``wait`` (the size of a result was read),
    ``synchronize``, ``wide`` (a tensor of float64 or complex numbers), ``mixed`` (half precision written in place by
    float32), ``op`` (any operator, where asked for).
    """

    roots: tuple[str, ...]
    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def take(self, kind: str, op: str, _size: int) -> None:
        self.events[kind, op, "" if kind == "op" else self._place()] += 1

    def of(self, *kinds: str) -> list[tuple[int, str, str, str]]:
        """(times, kind, operator, place) of these kinds, the most frequent first."""
        return sorted(((n, *key) for key, n in self.events.items() if key[0] in kinds), reverse=True)

    def waits(self) -> list[tuple[int, str, str, str]]:
        return self.of(*WAITS)

    @property
    def num_waits(self) -> int:
        return sum(n for n, *_ in self.waits())

    @property
    def num_operators(self) -> int:
        return sum(n for n, *_ in self.of("op"))

    def _place(self) -> str:
        """The innermost frame in a file under one of ``roots``, else the innermost, as ``file:line function``."""
        innermost = frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            for root in self.roots:
                if (at := name.find(root)) >= 0:
                    return f"{name[at:]}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return f"{innermost.f_code.co_filename}:{innermost.f_lineno} {innermost.f_code.co_name}"


def begin_recording(roots: tuple[str, ...] = ("lib_fusion/", "modules/"), operators: bool = False) -> Recording:
    """Records until ``end_recording``, one recording at a time. ``operators``: every operator is an event."""
    global _recording
    _recording = Recording(roots)
    build().set_hook(_recording.take, operators)
    return _recording


def end_recording() -> None:
    global _recording
    build().set_hook(None)
    _recording = None


@contextmanager
def recording(roots: tuple[str, ...] = ("lib_fusion/", "modules/"), operators: bool = False) -> Iterator[Recording]:
    """Records within."""
    try:
        yield begin_recording(roots, operators)
    finally:
        end_recording()


def _synchronize(*_: Any) -> None:
    if _recording is not None:
        _recording.take("synchronize", "torch.cuda.synchronize", 0)


def _total() -> int:
    return _limit or TOTAL


def _mem_get_info(*_: Any) -> tuple[int, int]:
    return _total() - memory()[0], _total()


def _memory_stats(*_: Any) -> dict[str, int]:
    now, peak = memory()
    kinds = [f"{kind}_bytes.all" for kind in ("active", "reserved", "allocated")]
    return {f"{kind}.current": now for kind in kinds} | {f"{kind}.peak": peak for kind in kinds}


def _answers(name: str, capability: tuple[int, int]) -> dict[str, Any]:
    """What ``torch.cuda`` says of the device, by the names of its functions."""
    major, minor = capability

    def properties(*_: Any) -> SimpleNamespace:
        return SimpleNamespace(name=name, major=major, minor=minor, total_memory=_total(), multi_processor_count=46)

    constants = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_name": name,
        "get_device_capability": capability, "is_bf16_supported": True, "_is_in_bad_fork": False,
        "is_current_stream_capturing": False, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "get_rng_state_all": [], "get_arch_list": [f"sm_{major}{minor}"],
    }  # fmt: skip
    nothing = ("_lazy_init", "init", "set_device", "empty_cache", "ipc_collect", "manual_seed", "manual_seed_all",
               "set_rng_state_all")  # fmt: skip
    return {
        **{key: lambda *_, value=value, **__: value for key, value in constants.items()},
        **{key: lambda *_, **__: None for key in nothing},
        "get_device_properties": properties,
        "synchronize": _synchronize,
        "mem_get_info": _mem_get_info,
        "memory_stats": _memory_stats,
        "memory_allocated": lambda *_: memory()[0],
        "memory_reserved": lambda *_: memory()[0],
        "max_memory_allocated": lambda *_: memory()[1],
        "reset_peak_memory_stats": lambda *_: reset_peak(),
    }
