"""The tab *Experts*: models, their prompts, and where and when they draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

# Modules, not names from them: a UI reload creates the host's UI classes again.
from modules import sd_models, ui_common

from lib_fusion.requests.settings import AUTO, INPAINT, MAX_EXPERTS, PAINTED, SAME_AS_BASE
from lib_fusion.webui.panel.canvas import make_canvas
from lib_fusion.webui.panel.controls import AT_ONCE, list_choices, shown_with

LORAS_HINT = ("Two experts have LoRAs and the picture's prompt has none. With the mask decided by 'divergence' the "
              "base without a LoRA is only what they are compared with, and draws nothing; with 'own' it competes with "
              "them and blurs what they draw.")  # fmt: skip
#: The places that have a button, in words.
PLACE_BUTTONS = {"Auto": AUTO, "Left half": "columns 1:1 1", "Right half": "columns 1:1 2", "Painted": PAINTED,
                 "Top half": "rows 1:1 1", "Bottom half": "rows 1:1 2"}  # fmt: skip
USE_WORDS = "Paint on the picture that the gallery shows, or on a grey one where it shows none"


def build_experts(
    place: Callable[..., None], controls: dict[str, list[Any]], elem_id: Callable[[str], str]
) -> list[Any]:
    """The first expert in full view, the others folded away. Returned are the canvases for their masks."""
    canvases = []
    for i in range(MAX_EXPERTS):
        name = f"expert{i + 1}"
        with gr.Accordion(f"Expert {i + 1}", open=i == 0, elem_id=elem_id(name)):
            with gr.Row(elem_classes=["denoiser-fusion-row"]):
                place(f"{name}_checkpoint")
                ui_common.create_refresh_button(
                    controls[f"{name}_checkpoint"][0], sd_models.list_models,
                    lambda: {"choices": list_choices()}, elem_id(f"{name}_refresh"),
                )  # fmt: skip
                place(f"{name}_weight")
            # Pressed by the page, where a LoRA's card goes to an expert without a checkpoint.
            same = gr.Button(SAME_AS_BASE, elem_id=elem_id(f"{name}_same"), elem_classes=["denoiser-fusion-hidden"])
            same.click(None, outputs=controls[f"{name}_checkpoint"], _js=f"() => ['{SAME_AS_BASE}']", **AT_ONCE)
            with gr.Row():
                place(f"{name}_prompt", f"{name}_negative_prompt")
            with gr.Row(elem_classes=["denoiser-fusion-row"]):
                place(f"{name}_text_encoder", f"{name}_loras")
            with gr.Accordion("Place and timesteps", open=False, elem_id=elem_id(f"{name}_where"),
                              elem_classes=shown_with("method", "SNB", "Average")):  # fmt: skip
                canvases.append(build_place(name, place, controls, elem_id))
    with gr.Row():
        place("place_strength", "place_feather")
    place("place_crop")
    return canvases


def build_loras_hint(elem_id: Callable[[str], str]) -> Any:
    """What the page shows where two LoRAs are experts of a base without one; returned is its button."""
    classes = ["denoiser-fusion-row", "denoiser-fusion-memory", *shown_with("loras", "two")]
    with gr.Row(elem_id=elem_id("loras_hint"), elem_classes=classes):
        gr.HTML(LORAS_HINT, elem_classes=["denoiser-fusion-told"])
        return gr.Button("Use divergence", size="sm", elem_id=elem_id("loras_divergence"))


def build_place(
    name: str, place: Callable[..., None], controls: dict[str, list[Any]], elem_id: Callable[[str], str]
) -> Any:
    """Where and when an expert draws; returned is the canvas. The buttons act in the page, without the server."""
    tab = "img2img" if "img2img" in elem_id(name) else "txt2img"
    buttons = PLACE_BUTTONS | ({"Inpaint mask": INPAINT} if tab == "img2img" else {})
    place(f"{name}_place")
    (text,) = controls[f"{name}_place"]
    with gr.Row(elem_classes=["denoiser-fusion-buttons", *shown_with("method", "SNB")]):
        for label, value in buttons.items():
            button = gr.Button(label, size="sm", elem_id=elem_id(f"{name}_place_{label.split()[0].lower()}"))
            button.click(None, outputs=[text], _js=f"() => ['{value}']", **AT_ONCE)
    with gr.Column(elem_classes=["denoiser-fusion-canvas", *shown_with(name, "painted")]):
        canvas = make_canvas(f"Expert {name[-1]} mask", elem_id(f"{name}_canvas"))
        with gr.Row(elem_classes=["denoiser-fusion-buttons"]):
            use = gr.Button("Use the last picture", size="sm", elem_id=elem_id(f"{name}_canvas_use"), tooltip=USE_WORDS)
            clear = gr.Button("Clear", size="sm", elem_id=elem_id(f"{name}_canvas_clear"),
                              tooltip="Remove the picture and what is painted on it")  # fmt: skip
    with gr.Row():
        place(f"{name}_window")
    use.click(None, outputs=[canvas.picture], _js=f"() => denoiserFusion.lastPicture('{tab}')", **AT_ONCE)
    clear.click(None, inputs=[text], outputs=[text, *canvas.parts], **AT_ONCE,
                _js=f"place => denoiserFusion.clear(place, {len(canvas.parts)})")  # fmt: skip
    return canvas.painted
