"""The row of presets: applied on choice, saved, deleted."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import gradio as gr

# Modules, not names from them: a UI reload creates the host's UI classes again.
from modules import ui_components

from lib_fusion.errors import FusionError
from lib_fusion.requests import presets, request
from lib_fusion.requests.refusals import in_panels_words
from lib_fusion.webui import options
from lib_fusion.webui.panel.controls import AT_ONCE, tool
from lib_fusion.webui.words import translate

#: What may lose a preset: its button, the question, and what is said when it is done.
QUESTIONS = {
    "save": ("Press 💾 again to replace the preset {}.", "Saved: {}"),
    "delete": ("Press 🗑️ again to delete the preset {}.", "Deleted: {}"),
}


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


def names_of(store: presets.Presets) -> list[str]:
    """The presets' names; a broken file must not keep the panel from being built."""
    try:
        return store.names()
    except FusionError:
        return list(presets.SHIPPED)


def list_presets(store: presets.Presets) -> list[str]:
    """The names after none at all: Gradio 4 shows a list's first choice where nothing is chosen."""
    return ["", *names_of(store)]
