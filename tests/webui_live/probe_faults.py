"""Faults on request, in a host extension of the tests alone: one function of ours, or of the host, fails once.

Also tells what an attacker or a leak would change: threads, memory, files that our code opens to write, pickles.
"""

import ctypes
import gc
import importlib
import itertools
import re
import sys
import threading
import traceback
from pathlib import Path

import psutil
import torch
from modules import script_callbacks

injected = {}
watched = []
watching = []


def make_error(kind):
    """What a machine without memory, or with a full disk, raises; or a bug."""
    return {
        "bug": lambda: RuntimeError("the probe has broken this"),
        "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.62 GiB"),
        "cpu": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        "memory": MemoryError,
        "disk": lambda: OSError(28, "No space left on device"),
    }[kind]()


def inject(target: str, kind: str = "bug", call: int = 1, file: str = ""):
    """At its ``call``-th call ``module:attribute.attribute`` fails, and is itself again.

    ``kind``: an error to raise; ``delete``: ``file`` is gone just before; ``nan``, ``inf``: one value of what
    is returned (a tensor, or the first of a list) is that.
    """
    restore()
    module, _, names = target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = names.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    had = name in vars(owner)
    injected.update(owner=owner, name=name, original=original, had=had, fired=False)
    calls = itertools.count(1)

    def broken(*args, **kwargs):
        if next(calls) != call or "owner" not in injected:
            return original(*args, **kwargs)
        injected["fired"] = True
        put_back()
        if kind == "delete":
            Path(file).unlink()
        elif kind not in ("nan", "inf"):
            raise make_error(kind)
        result = original(*args, **kwargs)
        if kind in ("nan", "inf"):
            tensor = result[0] if isinstance(result, (list, tuple)) else result
            tensor[(-1,) * tensor.dim()] = float(kind)
        return result

    setattr(owner, name, broken)
    return {}


def put_back():
    owner = injected.pop("owner", None)
    if owner is None:
        return
    if injected["had"]:
        setattr(owner, injected["name"], injected["original"])
    else:
        delattr(owner, injected["name"])


def restore():
    """Everything is itself again; tells whether the fault has happened."""
    put_back()
    fired = injected.get("fired", False)
    injected.clear()
    return {"fired": fired}


def free():
    """As the panel's button: the next generation loads everything anew."""
    from lib_fusion.webui.runtime import runtime

    runtime.free()
    return {}


def resources():
    """Threads that are in our code, those that neither server nor progress bars keep, and resident memory in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    frames = sys._current_frames().values()
    return {
        "ours": sum(in_our_code(traceback.extract_stack(frame)) for frame in frames),
        "threads": sorted(t.name for t in threading.enumerate() if not re.search("worker|tqdm", t.name)),
        "rss": psutil.Process().memory_info().rss,
    }


def in_our_code(stack):
    return any("lib_fusion" in frame.filename for frame in stack)


def watch(on: bool, reads: bool = False):
    """While on, notes what our code (or the host, called by it) writes, deletes, starts, unpickles; or also reads."""
    if not watching:
        sys.addaudithook(on_event)
    watching[:] = [on, reads]
    found = list(watched)
    if on:
        watched.clear()
    return found


def on_event(event, args):
    if not watching or not watching[0]:
        return
    if event == "open":
        path, mode, flags = args
        writes = any(letter in (mode or "") for letter in "wax+") or (flags & 3 and mode is None)
        if not (writes or watching[1]) or not isinstance(path, (str, bytes)):
            return
    elif event not in ("pickle.find_class", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
                       "os.truncate", "os.chmod", "subprocess.Popen", "os.system", "socket.connect"):  # fmt: skip
        return
    frame = sys._getframe(1)
    while frame is not None:
        if "/lib_fusion/" in frame.f_code.co_filename:
            watched.append([event, *(str(arg) for arg in args[:2])])
            return
        frame = frame.f_back


def add_routes(_, app):
    for handler in (inject, restore, free, resources, watch):
        app.add_api_route(f"/probe/{handler.__name__}", handler, methods=["GET"])


script_callbacks.on_app_started(add_routes)
