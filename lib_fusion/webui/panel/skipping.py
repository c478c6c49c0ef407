"""The tab *Skipping*: a policy, and amounts of it in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from lib_fusion.requests.settings import SKIP_PRESETS
from lib_fusion.webui.panel.controls import AT_ONCE, shown_with

#: The amounts of skipping, for people.
SKIP_WORDS = {
    "Faithful": "Hardly any difference to be seen; up to half of the U-Net's work is spared",
    "Balanced": "Small differences; a little more is spared, above all with many steps",
    "Fast": "Some pictures change a little; the most is spared",
}
SKIP_TOLD = "More steps leave more to skip. The picture's infotext tells what was."


def build_skipping(place: Callable[..., None], controls: dict[str, list[Any]], elem_id: Callable[[str], str]) -> None:
    """Which policy, three amounts of it in words, and the controls that they set."""
    with gr.Row():
        place("skipping", "skip_passes")
    with gr.Row(elem_classes=["denoiser-fusion-buttons"]):
        buttons = {
            name: gr.Button(name, size="sm", elem_id=elem_id(f"skip_{name.lower()}"), tooltip=SKIP_WORDS[name],
                            elem_classes=["denoiser-fusion-amount", f"denoiser-fusion-amount:{amount_of(name)}"])
            for name in SKIP_PRESETS
        }  # fmt: skip
    with gr.Row(elem_classes=shown_with("skipping", "Forecast", "Paper")):
        place("skip_tolerance", "skip_threshold", "skip_max")
    with gr.Row(elem_classes=shown_with("skipping", "Forecast")):
        place("skip_warmup", "skip_correct")
    gr.HTML(SKIP_TOLD, elem_id=elem_id("skip_told"), elem_classes=["denoiser-fusion-told"])
    targets = [controls[key][0] for key in ("skipping", "skip_tolerance", "skip_max")]
    for name, button in buttons.items():
        values = ["Forecast", SKIP_PRESETS[name]["skip_tolerance"], SKIP_PRESETS[name]["skip_max"]]
        button.click(lambda values=values: values, outputs=targets, **AT_ONCE)


def amount_of(name: str) -> str:
    """An amount of skipping as the page compares it with the controls: the tolerance, and the most skips in a row."""
    return f"{SKIP_PRESETS[name]['skip_tolerance']:g}:{SKIP_PRESETS[name]['skip_max']}"
