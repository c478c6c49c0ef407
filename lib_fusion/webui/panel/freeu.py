"""The tab *FreeU*: published factors, or one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from lib_fusion.requests.settings import FREEU_AUTO, FREEU_PUBLISHED, FREEU_PUBLISHED_ROWS, FREEU_STAGES
from lib_fusion.webui.panel.controls import AT_ONCE, FREEU_ON, shown_with
from lib_fusion.webui.words import translate


def build_freeu(place: Callable[..., None], controls: dict[str, list[Any]], elem_id: Callable[[str], str]) -> None:
    """The choice of factors; a line with the published ones, or the controls for one's own, a row for each stage."""
    with gr.Row():
        place("freeu", "freeu_version")
    told = gr.HTML(elem_id=elem_id("freeu_told"), elem_classes=["denoiser-fusion-told"])
    with gr.Column(elem_id=elem_id("freeu_custom"), elem_classes=shown_with("freeu", "Custom")):
        for stage in FREEU_STAGES:
            with gr.Row():
                place(f"freeu_b{stage}", f"freeu_s{stage}")
        with gr.Accordion("Channels and frequencies", open=False, elem_id=elem_id("freeu_more")):
            for stage in FREEU_STAGES:
                with gr.Row(elem_classes=["denoiser-fusion-narrow"]):
                    place(*(f"freeu_{name}{stage}" for name in ("offset", "width", "cutoff", "high")))
    with gr.Row(elem_classes=shown_with("freeu", *FREEU_ON)):
        place("freeu_start", "freeu_stop", "freeu_smooth")
    place("freeu_models")
    (preset,), (version,) = controls["freeu"], controls["freeu_version"]
    published = [controls[key][0] for key in FREEU_PUBLISHED_ROWS]

    def on_change(name: str, number: str) -> list[Any]:
        """Published factors also go into the hidden controls, so that one's own begin with them."""
        factors = FREEU_PUBLISHED[name][number] if name in FREEU_PUBLISHED else [gr.update()] * len(published)
        return [describe_freeu(name, number), *factors]

    for control in (preset, version):
        control.change(on_change, inputs=[preset, version], outputs=[told, *published], **AT_ONCE)


def describe_freeu(name: str, version: str) -> str:
    """The published factors that a choice stands for, for people."""
    if name == "Auto":
        names = ", ".join(dict.fromkeys(FREEU_AUTO.values()))
        return translate(f"The published factors for the kind of the loaded model: {names}.")
    if name == "Custom":
        return translate("Factors of your own; at 1 a factor changes nothing.")
    if name not in FREEU_PUBLISHED:
        return ""
    factors = zip(FREEU_PUBLISHED_ROWS, FREEU_PUBLISHED[name][version])
    return ", ".join(f"{key.removeprefix('freeu_')} {factor:g}" for key, factor in factors)
