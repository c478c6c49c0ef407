"""AUTOMATIC1111's WebUI as a host: what the rooms that know no host ask of it (``webui/host.py``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from modules import script_callbacks

from lib_fusion.requests.settings import FusionSettings
from lib_fusion.webui.a1111 import launch
from lib_fusion.webui.a1111.models import Models
from lib_fusion.webui.models.masks import Masks
from lib_fusion.webui.sampling.launch import SamplingPass

NAME = "WebUI"
#: Whether the setting *Where an expert waits* acts here.
HAS_PLACE = True

make_models = Models


def register(runtime: Any) -> None:
    """Puts on the callbacks that say where a step begins and where its rows are there."""
    script_callbacks.on_cfg_denoiser(runtime.begin_step)
    script_callbacks.on_cfg_denoised(runtime.end_step)


def prepare(runtime: Any, p: Any, settings: FusionSettings, masks: Masks) -> Callable[[], SamplingPass]:
    """The pass of this sampler, made when it is launched; errors are raised there."""
    return partial(launch.prepare, runtime.models, p, settings, masks, p.sampler)


def training() -> str:
    """Why nothing can be trained here; empty where it can."""
    return ""
