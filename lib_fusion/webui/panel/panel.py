"""The panel in txt2img and img2img. Its controls are built from the table, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

# Modules, not names from them: a UI reload creates the host's UI classes again.
from modules import call_queue, infotext_utils, ui_components

from lib_fusion.requests import infotext
from lib_fusion.requests.settings import COMPARE, MAX_EXPERTS
from lib_fusion.webui import options
from lib_fusion.webui.panel.afa import build_afa
from lib_fusion.webui.panel.controls import AT_ONCE, make_controls, shown_with, tool
from lib_fusion.webui.panel.experts import build_experts, build_loras_hint
from lib_fusion.webui.panel.freeu import build_freeu
from lib_fusion.webui.panel.paste import Paste
from lib_fusion.webui.panel.preset_row import build_presets
from lib_fusion.webui.panel.skipping import build_skipping
from lib_fusion.webui.runtime import runtime

#: When to take which method.
METHOD_WORDS = {
    "SNB": "Take SNB when each model should draw objects of its own in one picture. It needs no training; begin here.",
    "Average": "Take Average to mix two styles of the same subject, without anyone drawing a part of their own.",
    "AFA": "Take AFA when you have an aggregator that was trained for exactly these models; the AFA tab lists them.",
}
GUIDANCE_TOLD = ("Where the host's NGMS leaves out the unconditional half of a step, it acts first: that step has no "
                 "guidance to lower.")  # fmt: skip
#: The previews, for people.
PREVIEW_WORDS = {
    "masks": "who drew what", "skips": "skipped steps", "weights": "AFA weights", "maps": "AFA maps",
}  # fmt: skip
PREVIEWS_TOLD = ("Pictures about the picture. Who drew what is SNB's, weights and maps are AFA's. Settings > Denoiser "
                 "Fusion says what is ticked when the page opens.")  # fmt: skip


@dataclass
class Built:
    """What the host wants to know of a built panel: its inputs in the order of the script's arguments, and pasting."""

    inputs: list[Any]
    infotext_fields: list[Any]
    paste_field_names: list[Paste]


def build(elem_id: Callable[[str], str]) -> Built:
    """Builds the panel of one tab, and keeps nothing: the host calls this several times."""
    controls: dict[str, list[Any]] = {}
    fields = {field.element: field for field in infotext.list_fields()}

    def place(*elements: str) -> None:
        for element in elements:
            controls[element] = make_controls(fields[element], elem_id)

    with ui_components.InputAccordion(False, label="Denoiser Fusion", elem_id=elem_id("enable")) as enabled:
        with gr.Tabs(elem_id=elem_id("tabs"), elem_classes=["denoiser-fusion"]):
            with gr.Tab("Experts", elem_id=elem_id("tab_experts")):
                canvases = build_experts(place, controls, elem_id)
                divergence = build_loras_hint(elem_id)
            with gr.Tab("Blend", elem_id=elem_id("tab_blend")):
                place("method")
                for method, words in METHOD_WORDS.items():
                    gr.HTML(words, elem_id=elem_id(f"method_{method.lower()}"),
                            elem_classes=["denoiser-fusion-told", *shown_with("method", method)])  # fmt: skip
                with gr.Row():
                    place("snb_window")
                place("snb_outside")
                with gr.Accordion("When the mask is decided and used", elem_id=elem_id("mask"),
                                  elem_classes=shown_with("method", "SNB")):  # fmt: skip
                    place("snb_saliency")
                    divergence.click(None, outputs=controls["snb_saliency"], _js="() => ['divergence']", **AT_ONCE)
                    with gr.Row():
                        place("snb_hold", "snb_from")
                    with gr.Row():
                        place("k_general", "k_expert")
            with gr.Tab("Guidance", elem_id=elem_id("tab_guidance")):
                place("guidance")
                with gr.Row():
                    place("guidance_until", "guidance_after")
                gr.HTML(GUIDANCE_TOLD, elem_id=elem_id("guidance_told"), elem_classes=[
                    "denoiser-fusion-told", *shown_with("guidance", "with experts", "always")])  # fmt: skip
            with gr.Tab("AFA", elem_id=elem_id("tab_afa")):
                build_afa(place, controls, elem_id)
            with gr.Tab("FreeU", elem_id=elem_id("tab_freeu")):
                build_freeu(place, controls, elem_id)
            with gr.Tab("Skipping", elem_id=elem_id("tab_skipping")):
                build_skipping(place, controls, elem_id)
            with gr.Tab("Passes", elem_id=elem_id("tab_passes")), gr.Row():
                place("passes", "refiner")
        inputs = [control for element in fields for control in controls[element]]
        previews = build_previews(elem_id)
        build_presets(inputs, elem_id)
        checkpoints = [controls[f"expert{i + 1}_checkpoint"][0] for i in range(MAX_EXPERTS)]
        compare = build_foot(checkpoints, elem_id)

    pastes = [Paste(), *(Paste(field, part) for field in fields.values() for part in range(field.width))]
    pasted = [infotext_utils.PasteField(control, paste) for control, paste in zip([enabled, *inputs], pastes)]
    return Built([enabled, *inputs, compare, *canvases, previews], pasted, pastes)


def build_previews(elem_id: Callable[[str], str]) -> Any:
    """Which pictures about the picture are shown after it, at first those that the settings page names."""
    chosen = [kind for kind in PREVIEW_WORDS if options.read_option(f"preview_{kind}")]
    previews = gr.CheckboxGroup(
        label="Show after each picture", choices=[(words, kind) for kind, words in PREVIEW_WORDS.items()],
        value=chosen, elem_id=elem_id("previews"), elem_classes=["denoiser-fusion-previews"], tooltip=PREVIEWS_TOLD,
    )  # fmt: skip
    previews.do_not_save_to_config = True
    return previews


def build_foot(checkpoints: list[Any], elem_id: Callable[[str], str]) -> Any:
    """How much the kept experts take, a button that frees it, and one that compares.

    Returned is the comparison's switch, which the page sets for one press of *Generate*.
    """
    with gr.Row(elem_classes=["denoiser-fusion-row", "denoiser-fusion-memory"]):
        shown = gr.HTML(runtime.describe_memory(), elem_id=elem_id("memory"), elem_classes=["denoiser-fusion-told"])
        look = tool("🔄", "Show the memory in use", elem_id("memory_refresh"))
        gr.Button("Compare", size="sm", elem_id=elem_id("compare_button"), tooltip=COMPARE.help)
        compare = gr.Checkbox(label="Compare", value=False, elem_id=elem_id(COMPARE.key),
                              elem_classes=["denoiser-fusion-hidden"])  # fmt: skip
        compare.do_not_save_to_config = True
        free = gr.Button("Free memory", size="sm", elem_id=elem_id("free"),
                         tooltip="Unload the experts; the next generation loads what it needs again.")  # fmt: skip

    def on_free(*chosen: str | None) -> str:
        runtime.free()
        return runtime.describe_memory(*chosen)

    look.click(runtime.describe_memory, inputs=checkpoints, outputs=[shown], **AT_ONCE)
    free.click(call_queue.wrap_queued_call(on_free), inputs=checkpoints, outputs=[shown], **AT_ONCE)
    for checkpoint in checkpoints:  # whether it fits is said when it is chosen
        checkpoint.change(runtime.describe_memory, inputs=checkpoints, outputs=[shown], **AT_ONCE)
    return compare
