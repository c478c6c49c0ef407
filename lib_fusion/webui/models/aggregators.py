"""AFA in the host: the list of aggregator files, the experts that a file is for, and the one that a pass uses."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from modules import paths
from torch import nn

from lib_fusion.errors import CheckpointError, FusionError, SettingError
from lib_fusion.files import file_version
from lib_fusion.fusion.aggregator_files import Card, ModelIdentity, identify_model, load_for, read_card
from lib_fusion.log import log_loaded, logger
from lib_fusion.methods import afa
from lib_fusion.requests.infotext import NO_CHECKPOINT
from lib_fusion.requests.settings import MAX_EXPERTS, ExpertSettings, FusionSettings
from lib_fusion.unet.model_file import LoraFile, ModelFile
from lib_fusion.webui.models.checkpoints import list_infos
from lib_fusion.webui.models.lora_files import LoraCall, find_loras

FOLDER = "denoiser-fusion"
#: The folder therein that trainings keep their state in; no aggregator files for use.
TRAINING = "training"
SUFFIX = ".safetensors"


def folder() -> Path:
    """Where people put aggregator files."""
    return Path(paths.models_path) / FOLDER


def list_aggregators() -> list[str]:
    """Names of the files there, without suffix."""
    found = (Path(place) / name for place, _, names in os.walk(folder(), followlinks=True) for name in names)
    files = (path.relative_to(folder()).with_suffix("") for path in found if path.suffix.lower() == SUFFIX)
    return sorted(file.as_posix() for file in files if file.parts[0] != TRAINING)


def find_aggregator(name: str) -> Path:
    """The file of a name in the list; raises SettingError. No path from a request is ever opened."""
    names = list_aggregators()
    plain = name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name
    found = plain if plain in names else plain.replace("\\", "/")  # as another system writes it
    if found not in names:
        allowed = ", ".join(names) or f"none is there yet; put files into models/{FOLDER}"
        raise SettingError("afa_aggregator", name, f"no such aggregator; allowed: {allowed}")
    beside = (folder() / found).parent
    return next(path for path in beside.iterdir() if path.suffix.lower() == SUFFIX and path.stem == Path(found).name)


def complete(settings: FusionSettings) -> FusionSettings:
    """Settings with the experts that the aggregator is for, where none are named; raises SettingError."""
    if settings.method != "AFA" or not settings.needs_aggregator:
        return settings
    if not settings.afa_aggregator:
        raise SettingError("afa_aggregator", settings.afa_aggregator, "allowed: an aggregator, or afa_maps uniform")
    card = card_of(settings.afa_aggregator)
    if settings.experts:
        return settings
    return replace(settings, experts=tuple(experts_of(card)))


def card_of(name: str) -> Card:
    """The card of a file in the list; raises SettingError."""
    try:
        return read_card(find_aggregator(name))
    except SettingError:
        raise
    except FusionError as error:
        raise SettingError("afa_aggregator", name, str(error)) from error


def experts_of(card: Card) -> list[ExpertSettings]:
    """The models that a file is for, after the base, as the host has them: checkpoints, and prompts of their LoRAs.

    Raises SettingError where a checkpoint or LoRA lacks.
    """
    experts = []
    for model in card.models[1:]:
        prompt = prompt_of(model)
        loras = find_loras(prompt, "afa_aggregator")[1]
        infos = [info for info in list_infos() if Path(info.filename).stem == model.name]
        info = next((info for info in infos if len(infos) == 1 or is_model(info, loras, model)), *infos[:1] or [None])
        if info is None:
            problem = f"it is for {', '.join(m.title for m in card.models)}; {model.name} is not among the checkpoints"
            raise SettingError("afa_aggregator", model.name, problem)
        experts.append(ExpertSettings(info.name, prompt=prompt))
    return experts


def prompt_of(model: ModelIdentity) -> str:
    """A model's LoRAs as prompts name them."""
    return " ".join(f"<lora:{lora}>" for lora in model.loras)


def is_model(info: Any, loras: Sequence[LoraCall], model: ModelIdentity) -> bool:
    """Whether a checkpoint's U-Net is the one that a card means; hashing it takes seconds, once for each file."""
    try:
        return identify_model(model_file(info.filename, loras)).unet == model.unet
    except (CheckpointError, OSError):
        return False


def model_file(file: str, calls: Iterable[LoraCall]) -> ModelFile:
    """A checkpoint and LoRAs with their weights for the U-Net; raises CheckpointError for LoRAs cut to a rank."""
    loras = tuple(calls)
    if cut := [lora.name for lora in loras if lora.dyn is not None]:
        raise CheckpointError(f"{cut[0]}: a LoRA that is cut to a rank (dyn); allowed: whole LoRAs")
    return ModelFile(Path(file), tuple(LoraFile(Path(lora.file), lora.unet) for lora in loras))


def identify(own: ModelFile, others: Sequence[LoraFile], wanted: ModelIdentity) -> ModelIdentity:
    """What a model under more LoRAs is to aggregator files; raises CheckpointError where they can't know it.

    ``others``: the picture's LoRAs that act on it, too. Those count with which it is the model ``wanted``; the rest is
    a style on what the file was trained for, as textual inversions are.
    """
    known = [lora for lora in others if is_readable(own.path, lora)]
    for count in range(min(len(wanted.loras), len(known)) + 1):
        for some in combinations(known, count):
            found = identify_model(replace(own, loras=(*some, *own.loras)))
            if found.unet == wanted.unet:
                return found
    return found


def is_readable(file: Path, lora: LoraFile) -> bool:
    try:
        return bool(identify_model(ModelFile(file, (lora,))))
    except CheckpointError:
        return False


def implied_by(name: str) -> dict[str, str]:
    """What choosing a file chooses, too, by the fields' elements; raises SettingError.

    The method, each expert's checkpoint, and the prompts of those with LoRAs.
    """
    experts = experts_of(card_of(name))
    names = [expert.checkpoint for expert in experts]
    names += [NO_CHECKPOINT[1]] * (MAX_EXPERTS - len(names))
    prompts = {f"expert{i + 1}_prompt": expert.prompt for i, expert in enumerate(experts) if expert.prompt}
    return {"method": "AFA", **{f"expert{i + 1}_checkpoint": names[i] for i in range(MAX_EXPERTS)}, **prompts}


def describe(name: str) -> str:
    """A file's card, for people, and what it needs that choosing it does not choose; raises SettingError."""
    card = card_of(name)
    needed = prompt_of(card.models[0])
    return card.describe() + (f". Write {needed} into the picture's prompt." if needed else "")


@dataclass(frozen=True)
class AfaBase:
    """What aggregators must fit: the base's U-Net, what it predicts (``epsilon`` or ``v``), and the dtype it has."""

    unet: nn.Module
    prediction: str
    dtype: torch.dtype


@dataclass(frozen=True)
class AfaModel:
    """One model of a pass: its checkpoint's file, and all LoRAs that act on its U-Net, but those cut to a rank."""

    file: str
    loras: tuple[LoraFile, ...]


class AggregatorCache:
    """The aggregators that were used last."""

    def __init__(self) -> None:
        self._key: Any = None
        self._loaded: nn.ModuleList | None = None

    def choose(
        self, settings: FusionSettings, base: AfaBase, models: Sequence[AfaModel], device: torch.device
    ) -> nn.Module:
        """What joins a pass's models (the base's first): the trained aggregators, or a control; raises SettingError."""
        if settings.needs_aggregator:
            return self.load(settings, base, models, device)
        if settings.afa_maps == "uniform":
            return afa.uniform(len(models)).to(device)
        if settings.only_model < len(models):
            return afa.one_hot(len(models), settings.only_model).to(device)
        raise SettingError("afa_maps", settings.afa_maps, f"allowed: one of the {len(models)} models")

    def load(
        self, settings: FusionSettings, base: AfaBase, given: Sequence[AfaModel], device: torch.device
    ) -> nn.ModuleList:
        """The trained ones; raises SettingError where they are not for these models."""
        path = find_aggregator(settings.afa_aggregator)
        card = card_of(settings.afa_aggregator)
        models = identify_all(card, settings, given)
        key = (path, file_version(path), tuple(models), settings.afa_force, base.dtype)
        if key != self._key:
            try:
                self._loaded = load_for(path, base.unet, models, [base.prediction], settings.afa_force, base.dtype)
            except FusionError as error:
                problem = "; ".join([str(error), *tell_loras(card, models)])
                raise SettingError("afa_aggregator", settings.afa_aggregator, problem) from error
            self._key = key
            log_loaded(f"aggregator {settings.afa_aggregator}", self._loaded, device)
            if settings.afa_force:
                self._warn_of_other_models(path, models)
        return self._loaded.to(device)

    def settle(self, device: torch.device) -> None:
        if self._loaded is not None:
            self._loaded.to(device)

    def free(self) -> None:
        self._key = self._loaded = None

    def _warn_of_other_models(self, path: Path, models: Sequence[ModelIdentity]) -> None:
        try:
            read_card(path).check_models(models)
        except FusionError as error:
            logger.warning("aggregator %s, used by force: %s", path.stem, error)


def identify_all(card: Card, settings: FusionSettings, given: Sequence[AfaModel]) -> list[ModelIdentity]:
    """What the models of a pass are to a file with this card, the base first; raises SettingError.

    Used by force it is not asked which LoRAs they have.
    """
    prompts = [find_loras(expert.prompt, f"experts[{i}].prompt")[1] for i, expert in enumerate(settings.experts)]
    models = []
    for i, (model, own) in enumerate(zip(given, [(), *prompts])):
        others = [lora for lora in model.loras if lora.path not in [Path(call.file) for call in own]]
        wanted = card.models[min(i, len(card.models) - 1)]
        try:
            forced = identify_model(model.file) if settings.afa_force else None
            models.append(forced or identify(model_file(model.file, own), others, wanted))
        except CheckpointError as error:
            field, value = ("afa_aggregator", settings.afa_aggregator) if i == 0 else (
                f"experts[{i - 1}].prompt", settings.experts[i - 1].prompt)  # fmt: skip
            problem = f"a trained aggregator can't be used here ({error}); allowed: afa_maps uniform, or afa_force"
            raise SettingError(field, value, problem) from error
    return models


def tell_loras(card: Card, models: Sequence[ModelIdentity]) -> list[str]:
    """The remedies where models lack LoRAs that a file was trained with, or have others."""
    if len(models) != len(card.models):
        return []
    fields = ["the picture's prompt", *(f"expert {i + 1}'s prompt" for i in range(MAX_EXPERTS))]
    return [
        f"write {prompt_of(wanted)} into {field}" if wanted.loras else f"take the LoRAs out of {field}"
        for field, wanted, model in zip(fields, card.models, models)
        if wanted.name == model.name and sorted(wanted.loras) != sorted(model.loras)
    ]
