"""Experts as Forge's backend loads them: whole engines, with LoRAs as patches, in its own memory manager's hands."""

from __future__ import annotations

import ast
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from backend import memory_management
from backend.args import dynamic_args
from backend.loader import forge_loader
from modules import sd_models, shared
from torch import nn

from lib_fusion.errors import CheckpointError, FusionError, SettingError
from lib_fusion.files import file_version
from lib_fusion.log import log_loaded
from lib_fusion.requests.settings import SAME_AS_BASE, ExpertSettings
from lib_fusion.unet.checkpoint import Checkpoint, unet_kind
from lib_fusion.webui.models import lora_files
from lib_fusion.webui.models.checkpoints import (
    ModelKind,
    check_is_whole,
    check_other_kind,
    check_same_shapes,
    find_expert,
    is_base,
)
from lib_fusion.webui.options import read_option

PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v_prediction": "v"}
#: What the backend calls otherwise than people do.
OTHER_PREDICTIONS = {"const": "a flow", "edm": "as EDM does"}
ALLOWED = "allowed: Stable Diffusion 1, 2 and XL"


@dataclass(frozen=True)
class Lora:
    """A LoRA on a model: its file, and its strengths in the U-Net and in the text encoders."""

    file: str
    unet: float
    te: float


@dataclass(frozen=True)
class EngineKey:
    """What makes a loaded engine reusable. ``place``: which of several with other LoRAs on the same file it is."""

    file: str
    changed: tuple[int, int]
    how: str
    place: int


@dataclass
class Expert:
    """One expert of a pass. ``patcher`` is the base's own where ``is_base``: the same weights under the same LoRAs.

    ``engine`` has the text encoder that is its own; ``clip`` is that with the expert's LoRAs.
    """

    info: Any
    model: ModelKind
    engine: Any
    patcher: Any
    clip: Any
    loras: tuple[Lora, ...]
    is_base: bool

    @property
    def unet(self) -> nn.Module:
        return self.patcher.model.diffusion_model


class Engines:
    """The loaded engines of experts, most recently used last."""

    def __init__(self) -> None:
        self._engines: OrderedDict[EngineKey, Any] = OrderedDict()

    def acquire(self, settings: Sequence[ExpertSettings], sd_model: Any, alike: bool) -> list[Expert]:
        """The experts of one pass, loaded where they are not yet; all are checked before any is loaded.

        ``alike``: whether they must be of the base's own architecture and prediction.
        """
        fields = [f"experts[{i}]" for i in range(len(settings))]
        infos = [find_expert(setting, name, sd_model) for setting, name in zip(settings, fields)]
        if infos:
            check_files(infos, settings, sd_model, fields, alike)
        acting = [loras_of(setting, name, sd_model) for setting, name in zip(settings, fields)]
        keys = self._keys(infos, acting, sd_model)
        self._make_room({key for key in keys if key is not None})
        experts = []
        for i, (info, key) in enumerate(zip(infos, keys)):
            engine = sd_model if key is None else self._engine(key, info)
            expert = make_expert(info, engine, acting[i], sd_model, fields[i])
            if alike and expert.model.prediction != kind_of(sd_model).prediction:
                problem = f"it predicts {expert.model.prediction}; allowed with this base and AFA"
                raise SettingError(f"{fields[i]}.checkpoint", info.name, f"{problem}: {kind_of(sd_model).prediction}")
            experts.append(expert)
        return experts

    def free(self) -> None:
        self._engines.clear()
        memory_management.soft_empty_cache()

    def sizes(self) -> list[tuple[str, int]]:
        """(name, bytes) of the U-Nets that are loaded."""
        return [(engine.sd_checkpoint_info.name_for_extra, size_of(engine.forge_objects.unet.model))
                for engine in list(self._engines.values())]  # fmt: skip

    @property
    def bytes(self) -> int:
        parts = [(e.forge_objects.unet.model, e.forge_objects.clip.cond_stage_model) for e in self._engines.values()]
        return sum(size_of(part) for both in parts for part in both)

    def _keys(self, infos: Sequence[Any], acting: Sequence[tuple], sd_model: Any) -> list[EngineKey | None]:
        """Where each expert's weights are; None: in the base, which has them under the same LoRAs."""
        how = str({k: v for k, v in sd_models.model_data.forge_loading_parameters.items() if k != "checkpoint_info"})
        on_base = loras_of_picture(sd_model)
        sets: dict[str, list[tuple]] = {}
        keys: list[EngineKey | None] = []
        for info, loras in zip(infos, acting):
            if is_base(info, sd_model) and unets_of(loras) == unets_of(on_base):
                keys.append(None)
                continue
            known = sets.setdefault(info.filename, [])
            if unets_of(loras) not in known:
                known.append(unets_of(loras))
            place = known.index(unets_of(loras))
            keys.append(EngineKey(info.filename, file_version(info.filename), how, place))
        return keys

    def _make_room(self, needed: set[EngineKey]) -> None:
        limit = max(read_option("cache"), len(needed))
        for key in [key for key in self._engines if key not in needed]:
            if len(needed | set(self._engines)) > limit:
                del self._engines[key]

    def _engine(self, key: EngineKey, info: Any) -> Any:
        if key not in self._engines:
            self._engines[key] = load_engine(info)
            log_loaded(f"expert {info.name}", self._engines[key].forge_objects.unet.model)
        self._engines.move_to_end(key)
        return self._engines[key]


def check_base(sd_model: Any, uses_blocks: bool) -> None:
    """Refuses base models that nothing can be fused with; raises SettingError.

    ``uses_blocks``: whether a method acts in the U-Net's blocks (AFA, FreeU).
    """
    info = getattr(sd_model, "sd_checkpoint_info", None)
    name = getattr(info, "name_for_extra", type(sd_model).__name__)
    model = sd_model.forge_objects.unet.model
    if not hasattr(model.diffusion_model, "input_blocks"):
        raise SettingError("base checkpoint", name, f"it is no U-Net of Stable Diffusion; {ALLOWED}")
    predicts = model.predictor.prediction_type
    if predicts not in PREDICTIONS:
        predicts = OTHER_PREDICTIONS.get(predicts, predicts)
        raise SettingError("base checkpoint", name, f"it predicts {predicts}; allowed: models that predict noise or v")
    if uses_blocks and (hasattr(model, "_orig_apply_model") or hasattr(model.diffusion_model, "_orig_mod")):
        problem = "allowed with FreeU and AFA: off, since compiled models run without the hooks on their blocks"
        raise SettingError("torch.compile", "on", problem)


def kind_of(sd_model: Any) -> ModelKind:
    """What an engine's U-Net is; raises CheckpointError for other models."""
    model = sd_model.forge_objects.unet.model
    shapes = {key: tuple(value.shape) for key, value in model.diffusion_model.state_dict().items()}
    return ModelKind(unet_kind(shapes, found="the base"), PREDICTIONS[model.predictor.prediction_type])


def check_files(
    infos: Sequence[Any], settings: Sequence[ExpertSettings], sd_model: Any, fields: Sequence[str], alike: bool
) -> None:
    """Refuses experts that can't go with the base, by their files' headers; raises SettingError."""
    model = sd_model.forge_objects.unet.model.diffusion_model
    shapes, base = {key: tuple(value.shape) for key, value in model.state_dict().items()}, kind_of(sd_model)
    for info, setting, field in zip(infos, settings, fields):
        if setting.checkpoint == SAME_AS_BASE or is_base(info, sd_model):
            continue
        name = f"{field}.checkpoint"
        try:
            file = Checkpoint.open(info.filename)
            kind = file.kind
            check_is_whole(file)
        except CheckpointError as error:
            raise SettingError(name, info.name, str(error).replace(f"{info.filename}: ", "")) from error
        if kind != base.kind and (alike or not base.shares_latents(kind)):
            allowed = "allowed with this base" + (" and AFA" if alike else "")
            raise SettingError(name, info.name, f"it is {kind}; {allowed}: {base.kind}")
        channels, base_channels = (sum(s["input_blocks.0.0.weight"][1:2]) for s in (file.unet_shapes, shapes))
        if channels != base_channels:
            problem = f"it has {channels} input channels; allowed with this base: {base_channels}"
            raise SettingError(name, info.name, problem)
        if kind == base.kind:
            check_same_shapes(file.unet_shapes, shapes, name, info.name)
        else:
            check_other_kind(file.unet_shapes, kind, setting, shapes, field)


def load_engine(info: Any) -> Any:
    """A second checkpoint as the host would load it, with the same low bits and added modules; raises CheckpointError.

    Without its VAE, which no expert needs.
    """
    modules = sd_models.model_data.forge_loading_parameters.get("additional_modules") or []
    try:
        with unchanged_arguments():
            engine = forge_loader(info.filename, additional_state_dicts=modules)
    except (FusionError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{info.name}: this WebUI can't load it ({type(error).__name__}: {error})") from error
    if engine is None:
        raise CheckpointError(f"{info.name}: this WebUI does not know this kind of model; {ALLOWED}")
    engine.sd_checkpoint_info = info
    engine.extra_generation_params, engine.comments = {}, []
    for objects in (engine.forge_objects, engine.forge_objects_original, engine.forge_objects_after_applying_lora):
        objects.vae = None
    return engine


@contextmanager
def unchanged_arguments() -> Iterator[None]:
    """Within, loading and encoding may write to what the backend keeps of the loaded checkpoint; it comes back after.

    Forge has a dict for it, Neo a class.
    """
    if isinstance(dynamic_args, dict):
        before = dict(dynamic_args)
        try:
            yield
        finally:
            dynamic_args.clear()
            dynamic_args.update(before)
        return
    before = {key: value for key, value in vars(dynamic_args).items()
              if not key.startswith("_") and not isinstance(value, classmethod)}  # fmt: skip
    contents = {key: value.copy() for key, value in before.items() if isinstance(value, (list, dict))}
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(dynamic_args, key, value)
        for key, value in contents.items():  # which are cleared in place
            if isinstance(value, dict):
                before[key].clear()
                before[key].update(value)
            else:
                before[key][:] = value


def loras_of_picture(sd_model: Any) -> tuple[Lora, ...]:
    """The LoRAs that the host has put on its own model for the picture's prompt."""
    try:
        return tuple(Lora(file, float(unet), float(te))
                     for file, unet, te, *_ in ast.literal_eval(sd_model.current_lora_hash))  # fmt: skip
    except (ValueError, SyntaxError, TypeError) as error:
        told = sd_model.current_lora_hash
        raise FusionError(f"the picture's LoRAs can't be read from this WebUI ({told})") from error


def loras_of(expert: ExpertSettings, field: str, sd_model: Any) -> tuple[Lora, ...]:
    """All LoRAs that act on an expert: the picture's where that is asked for, then its own; raises SettingError."""
    calls = lora_files.find_loras(expert.prompt, f"{field}.prompt")[1]
    own = [Lora(call.file, call.unet, call.te) for call in calls]
    named = [lora.file for lora in own]
    shared_ones = loras_of_picture(sd_model) if expert.loras else ()
    return (*(lora for lora in shared_ones if lora.file not in named), *own)


def unets_of(loras: Sequence[Lora]) -> tuple:
    """Those of the LoRAs that change a U-Net."""
    return tuple((lora.file, lora.unet) for lora in loras if lora.unet)


def make_expert(info: Any, engine: Any, loras: tuple[Lora, ...], sd_model: Any, field: str) -> Expert:
    """An expert with its LoRAs as patches on clones, which the host merges when it loads them; raises SettingError."""
    on_base = engine is sd_model
    if on_base and loras == loras_of_picture(sd_model):
        objects = sd_model.forge_objects
        return Expert(info, kind_of(engine), engine, objects.unet, objects.clip, loras, True)
    original = engine.forge_objects_original
    unet, clip = original.unet, original.clip
    for lora in loras:
        unet, clip = with_lora(unet, clip, lora, f"{field}.prompt")
    if on_base:  # LoRAs that leave the U-Net alone
        return Expert(info, kind_of(engine), engine, sd_model.forge_objects.unet, clip, loras, True)
    return Expert(info, kind_of(engine), engine, unet, clip, loras, False)


def with_lora(unet: Any, clip: Any, lora: Lora, field: str) -> tuple[Any, Any]:
    """Clones of both with the LoRA on them, by the host's own code; raises SettingError where it fits neither."""
    networks = lora_files.host()
    try:
        weights = networks.load_lora_state_dict(lora.file)
        if any(key.startswith("lora_unet__") for key in weights):  # as Neo reads files with this name
            weights = {key.replace("lora_unet__", "lora_unet_", 1): value for key, value in weights.items()}
        found = networks.load_lora_for_models(
            unet, clip, weights, lora.unet, lora.te, filename=lora.file, online_mode=is_online(unet)
        )
    except Exception as error:
        raise SettingError(field, lora.file, f"this LoRA can't be put on the expert ({error})") from error
    if found[0] is unet and found[1] is clip:
        raise SettingError(field, lora.file, "it fits no layer of the expert; allowed: a LoRA for its kind of model")
    return found


def is_online(unet: Any) -> bool:
    """Whether the host adds LoRAs at each call instead of merging them; Forge merges where weights are whole floats."""
    if isinstance(dynamic_args, dict) and unet.model.storage_dtype in (torch.float32, torch.float16, torch.bfloat16):
        return False
    return bool(dynamic_args.get("online_lora", False))


def size_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def guidance_of(p: Any) -> float:
    """The guidance scale of the pass that comes."""
    if getattr(p, "is_hr_pass", False):
        return float(p.hr_cfg)
    return float(p.cfg_scale)


def clip_skip() -> int:
    return int(shared.opts.CLIP_stop_at_last_layers)
