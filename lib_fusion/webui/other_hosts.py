"""WebUIs that the extension cannot work in: there, a panel with one sentence takes the place of the real one."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import gradio as gr

#: Not the extension's own title, so that the API refuses a request for "Denoiser Fusion", as it does without us.
TITLE = "Denoiser Fusion (unavailable in this WebUI)"
NEEDED = "Denoiser Fusion needs AUTOMATIC1111's stable-diffusion-webui v1.10.1, Forge Neo or Forge"
#: All that register with the host; each imports what it needs of the host's modules.
ROOMS = ("script", "panel.api", "panel.panel", "panel.settings_page", "panel.xyz", "runtime")

logger = logging.getLogger("denoiser_fusion")


def why_not() -> str:
    """Why nothing can be fused in this WebUI, in a sentence for people; empty where it can.

    Every fork of the Forge family has a package ``modules_forge``. Those that can be worked in sample in
    ``backend.sampling``; reForge and Forge Classic in ``ldm_patched``, where our hooks would silently do nothing.
    """
    if is_installed("modules_forge") and (is_installed("ldm_patched") or not is_installed("backend.sampling")):
        return f"{NEEDED}. This WebUI is another fork, which runs its models in another way; nothing is changed here."
    try:
        for room in ROOMS:
            import_module(f"lib_fusion.webui.{room}")
    except ImportError as error:
        logger.info("not available", exc_info=True)
        return f"{NEEDED}. Here it could not be loaded ({error}); nothing is changed."
    return ""


def is_installed(module: str) -> bool:
    """Whether a module could be imported."""
    try:
        return find_spec(module) is not None
    except ImportError:  # of a package that is not there
        return False


def build(reason: str, elem_id: Callable[[str], str]) -> list[Any]:
    """The panel with the sentence; it has no inputs."""
    with gr.Accordion(TITLE, open=False, elem_id=elem_id("other_host")):
        gr.HTML(f"<p>{html.escape(reason)}</p>")
    return []
