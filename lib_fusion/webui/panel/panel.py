"""The panel in txt2img and img2img. Its controls are built from the table, row by row."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

# Modules, not names from them: a UI reload creates the host's UI classes again.
from modules import call_queue, infotext_utils, sd_models, shared, ui_common, ui_components

from lib_fusion.errors import FusionError
from lib_fusion.requests import infotext, presets, request
from lib_fusion.requests.infotext import Field
from lib_fusion.requests.loras import change_loras
from lib_fusion.requests.refusals import in_panels_words
from lib_fusion.requests.settings import (
    AUTO,
    COMPARE,
    FREEU_AUTO,
    FREEU_PUBLISHED,
    FREEU_PUBLISHED_ROWS,
    FREEU_STAGES,
    HOST_OPTIONS,
    INPAINT,
    MAX_EXPERTS,
    PAINTED,
    SAME_AS_BASE,
    SKIP_PRESETS,
)
from lib_fusion.webui import options
from lib_fusion.webui.host import adapter
from lib_fusion.webui.models import aggregators, checkpoints, file_hashes
from lib_fusion.webui.panel.canvas import make_canvas
from lib_fusion.webui.runtime import runtime
from lib_fusion.webui.words import translate

FREEU_ON = ("Auto", *FREEU_PUBLISHED, "Custom")
#: The amounts of skipping, for people.
SKIP_WORDS = {
    "Faithful": "Hardly any difference to be seen; up to half of the U-Net's work is spared",
    "Balanced": "Small differences; a little more is spared, above all with many steps",
    "Fast": "Some pictures change a little; the most is spared",
}
SKIP_TOLD = "More steps leave more to skip. The picture's infotext tells what was."
AFA_TOLD = ("Not in use: the method is another one. Choosing an aggregator here chooses AFA, too, as does the method "
            "in the Blend tab.")  # fmt: skip
AFA_HINT = ("Where objects come out coarse, the noisy early steps have spoilt them: take the preset 'AFA without "
            "coarse parts: average first'.")  # fmt: skip
#: When to take which method.
METHOD_WORDS = {
    "SNB": "Take SNB when each model should draw objects of its own in one picture. It needs no training; begin here.",
    "Average": "Take Average to mix two styles of the same subject, without anyone drawing a part of their own.",
    "AFA": "Take AFA when you have an aggregator that was trained for exactly these models; the AFA tab lists them.",
}
GUIDANCE_TOLD = ("Where the host's NGMS leaves out the unconditional half of a step, it acts first: that step has no "
                 "guidance to lower.")  # fmt: skip
LORAS_HINT = ("Two experts have LoRAs and the picture's prompt has none. With the saliency 'divergence' the base "
              "without a LoRA is only what they are compared with, and draws nothing; with 'own' it competes with them "
              "and blurs what they draw.")  # fmt: skip
#: The previews, for people.
PREVIEW_WORDS = {
    "masks": "who drew what", "skips": "skipped steps", "weights": "AFA weights", "maps": "AFA maps",
}  # fmt: skip
PREVIEWS_TOLD = ("Pictures about the picture. Who drew what is SNB's, weights and maps are AFA's. Settings > Denoiser "
                 "Fusion says what is ticked when the page opens.")  # fmt: skip
#: The places that have a button, in words.
PLACE_BUTTONS = {"Auto": AUTO, "Left half": "columns 1:1 1", "Right half": "columns 1:1 2", "Painted": PAINTED,
                 "Top half": "rows 1:1 1", "Bottom half": "rows 1:1 2"}  # fmt: skip
USE_WORDS = "Paint on the picture that the gallery shows, or on a grey one where it shows none"
#: Control -> the choices of another one with which alone it is of use. Elsewhere the page hides it; its value stays.
SHOWN_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    **{f"expert{i + 1}_weight": ("method", ("SNB", "Average")) for i in range(MAX_EXPERTS)},
    **{f"expert{i + 1}_place": ("method", ("SNB",)) for i in range(MAX_EXPERTS)},
    "place_strength": ("places", ("used",)),
    "place_feather": ("places", ("used",)),
    "place_crop": ("places", ("used",)),
    "guidance_until": ("guidance", ("with experts", "always")),
    "guidance_after": ("guidance", ("with experts", "always")),
    "afa_force": ("afa_maps", ("trained",)),
    "freeu_version": ("freeu", FREEU_ON),
    "freeu_models": ("freeu", FREEU_ON),
    "skip_passes": ("skipping", ("Forecast", "Paper")),
    "skip_tolerance": ("skipping", ("Forecast",)),
    "skip_threshold": ("skipping", ("Paper",)),
}
#: A slider is of no use where it has more stops than this.
MOST_STOPS = 1000
#: More choices than this are a list to open.
MOST_BUTTONS = 4
#: For events of ours: Gradio waits for ever for a queued one whose page has gone, and *Reload UI* with it.
AT_ONCE = {"show_progress": False, "queue": False}
#: What may lose a preset: its button, the question, and what is said when it is done.
QUESTIONS = {
    "save": ("Press 💾 again to replace the preset {}.", "Saved: {}"),
    "delete": ("Press 🗑️ again to delete the preset {}.", "Deleted: {}"),
}


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
        place("place_strength", "place_feather", "place_crop")
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


def build_previews(elem_id: Callable[[str], str]) -> Any:
    """Which pictures about the picture are shown after it, at first those that the settings page names."""
    chosen = [kind for kind in PREVIEW_WORDS if options.read_option(f"preview_{kind}")]
    previews = gr.CheckboxGroup(
        label="Show after each picture", choices=[(words, kind) for kind, words in PREVIEW_WORDS.items()],
        value=chosen, elem_id=elem_id("previews"), elem_classes=["denoiser-fusion-previews"], tooltip=PREVIEWS_TOLD,
    )  # fmt: skip
    previews.do_not_save_to_config = True
    return previews


def build_presets(inputs: list[Any], elem_id: Callable[[str], str]) -> None:
    """Apply, save, delete and refresh; errors appear in a line under the list."""
    store = options.all_presets()
    with gr.Row(elem_classes=["denoiser-fusion-row", "denoiser-fusion-presets"]):
        chosen = ui_components.DropdownEditable(
            label="Fusion preset", choices=list_presets(store), value="", elem_id=elem_id("preset"),
            tooltip="Settings kept under a name. To save your own, type a new name and press save.",
        )  # fmt: skip
        chosen.do_not_save_to_config = True
        apply = tool("✔️", "Apply this preset", elem_id("preset_apply"))
        save = tool("💾", "Save the settings above under this name", elem_id("preset_save"))
        delete = tool("🗑️", "Delete this preset", elem_id("preset_delete"))
        refresh = tool("🔄", "Refresh the list", elem_id("preset_refresh"))
    told = gr.HTML(elem_id=elem_id("preset_told"), elem_classes=["denoiser-fusion-told"])

    def on_apply(name: str) -> list[Any]:
        try:
            values = request.dict_to_panel(store.get(name))
        except FusionError as error:
            return [gr.update() for _ in inputs] + [html.escape(translate(in_panels_words(error)))]
        told = html.escape(translate(f"Applied: {name}"))
        return [gr.update() if value is None else gr.update(value=value) for value in values] + [told]

    def on_choice(name: str) -> list[Any]:
        """A name that no preset has yet is one to save under.

        The line stays then: the answer may come after that to a button which was pressed meanwhile.
        """
        return on_apply(name) if name in names_of(store) else [gr.update() for _ in (*inputs, told)]

    def on_save(name: str, asked: str, *values: Any) -> list[Any]:
        settings = dict(request.forgive_unused(request.panel_to_dict([True, *values])))
        del settings["enabled"], settings["compare"]
        return act("save", name, asked, lambda: store.save(name, settings))

    def on_delete(name: str, asked: str) -> list[Any]:
        return act("delete", name, asked, lambda: store.delete(name))

    def act(what: str, name: str, asked: str, do: Callable[[], None]) -> list[Any]:
        """Asks, by a second press, before one's own preset is lost. ``asked``: what the press before has asked."""
        asking, done = QUESTIONS[what]
        question = f"{what} {name}"
        try:
            if store.is_own(name) and asked != question:
                told = asking.format(name)
            else:
                do()
                told, question = done.format(name), ""
        except FusionError as error:
            told, question = in_panels_words(error), ""
        return [gr.update(choices=list_presets(store)), html.escape(translate(told)), question]

    asked = gr.State("")
    chosen.input(on_choice, inputs=[chosen], outputs=[*inputs, told], **AT_ONCE)
    apply.click(on_apply, inputs=[chosen], outputs=[*inputs, told], **AT_ONCE)
    save.click(on_save, inputs=[chosen, asked, *inputs], outputs=[chosen, told, asked], **AT_ONCE)
    delete.click(on_delete, inputs=[chosen, asked], outputs=[chosen, told, asked], **AT_ONCE)
    refresh.click(lambda: [gr.update(choices=list_presets(store)), "", ""], outputs=[chosen, told, asked], **AT_ONCE)
    for control in inputs:
        if hasattr(control, "input"):
            control.input(None, inputs=[told], outputs=[told], _js="denoiserFusion.noteEdit", **AT_ONCE)


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


def make_controls(field: Field, elem_id: Callable[[str], str]) -> list[Any]:
    """The control of one row; two for a window."""
    row, label = field.row, field.label
    common = {"elem_id": elem_id(field.element), "tooltip": row.help}
    if field.element in SHOWN_WITH:
        control, choices = SHOWN_WITH[field.element]
        common["elem_classes"] = shown_with(control, *choices)
    value = infotext.panel_default(field)
    if row.key == "checkpoint":
        return [gr.Dropdown(label=label, choices=list_choices(), value=value, **common)]
    if row.key == "afa_aggregator":
        return [gr.Dropdown(label=label, choices=["", *aggregators.list_aggregators()], value=value, **common)]
    if row.kind == "bool":
        return [gr.Checkbox(label=label, value=value, **common)]
    if row.kind == "choice":
        choices = list(row.choices)
        if len(choices) > MOST_BUTTONS:
            return [gr.Dropdown(label=label, choices=choices, value=value, **common)]
        return [gr.Radio(label=label, choices=choices, value=value, **common)]
    if row.key == "place":
        return [gr.Textbox(label=label, value=value, placeholder=AUTO, **common)]
    if row.kind == "text":
        return [gr.Textbox(label=label, value=value, lines=2, placeholder="Empty: the picture's", **common)]
    if row.kind == "window":
        return [
            gr.Slider(row.low, row.high, value=part, step=1, label=text,
                      elem_id=elem_id(f"{field.element}_{name}"), tooltip=row.help)
            for part, text, name in zip(value, field.labels, request.WINDOW_ENDS)
        ]  # fmt: skip
    if row.step and (row.high - row.low) / row.step <= MOST_STOPS:
        return [gr.Slider(row.low, row.high, value=value, step=row.step, label=label, **common)]
    return [gr.Number(value=value, label=label, **common)]  # Gradio's limits would end every run, without a name


def shown_with(control: str, *choices: str) -> list[str]:
    """Classes of what the page is to show only where a control has one of these choices."""
    names = (choice.lower().replace(" ", "-") for choice in choices)
    return ["denoiser-fusion-with", *(f"denoiser-fusion-{control}-{name}" for name in names)]


@dataclass(frozen=True)
class Paste:
    """Reads a control's value out of parsed infotext; None leaves it as it is. Without a field: the panel's switch.

    The host also pairs controls of two tabs by it (*Send to*), where it looks for equal ones.
    """

    field: Field | None = None
    part: int = 0

    def __call__(self, entries: dict[str, Any]) -> Any:
        if "lib_free_u" not in sys.modules:  # where that extension is there, it takes its entries itself
            entries = infotext.adopt_freeu(entries)
        if self.field is None:
            return infotext.is_fused(entries) if options.read_option("paste_switches") else None
        value = infotext.read_infotext(entries, self.field)
        if self.field.row.key == "prompt" and value:
            return file_hashes.rename_loras(value, entries)
        if self.field.row.key == "checkpoint" and value not in (None, SAME_AS_BASE, *infotext.NO_CHECKPOINT):
            return full_name(value)
        return value[self.part] if self.field.width == 2 and value is not None else value


def full_name(checkpoint: str) -> str:
    """The name in the panel's list of a checkpoint that is named in any way; a name that nothing has stays."""
    try:
        return checkpoints.find_checkpoint(checkpoint, "checkpoint").name
    except FusionError:
        return checkpoint


def list_choices() -> list[str]:
    return [infotext.NO_CHECKPOINT[1], SAME_AS_BASE, *checkpoints.list_checkpoints()]


def names_of(store: presets.Presets) -> list[str]:
    """The presets' names; a broken file must not keep the panel from being built."""
    try:
        return store.names()
    except FusionError:
        return list(presets.SHIPPED)


def list_presets(store: presets.Presets) -> list[str]:
    """The names after none at all: Gradio 4 shows a list's first choice where nothing is chosen."""
    return ["", *names_of(store)]


def tool(sign: str, tooltip: str, element: str) -> Any:
    return ui_components.ToolButton(value=sign, elem_id=element, tooltip=tooltip)


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
