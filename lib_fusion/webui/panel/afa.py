"""The tab *AFA*: the aggregator files, and what the chosen one is for."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import gradio as gr

# Modules, not names from them: a UI reload creates the host's UI classes again.
from modules import ui_common

from lib_fusion.errors import FusionError
from lib_fusion.requests import infotext
from lib_fusion.requests.loras import change_loras
from lib_fusion.requests.refusals import in_panels_words
from lib_fusion.requests.settings import MAX_EXPERTS
from lib_fusion.webui.host import adapter
from lib_fusion.webui.models import aggregators
from lib_fusion.webui.panel.controls import AT_ONCE, shown_with
from lib_fusion.webui.words import translate

AFA_TOLD = ("Not in use: the method is another one. Choosing an aggregator here chooses AFA, too, as does the method "
            "in the Blend tab.")  # fmt: skip
AFA_HINT = ("Where objects come out coarse, the noisy early steps have spoilt them: take the preset 'AFA without "
            "coarse parts: average first'.")  # fmt: skip


def build_afa(place: Callable[..., None], controls: dict[str, list[Any]], elem_id: Callable[[str], str]) -> None:
    """The aggregator files, and what the chosen one is for. Choosing one also chooses method, experts, their LoRAs."""
    with gr.Row(elem_classes=["denoiser-fusion-row"]):
        place("afa_aggregator")
        ui_common.create_refresh_button(
            controls["afa_aggregator"][0], lambda: None,
            lambda: {"choices": ["", *aggregators.list_aggregators()]}, elem_id("afa_refresh"),
        )  # fmt: skip
    with gr.Row():
        place("afa_maps", "afa_force")
    gr.HTML(AFA_TOLD, elem_id=elem_id("afa_unused"),
            elem_classes=["denoiser-fusion-told", *shown_with("method", "SNB", "Average")])  # fmt: skip
    gr.HTML(AFA_HINT, elem_id=elem_id("afa_hint"),
            elem_classes=["denoiser-fusion-told", *shown_with("method", "AFA")])  # fmt: skip
    told = gr.HTML(elem_id=elem_id("afa_told"), elem_classes=["denoiser-fusion-told"])
    if adapter.training():
        gr.HTML(adapter.training(), elem_id=elem_id("afa_training"), elem_classes=["denoiser-fusion-told"])
    (file,), (method,) = controls["afa_aggregator"], controls["method"]
    chosen = {element: controls[element][0] for key in ("checkpoint", "prompt")
              for element in (f"expert{i + 1}_{key}" for i in range(MAX_EXPERTS))}  # fmt: skip
    prompts = [control for element, control in chosen.items() if element.endswith("prompt")]

    def on_choice(name: str, *prompts: str) -> list[Any]:
        try:
            implied = aggregators.implied_by(name)
            for i, prompt in enumerate(prompts):
                key, checkpoint = f"expert{i + 1}_prompt", implied[f"expert{i + 1}_checkpoint"]
                is_used = checkpoint not in infotext.NO_CHECKPOINT
                implied[key] = change_loras(prompt, implied.get(key, "")) if is_used else prompt
        except FusionError:
            return [gr.update()] * (1 + len(chosen))
        return [gr.update(value=implied[key]) for key in ("method", *chosen)]

    def on_change(name: str) -> str:
        try:
            return html.escape(translate(aggregators.describe(name))) if name else ""
        except FusionError as error:
            return html.escape(translate(in_panels_words(error)))

    file.input(on_choice, inputs=[file, *prompts], outputs=[method, *chosen.values()], **AT_ONCE)
    file.change(on_change, inputs=[file], outputs=[told], **AT_ONCE)
