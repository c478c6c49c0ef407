"""The extension's rows on the WebUI's settings page."""

from __future__ import annotations

from typing import Any

import gradio as gr

# Modules, not names from them: a UI reload creates the host's UI classes again.
from modules import call_queue, shared

from lib_fusion.requests.settings import HOST_OPTIONS
from lib_fusion.webui import options
from lib_fusion.webui.host import adapter
from lib_fusion.webui.runtime import runtime


def add_options() -> None:
    """The settings page: how many experts are kept, and where; what pasting does; the previews."""
    for key, row in HOST_OPTIONS.items():
        if key == "place" and not adapter.HAS_PLACE:
            continue
        component: tuple[Any, Any] = (None, None)
        if row.kind == "int":
            component = (gr.Slider, {"minimum": row.low, "maximum": row.high, "step": row.step})
        elif row.kind == "choice":
            component = (gr.Radio, {"choices": list(row.choices)})
        settle = call_queue.wrap_queued_call(runtime.settle) if key == "place" else None
        option = shared.OptionInfo(row.default, row.label, *component, section=("denoiser_fusion", "Denoiser Fusion"),
                                   onchange=settle)  # fmt: skip
        option.info(row.help)
        if key.startswith("preview_") and row.kind == "bool":  # where the panel begins
            option.needs_reload_ui()
        shared.opts.add_option(options.PREFIX + key, option)
