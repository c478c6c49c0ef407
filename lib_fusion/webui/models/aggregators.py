"""AFA in the host: the list of aggregator files, the experts that a file is for, and the one that a pass uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from lib_fusion.requests.loras import read_tags
from lib_fusion.requests.settings import MAX_EXPERTS, ExpertSettings, FusionSettings
from lib_fusion.webui.models.checkpoints import list_infos

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
    return replace(settings, experts=tuple(ExpertSettings(name) for name in experts_of(card)))


def card_of(name: str) -> Card:
    """The card of a file in the list; raises SettingError."""
    try:
        return read_card(find_aggregator(name))
    except SettingError:
        raise
    except FusionError as error:
        raise SettingError("afa_aggregator", name, str(error)) from error


def experts_of(card: Card) -> list[str]:
    """The host's names of the checkpoints that a file is for, after the base; raises SettingError where one lacks."""
    names = []
    for model in card.models[1:]:
        infos = [info for info in list_infos() if Path(info.filename).stem == model.name]
        info = next((info for info in infos if len(infos) == 1 or is_model(info, model)), *infos[:1] or [None])
        if info is None:
            problem = f"it is for {', '.join(m.name for m in card.models)}; {model.name} is not among the checkpoints"
            raise SettingError("afa_aggregator", model.name, problem)
        names.append(info.name)
    return names


def is_model(info: Any, model: ModelIdentity) -> bool:
    """Whether a checkpoint's U-Net is the one that a card means; hashing it takes seconds, once for each file."""
    try:
        return identify_model(info.filename).unet == model.unet
    except (CheckpointError, OSError):
        return False


def implied_by(name: str) -> dict[str, str]:
    """What choosing a file chooses, too, by the fields' elements: the method, and each expert; raises SettingError."""
    names = experts_of(card_of(name))
    names += [NO_CHECKPOINT[1]] * (MAX_EXPERTS - len(names))
    return {"method": "AFA", **{f"expert{i + 1}_checkpoint": names[i] for i in range(MAX_EXPERTS)}}


@dataclass(frozen=True)
class AfaBase:
    """What aggregators must fit: the base's U-Net, what it predicts (``epsilon`` or ``v``), and the dtype it has."""

    unet: nn.Module
    prediction: str
    dtype: torch.dtype


class AggregatorCache:
    """The aggregators that were used last."""

    def __init__(self) -> None:
        self._key: Any = None
        self._loaded: nn.ModuleList | None = None

    def choose(
        self, settings: FusionSettings, base: AfaBase, files: Sequence[str], device: torch.device
    ) -> nn.Module:
        """What joins a pass's models: the trained aggregators, or a control; raises SettingError.

        ``files``: those of the models, the base's first.
        """
        if settings.needs_aggregator:
            if not settings.afa_force:
                refuse_loras(settings)
            return self.load(settings, base, files, device)
        if settings.afa_maps == "uniform":
            return afa.uniform(len(files)).to(device)
        if settings.only_model < len(files):
            return afa.one_hot(len(files), settings.only_model).to(device)
        raise SettingError("afa_maps", settings.afa_maps, f"allowed: one of the {len(files)} models")

    def load(
        self, settings: FusionSettings, base: AfaBase, files: Sequence[str], device: torch.device
    ) -> nn.ModuleList:
        """The trained ones; raises SettingError where they are not for these models."""
        path = find_aggregator(settings.afa_aggregator)
        models = [identify_model(file) for file in files]
        key = (path, file_version(path), tuple(models), settings.afa_force, base.dtype)
        if key != self._key:
            try:
                self._loaded = load_for(path, base.unet, models, [base.prediction], settings.afa_force, base.dtype)
            except FusionError as error:
                raise SettingError("afa_aggregator", settings.afa_aggregator, str(error)) from error
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


def refuse_loras(settings: FusionSettings) -> None:
    """Raises SettingError for experts with LoRAs of their own: a file knows its models by their U-Nets alone."""
    for i, expert in enumerate(settings.experts):
        if read_tags(expert.prompt, f"experts[{i}].prompt")[1]:
            problem = "the aggregator was trained for the checkpoint without LoRAs"
            raise SettingError(f"experts[{i}].prompt", expert.prompt,
                               f"{problem}; allowed: no LoRAs, afa_maps uniform, or afa_force")  # fmt: skip
