"""An extension for the tests' WebUI on the stand-in for a CUDA device: its waits, its memory, and what Python keeps."""

from __future__ import annotations

import gc
from typing import Any

import torch
from modules import script_callbacks

from tests import fake_cuda

_recording: Any = None


def record() -> dict:
    """Records what makes the host wait, until ``recorded``."""
    global _recording
    _recording = fake_cuda.begin_recording()
    return {}


def recorded() -> list:
    """[times, kind, operator, place] of each wait since ``record``."""
    fake_cuda.end_recording()
    return [list(event) for event in _recording.waits()]


def memory(limit: int = -1, reset: bool = False) -> dict:
    """Bytes on the device now and the most since the last reset. ``limit``: the device's memory from now on."""
    now, peak = fake_cuda.memory()
    if reset:
        fake_cuda.reset_peak()
    if limit >= 0:
        fake_cuda.set_limit(limit)
    return {"now": now, "peak": peak}


def free(collect: bool = False) -> dict:
    """As the panel's button; ``collect``: Python then looks for cycles, too."""
    from lib_fusion.webui.runtime import runtime

    runtime.free()
    if collect:
        gc.collect()
    return {"now": fake_cuda.memory()[0]}


def dtypes() -> dict:
    """Which dtypes the base's U-Net has on the device, and whether that is there."""
    from modules import devices, shared

    unet = shared.sd_model.model.diffusion_model
    return {"device": str(devices.device), "unet": sorted({str(p.dtype)[6:] for p in unet.parameters()}),
            "cuda": torch.cuda.get_device_name()}  # fmt: skip


def add_routes(_: Any, app: Any) -> None:
    for handler in (record, recorded, memory, free, dtypes):
        app.add_api_route(f"/device/{handler.__name__}", handler, methods=["GET"])


script_callbacks.on_app_started(add_routes)
