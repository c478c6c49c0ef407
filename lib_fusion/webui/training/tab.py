"""The tab "Fusion training": a form built from the table, Start and Stop, and how the training is doing."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

# Modules, not names from them: a UI reload creates the host's UI classes again.
from modules import sd_models, ui_common, ui_components

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.requests.parameters import Parameter
from lib_fusion.training import view as training_view
from lib_fusion.training.jobs import EVALUATION
from lib_fusion.training.options import CACHE_PARAMETERS, TRAINING_PARAMETERS, label_of
from lib_fusion.webui.models import checkpoints, lora_files
from lib_fusion.webui.panel.controls import AT_ONCE
from lib_fusion.webui.training import start as training
from lib_fusion.webui.words import translate

TITLE, IDENTITY = "Fusion training", "denoiser_fusion_training"
#: Rows in full view; the others are folded away.
MAIN = ("resolution", "steps", "batch_size", "learning_rate", "precision")
ROWS = (*CACHE_PARAMETERS, *TRAINING_PARAMETERS)
#: What the form has besides the rows.
FIELDS = ("source", "held_out", "models")
#: The form's labels by the fields that errors name.
LABELS = {
    "name": "Name of the aggregator", "source": "Folder of captioned pictures",
    "held_out": "Folder of held-out pictures", "models": "Models, the base first", "LoRA": "LoRA for the last model",
    **{row.key: label_of(row) for row in ROWS},
}  # fmt: skip
TOLD = (
    "A training runs in a process of its own, beside the WebUI: pages may be closed and the WebUI restarted. It needs "
    "the GPU's memory for all its models; the loaded checkpoint stays there too, unless Settings > Actions > "
    "<i>Unload SD checkpoint to RAM</i> is pressed. What is done is kept in "
    "<code>models/denoiser-fusion/training</code>; a folder there that is not needed any more can be deleted."
)


def build() -> list[tuple[Any, str, str]]:
    """The tab, as the host's callback wants it; all state is on disk."""
    with gr.Blocks(analytics_enabled=False) as tab, gr.Row():
        with gr.Column(variant="compact", elem_classes=["denoiser-fusion"]):
            name, controls, adding = build_form()
            with gr.Row():
                start = gr.Button(
                    "Start", variant="primary", elem_id=element("start"),
                    tooltip="Encode the pictures, train, evaluate; or go on where it was stopped.",
                )  # fmt: skip
                stop = gr.Button(
                    "Stop", elem_id=element("stop"), tooltip="What is saved stays; Start goes on from there."
                )
            told = gr.HTML(elem_id=element("told"), elem_classes=["denoiser-fusion-told"])
            gr.HTML(translate(TOLD), elem_classes=["denoiser-fusion-told"])
        with gr.Column(variant="compact", elem_classes=["denoiser-fusion"]):
            shown = build_view()
            look = gr.Button("Look", elem_id=element("look"), elem_classes=["denoiser-fusion-hidden"])
            enter = gr.Button("Enter", elem_id=element("enter"), elem_classes=["denoiser-fusion-hidden"])

        asked, add = adding
        add.click(on_add, inputs=asked, outputs=[asked[0], told], **AT_ONCE)
        buttons = {"start": start, "stop": stop, "look": look, "enter": enter}
        connect(buttons, name, controls, told, shown)
    return [(tab, TITLE, IDENTITY)]


def connect(buttons: dict[str, Any], name: Any, controls: list[Any], told: Any, shown: list[Any]) -> None:
    """What the buttons do; the page presses *look* and *enter* by itself."""

    def on_start(chosen: str, *values: Any) -> list[Any]:
        try:
            job = training.start({"name": chosen, **dict(zip((*FIELDS, *(row.key for row in ROWS)), values))})
        except FusionError as error:
            return [gr.update(), refusal_of(error), *view(chosen)]
        told = html.escape(translate(f"Started: {job.name}"))
        return [gr.update(value=job.name, choices=training.jobs().names()), told, *view(job.name)]

    def on_stop(chosen: str) -> list[Any]:
        store = training.jobs()
        running = store.running()
        done = running is not None and store.stop(running)
        told = translate(f"Stopped: {running}" if done else "Nothing is being trained.")
        return [html.escape(told), *view(chosen)]

    def on_enter() -> list[Any]:
        """For a page that has just been opened: the training that runs, or else the last."""
        store = training.jobs()
        names = store.names()
        chosen = store.running() or (names[0] if names else "")
        return [gr.update(value=chosen, choices=names), *form(chosen), *view(chosen)]

    buttons["start"].click(on_start, inputs=[name, *controls], outputs=[name, told, *shown], **AT_ONCE)
    buttons["stop"].click(on_stop, inputs=[name], outputs=[told, *shown], **AT_ONCE)
    buttons["look"].click(view, inputs=[name], outputs=shown, **AT_ONCE)
    buttons["enter"].click(on_enter, outputs=[name, *controls, *shown], **AT_ONCE)
    name.input(lambda chosen: [*form(chosen), *view(chosen)], inputs=[name], outputs=[*controls, *shown], **AT_ONCE)


def build_loras(models: Any) -> tuple[list[Any], Any]:
    """A LoRA and its weight, and a button that adds it to the last of ``models``; the last returned is the button."""
    with gr.Row(elem_classes=["denoiser-fusion-row"]):
        lora = gr.Dropdown(
            label=LABELS["LoRA"], choices=lora_files.list_loras(), value="", elem_id=element("lora"),
            tooltip="A model may be a checkpoint with LoRAs, as an expert of a picture is.",
        )  # fmt: skip
        ui_common.create_refresh_button(
            lora, lora_files.refresh_loras, lambda: {"choices": lora_files.list_loras()}, element("lora_refresh")
        )
        weight = gr.Number(label="LoRA weight", value=1, elem_id=element("lora_weight"))
        add = gr.Button("Add to the last model", size="sm", elem_id=element("lora_add"))
    for control in (lora, weight):
        control.do_not_save_to_config = True
    return [models, lora, weight], add


def on_add(names: list[str] | None, lora: str, weight: float) -> list[Any]:
    try:
        return [models_update(training.add_lora(names or [], lora, weight)), ""]
    except FusionError as error:
        return [gr.update(), refusal_of(error)]


def refusal_of(error: FusionError) -> str:
    """What an error says, as HTML, with the form's label for the field that it names."""
    if isinstance(error, SettingError):
        error = SettingError(LABELS.get(error.field, error.field), error.value, error.allowed)
    return html.escape(translate(str(error)))


def models_update(names: list[str]) -> Any:
    """The list of models with these chosen: those with LoRAs are none of the checkpoints that it offers."""
    known = checkpoints.list_checkpoints()
    return gr.update(value=names, choices=[*known, *(name for name in names if name not in known)])


def build_form() -> tuple[Any, list[Any], tuple[list[Any], Any]]:
    """The name, the controls in the order of FIELDS and ROWS, and what ``build_loras`` returns."""
    name = ui_components.DropdownEditable(
        label=LABELS["name"], choices=training.jobs().names(), value="", elem_id=element("name"),
        tooltip="Of the file in models/denoiser-fusion. Choose an earlier training to see it or to go on with it.",
    )  # fmt: skip
    name.do_not_save_to_config = True
    source = gr.Textbox(
        label=LABELS["source"], elem_id=element("source"),
        placeholder="With metadata.jsonl, or a .txt beside each picture; or a webdataset .tar",
    )  # fmt: skip
    held_out = gr.Textbox(
        label=LABELS["held_out"], elem_id=element("held_out"),
        placeholder="Of the same form, for an honest evaluation; may be empty",
    )  # fmt: skip
    with gr.Row(elem_classes=["denoiser-fusion-row"]):
        models = gr.Dropdown(
            label=LABELS["models"], choices=checkpoints.list_checkpoints(), value=[], multiselect=True,
            elem_id=element("models"), tooltip="In the order in which they will be used: the base, then its experts.",
        )  # fmt: skip
        models.do_not_save_to_config = True
        ui_common.create_refresh_button(
            models, sd_models.list_models, lambda: {"choices": checkpoints.list_checkpoints()},
            element("models_refresh"),
        )  # fmt: skip
    adding = build_loras(models)
    with gr.Row(elem_classes=["denoiser-fusion-narrow"]):
        controls = {row.key: make_control(row) for row in ROWS if row.key in MAIN}
    with gr.Accordion("More settings", open=False, elem_id=element("more")):
        rest = [row for row in ROWS if row.key not in MAIN]
        for i in range(0, len(rest), 4):
            with gr.Row(elem_classes=["denoiser-fusion-narrow"]):
                controls |= {row.key: make_control(row) for row in rest[i : i + 4]}
    return name, [source, held_out, models, *(controls[row.key] for row in ROWS)], adding


def build_view() -> list[Any]:
    """What ``view`` fills: state, losses, verdict and plot, tables, log."""
    state = gr.HTML(elem_id=element("state"))
    losses = gr.HTML(elem_id=element("losses"))
    verdict = gr.HTML(elem_id=element("verdict"))
    with gr.Accordion("Evaluation", open=False, elem_id=element("evaluation")):
        tables = gr.Markdown(elem_id=element("tables"), elem_classes=["denoiser-fusion-tables"])
    with gr.Accordion("Log", open=False, elem_id=element("log")):
        log = gr.HTML(elem_classes=["denoiser-fusion-log"])
    return [state, losses, verdict, tables, log]


def view(name: str) -> list[Any]:
    """How a training is doing."""
    store = training.jobs()
    running = store.running()
    try:
        status = store.status(name) if name else None
    except FusionError:
        status = None
    if status is None:
        return [training_view.status_html(None, running, translate), "", "", "", ""]
    job, folder = store.read(name), store.of(name) / EVALUATION
    is_stale = status.phase == "running" and status.stage != "evaluate"
    verdict = "" if is_stale else training_view.evaluation_html(
        folder, bool(job.values["held_out"]), translate)
    tables = training_view.evaluation_tables(folder) if verdict else ""
    log = f"<pre>{html.escape(store.log(name))}</pre>"
    state = training_view.status_html(status, running, translate)
    return [state, training_view.loss_svg(status.rows, translate), verdict, tables, log]


def form(name: str) -> list[Any]:
    """The form as it was filled for a training; left as it is where there is none of this name."""
    try:
        job = training.jobs().read(name) if name else None
    except FusionError:
        job = None
    keys = (*FIELDS, *(row.key for row in ROWS))
    if job is None:
        return [gr.update() for _ in keys]
    found = {key: gr.update(value=value) for key, value in job.values.items()}
    return [{**found, "models": models_update(job.values["models"])}.get(key, gr.update()) for key in keys]


def make_control(row: Parameter) -> Any:
    """The control of one row; the table checks its value when it is used."""
    common = {"elem_id": element(row.key), "tooltip": row.help, "label": label_of(row)}
    if row.kind == "bool":
        return gr.Checkbox(value=row.default, **common)
    if row.kind == "choice":
        return gr.Dropdown(value=row.default, choices=list(row.choices), **common)
    return gr.Number(value=row.default, **common)


def element(name: str) -> str:
    return f"{IDENTITY}_{name}"
