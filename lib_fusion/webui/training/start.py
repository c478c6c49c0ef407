"""Trainings in the host: what is asked for is checked before anything starts, and becomes a job of commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from modules import devices, paths, sd_models_config, shared
from omegaconf import OmegaConf

from lib_fusion.errors import CheckpointError, FusionError, SettingError
from lib_fusion.requests.parameters import Parameter, read_rows
from lib_fusion.requests.settings import MAX_EXPERTS
from lib_fusion.training.captioned import Captioned, read_pictures
from lib_fusion.training.jobs import CACHE, EVALUATION, HELD_OUT, Job, Jobs
from lib_fusion.training.options import (
    CACHE_PARAMETERS,
    EVALUATION_PARAMETERS,
    TRAINING_PARAMETERS,
    TrainingSettings,
)
from lib_fusion.training.train import check_precision, check_settings
from lib_fusion.unet.checkpoint import VAE_PREFIX, Checkpoint
from lib_fusion.unet.lora import read_loras
from lib_fusion.unet.model_file import LoraFile, ModelFile
from lib_fusion.webui.a1111.experts import guess_config, prediction_of_config
from lib_fusion.webui.models import aggregators
from lib_fusion.webui.models.checkpoints import find_checkpoint
from lib_fusion.webui.models.lora_files import find_loras
from lib_fusion.webui.runtime import runtime

#: Kinds of checkpoints that can be trained with.
KINDS = ("sd1", "sd2", "sdxl")
#: The host's own packages that its encoders are of (``ldm``, ``sgm``), as its ``paths`` names them.
PACKAGES = ("Stable Diffusion", "Stable Diffusion XL")


def jobs() -> Jobs:
    """All trainings, in a subfolder of the aggregator files' folder."""
    return Jobs(aggregators.folder() / aggregators.TRAINING)


def start(values: Mapping[str, Any]) -> Job:
    """Starts or resumes the training that the tab's form asks for; raises FusionError before anything is done."""
    if shared.cmd_opts.hide_ui_dir_config:
        raise FusionError("the WebUI was launched with --hide-ui-dir-config, so no folders can be trained on")
    store = jobs()
    job = make_job(values, store)
    store.check(job)
    if runtime.current is None:  # else a picture is being made with what would be freed
        runtime.free()
    store.start(job)
    return job


def make_job(values: Mapping[str, Any], store: Jobs) -> Job:
    """The commands for checked values; raises SettingError naming the field."""
    name = str(values["name"] or "").strip()
    folder = store.of(name)
    cache_rows = read_rows(CACHE_PARAMETERS, {row.key: values[row.key] for row in CACHE_PARAMETERS})
    rows = read_rows(TRAINING_PARAMETERS, {row.key: values[row.key] for row in TRAINING_PARAMETERS})
    check_settings(TrainingSettings(**rows))
    device = str(devices.device)
    check_precision(rows["precision"], torch.device(device))
    source = check_pictures("source", values["source"])
    held_out = check_pictures("held_out", values["held_out"]) if str(values["held_out"] or "").strip() else ""
    models, configs = check_models(values["models"] or [])

    common = [*(part for model in models for part in ("--model", str(model))), "--device", device]
    cache, out = str(folder / CACHE), str(folder / f"{name}.safetensors")
    encode = [*flags(CACHE_PARAMETERS, cache_rows), *common]
    commands = [["cache", "--source", source, "--cache", cache, *encode]]
    if held_out:
        commands.append(["cache", "--source", held_out, "--cache", str(folder / HELD_OUT), *encode])
    commands += [
        ["train", "--cache", cache, "--out", out, *flags(TRAINING_PARAMETERS, rows), *common],
        ["evaluate", "--cache", str(folder / HELD_OUT) if held_out else cache, "--aggregator", out,
         "--out", str(folder / EVALUATION), *flags(EVALUATION_PARAMETERS, rows), *common],
    ]  # fmt: skip
    asked = {"source": source, "held_out": held_out, "models": list(values["models"]), **cache_rows, **rows}
    target = str(aggregators.folder() / f"{name}.safetensors")
    return Job(name, asked, commands, configs, [paths.paths[key] for key in PACKAGES if key in paths.paths], target)


def flags(rows: Sequence[Parameter], values: Mapping[str, Any]) -> list[str]:
    return [part for row in rows for part in (row.flag, row.show(values[row.key]))]


def check_pictures(field: str, given: Any) -> str:
    """The full path of a folder or tar that holds a captioned picture; raises SettingError."""
    text = str(given or "").strip().strip('"')
    if not text:
        raise SettingError(field, text, "allowed: a folder of captioned pictures, or a webdataset .tar")
    path = Path(text).expanduser().resolve()
    try:
        usable = any(isinstance(picture, Captioned) for picture in read_pictures(path))
    except (FusionError, OSError, ValueError) as error:
        raise SettingError(field, text, str(error)) from error
    if not usable:
        raise SettingError(field, text, "no captioned picture can be read there")
    return str(path)


def check_models(names: Sequence[str]) -> tuple[list[ModelFile], list[str]]:
    """The models of an ensemble, base first, and their configurations; raises SettingError."""
    if not 2 <= len(names) <= MAX_EXPERTS + 1:
        problem = f"allowed: 2 to {MAX_EXPERTS + 1} models, the base first"
        raise SettingError("models", list(names), problem)
    found = [find_model(name) for name in names]
    infos, models = [info for info, _ in found], [model for _, model in found]
    try:
        files = [Checkpoint.open(model.path) for model in models]
        kinds = [file.kind for file in files]
    except CheckpointError as error:
        raise SettingError("models", list(names), str(error)) from error
    configs = []
    for info, file, kind in zip(infos, files, kinds):
        if kind not in KINDS:
            raise SettingError("models", info.name, f"it is {kind}; allowed: {', '.join(KINDS)}")
        differ = [key for key, shape in files[0].unet_shapes.items() if file.unet_shapes.get(key) != shape]
        if kind != kinds[0] or differ:
            problem = f"its U-Net is of another kind or size than that of {infos[0].name}"
            raise SettingError("models", info.name, f"{problem}; allowed: checkpoints of one architecture")
        if file.unet_shapes["input_blocks.0.0.weight"][1] != file.latent_channels:
            raise SettingError("models", info.name, "it is for inpainting or editing; allowed: ordinary checkpoints")
        for prefix, part in ((file.text_prefix, "text encoder"), *([(VAE_PREFIX, "VAE")] if file is files[0] else [])):
            if not any(key.startswith(prefix) for key in file.shapes):
                raise SettingError("models", info.name, f"no {part} ({prefix}*) in it")
        near = sd_models_config.find_checkpoint_config_near_filename(info)
        configs.append(near or guess_config(info.filename, info))
        check_prediction(info, file, configs[-1])
    for name, model, file in zip(names, models, files):
        try:
            read_loras(model, file)
        except CheckpointError as error:
            raise SettingError("models", name, str(error)) from error
    if len({model_key(model) for model in models}) < len(models):
        problem = "one of them is there twice; allowed: different checkpoints, or one with different LoRAs"
        raise SettingError("models", list(names), problem)
    if len({file.prediction for file in files}) > 1:
        problem = ", ".join(f"{info.name} {file.prediction}" for info, file in zip(infos, files))
        raise SettingError("models", list(names), f"they predict different things ({problem})")
    return models, configs


def find_model(name: str) -> tuple[Any, ModelFile]:
    """The host's entry of a model's checkpoint, and its files; raises SettingError.

    ``name``: a checkpoint's, and LoRAs as prompts name them: ``base.safetensors <lora:name:0.8>``.
    """
    plain, calls = find_loras(name, "models")
    info = find_checkpoint(plain.strip(), "models")
    for call in calls:
        if call.te != call.unet or call.dyn is not None:
            problem = "allowed in a training: <lora:NAME:WEIGHT>, with one weight for U-Net and text encoder"
            raise SettingError("models", name, problem)
    model = ModelFile(Path(info.filename), tuple(LoraFile(Path(call.file), call.unet) for call in calls))
    if calls and ModelFile.of(str(model), "models") != model:
        raise SettingError("models", name, "allowed: LoRAs without a + behind .safetensors in their folder's name")
    return info, model


def model_key(model: ModelFile) -> tuple[Path, frozenset[LoraFile]]:
    """Equal for models that are the same: LoRAs are summed, in any order, and those that weigh 0 do nothing."""
    return model.path, frozenset(lora for lora in model.loras if lora.weight)


def add_lora(names: Sequence[str], lora: str, weight: float) -> list[str]:
    """The form's models with a LoRA added to the last one; raises SettingError."""
    if not names:
        raise SettingError("models", list(names), "allowed: a checkpoint first, which the LoRA is added to")
    if not lora:
        raise SettingError("LoRA", lora, "allowed: one of the list")
    added = f"{names[-1]} <lora:{lora}:{weight:g}>"
    find_model(added)
    return [*names[:-1], added]


def check_prediction(info: Any, file: Checkpoint, config: str) -> None:
    """Refuses a file whose prediction the host finds to be another than the file or its .yaml says."""
    found = prediction_of_config(OmegaConf.load(config))
    if found != file.prediction:
        problem = f"it predicts {found}, which neither it nor a .yaml beside it says; allowed: with such a .yaml"
        raise SettingError("models", info.name, problem)
