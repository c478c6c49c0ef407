"""Experts' U-Nets inside the host: found in its own list, checked, built alone in its own class, kept, and freed.

Building one changes no state of the host; what it computes equals what the host computes with that checkpoint loaded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from modules import devices, sd_disable_initialization, sd_models, sd_models_config, sd_unet, shared
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import nn

from lib_fusion.errors import CheckpointError, FusionError, SettingError
from lib_fusion.files import file_version
from lib_fusion.log import log_loaded
from lib_fusion.requests.settings import SAME_AS_BASE, ExpertSettings
from lib_fusion.unet.checkpoint import UNET_PREFIX, Checkpoint, unet_kind
from lib_fusion.webui.a1111.loras import LoraCache, loras_of
from lib_fusion.webui.a1111.placement import home_of, settle
from lib_fusion.webui.a1111.worn import Wearable, merge_into
from lib_fusion.webui.models.checkpoints import (
    ModelKind,
    check_is_whole,
    check_other_kind,
    check_same_shapes,
    is_base,
)
from lib_fusion.webui.models.lora_files import LoraCall
from lib_fusion.webui.options import read_option


@dataclass(frozen=True)
class ExpertKey:
    """What makes a loaded expert reusable. ``loras``: they are merged into it, so with others it is another.

    ``dtype``: how the host stores its models, which a setting of it (FP8 weight) changes between generations.
    """

    file: str
    changed: tuple[int, int]
    loras: tuple[LoraCall, ...]
    dtype: str


@dataclass
class Expert:
    """A loaded U-Net; ``unet`` is None where the expert is the base itself, and nothing is loaded twice.

    ``loras``: those that act on it. ``worn``: what the base's layers have during its calls, where they are not those of
    the base.
    """

    info: Any
    model: ModelKind
    unet: nn.Module | None = None
    loras: tuple[LoraCall, ...] = ()
    worn: Wearable | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.unet is None else sum(p.numel() * p.element_size() for p in self.unet.parameters())

    def wearing(self, part: nn.Module | None = None) -> AbstractContextManager[None]:
        """Within, the base's layers (or only those in ``part``) are this expert's."""
        return nullcontext() if self.worn is None else self.worn.on(part)


class ExpertCache:
    """The loaded experts, most recently used last."""

    def __init__(self) -> None:
        self._experts: OrderedDict[ExpertKey, Expert] = OrderedDict()
        self.loras = LoraCache()

    def acquire(
        self, infos: list[Any], settings: list[ExpertSettings], sd_model: nn.Module, alike: bool
    ) -> list[Expert]:
        """The experts of one pass, loaded where they are not yet; all are checked before any is loaded.

        ``alike``: whether they must be of the base's own architecture and prediction.
        """
        models = [
            check_fits(info, setting, sd_model, f"experts[{i}]", alike)
            for i, (info, setting) in enumerate(zip(infos, settings))
        ]
        kind = kind_of_model(sd_model).kind
        for key in [key for key, expert in self._experts.items() if not expert.model.shares_latents(kind)]:
            del self._experts[key]  # the base has changed to another kind: these can't be used with it
        fields = [f"experts[{i}]" for i in range(len(infos))]
        acting = [loras_of(setting, name) for setting, name in zip(settings, fields)]
        self.loras.networks.keep_only(call for calls in acting for call in calls)
        keys = [None if is_base(info, sd_model) else make_key(info, calls) for info, calls in zip(infos, acting)]
        needed = {key for key in keys if key is not None}
        limit = max(read_option("cache"), len(needed))
        for key in [key for key in self._experts if key not in needed]:
            if len(needed | set(self._experts)) > limit:
                del self._experts[key]
                devices.torch_gc()
        on_base = [i for i, key in enumerate(keys) if key is None]
        worn = self.loras.acquire([(acting[i], f"{fields[i]}.prompt") for i in on_base], sd_model)
        experts = []
        for i, (info, model, key) in enumerate(zip(infos, models, keys)):
            if key is None:
                experts.append(Expert(info, model, loras=acting[i], worn=worn[on_base.index(i)]))
                continue
            if key not in self._experts:
                unet = load_unet(info, home_of(sd_model), bool(key.loras))
                if key.loras:
                    name = f"{fields[i]}.prompt"
                    copy_layer_names(sd_model.model.diffusion_model, unet)
                    merge_into(unet, self.loras.nets(key.loras, sd_model, name), name)
                    settle(unet, home_of(sd_model))
                self._experts[key] = Expert(info, model, unet, key.loras)
                log_loaded(f"expert {info.name}, its U-Net", unet)
            self._experts.move_to_end(key)
            experts.append(self._experts[key])
        return experts

    def free(self) -> None:
        self._experts.clear()
        self.loras.free()

    def settle(self, device: torch.device) -> None:
        """Moves all that is loaded to where it waits."""
        self.loras.settle(device)
        for expert in self._experts.values():
            settle(expert.unet, device)

    def on_gpu(self) -> dict[str, int]:
        """The files of the experts that are on the device, and their bytes."""
        return {expert.info.filename: expert.bytes for expert in list(self._experts.values())
                if expert.unet is not None and next(expert.unet.parameters()).device.type != "cpu"}  # fmt: skip

    def sizes(self) -> list[tuple[str, int]]:
        """(name, bytes) of what is loaded. The page asks for it at any time, so of a list as it is now."""
        sizes = [(expert.info.name_for_extra, expert.bytes) for expert in list(self._experts.values())]
        return [*sizes, ("LoRAs of experts", self.loras.bytes)] if self.loras.bytes else sizes


def make_key(info: Any, loras: tuple[LoraCall, ...]) -> ExpertKey:
    dtype = torch.float8_e4m3fn if devices.fp8 else devices.dtype_unet
    return ExpertKey(info.filename, file_version(info.filename), loras, str(dtype))


def check_base(sd_model: nn.Module) -> None:
    """Refuses base models and engines that nothing can be fused with; raises SettingError."""
    name = sd_model.sd_checkpoint_info.name_for_extra
    allowed = "allowed: Stable Diffusion 1, 2 and XL"
    if getattr(sd_model, "is_sd3", False):
        raise SettingError("base checkpoint", name, f"it is Stable Diffusion 3; {allowed}")
    if getattr(sd_model, "is_ssd", False):
        raise SettingError("base checkpoint", name, f"it is SSD-1B; {allowed}")
    if getattr(sd_model, "cond_stage_key", "txt") == "edit":
        raise SettingError("base checkpoint", name, f"it is an instruct-pix2pix model; {allowed}")
    if sd_unet.current_unet is not None:
        label = getattr(sd_unet.current_unet.option, "label", "?")
        problem = "allowed with Denoiser Fusion: None, since an engine runs neither experts nor hooks"
        raise SettingError("SD Unet", label, problem)


def check_fits(info: Any, setting: ExpertSettings, sd_model: nn.Module, field: str, alike: bool) -> ModelKind:
    """What an expert is; raises SettingError for one that can't go with the base. Reads the file's header only.

    SD1 and SD2 share their latents, so unless they must be ``alike``, each may be the other's expert, with its own text
    encoder; and a model that predicts v may be the expert of one that predicts the noise, or the other way round.
    """
    checkpoint = f"{field}.checkpoint"
    if setting.checkpoint == SAME_AS_BASE:
        return kind_of_model(sd_model)
    try:
        file = Checkpoint.open(info.filename)
        kind, shapes = file.kind, file.unet_shapes
        check_is_whole(file)
    except CheckpointError as error:
        raise SettingError(checkpoint, info.name, str(error).replace(f"{info.filename}: ", "")) from error
    base, base_shapes = kind_of_model(sd_model), unet_shapes_of(sd_model.model.diffusion_model)
    allowed_with = "allowed with this base" + (" and AFA" if alike else "")
    if kind != base.kind and (alike or not base.shares_latents(kind)):
        raise SettingError(checkpoint, info.name, f"it is {kind}; {allowed_with}: {base.kind}")
    channels, base_channels = (sum(s["input_blocks.0.0.weight"][1:2]) for s in (shapes, base_shapes))
    if channels != base_channels:
        names = {4: "an ordinary", 8: "an instruct-pix2pix", 9: "an inpainting"}
        found, allowed = (f"{names.get(n, 'a')} model ({n} input channels)" for n in (channels, base_channels))
        raise SettingError(checkpoint, info.name, f"it is {found}; allowed with this base: {allowed}")
    if kind == base.kind:
        check_same_shapes(shapes, base_shapes, checkpoint, info.name)
    else:
        check_other_kind(shapes, kind, setting, base_shapes, field)
    prediction = file.prediction
    if prediction != "v":
        try:
            with built_as_told(info):
                prediction = prediction_of_config(config_of(info, kind, sd_model))
        except CheckpointError as error:
            raise SettingError(checkpoint, info.name, str(error)) from error
    if alike and prediction != base.prediction:
        raise SettingError(checkpoint, info.name, f"it predicts {prediction}; {allowed_with}: {base.prediction}")
    return ModelKind(kind, prediction)


def config_of(info: Any, kind: str, sd_model: nn.Module) -> Any:
    """The .yaml next to the file, or else the host's guess, which for SD2 runs a U-Net."""
    path = sd_models_config.find_checkpoint_config_near_filename(info)
    if path is None:
        base = kind_of_model(sd_model)  # one that predicts v has a configuration of its own, which says so
        known = kind != "sd2" and kind == base.kind and base.prediction != "v"
        path = sd_model.used_config if known else guess_config(info.filename, info)
    return OmegaConf.load(path)


@lru_cache(maxsize=32)
def guess_config(filename: str, info: Any) -> str:
    """The host's guess, which runs an SD2 U-Net once to see what it predicts."""
    return sd_models_config.guess_model_config_from_state_dict(read_weights(info), filename)


def prediction_of_config(config: Any) -> str:
    """``v`` or ``epsilon``, from a checkpoint's configuration in the host's format."""
    params = config.model.params
    scaling = OmegaConf.select(params, "denoiser_config.params.scaling_config.target") or ""
    return "v" if params.get("parameterization") == "v" or scaling.endswith("VScaling") else "epsilon"


def unet_shapes_of(unet: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in unet.state_dict().items()}


def kind_of_model(sd_model: nn.Module) -> ModelKind:
    """What the host's own model is."""
    kind = unet_kind(unet_shapes_of(sd_model.model.diffusion_model), found="the base")
    return ModelKind(kind, "v" if sd_model.parameterization == "v" else "epsilon")


def read_weights(info: Any) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as the host names them, on the CPU, mapped rather than read; raises CheckpointError.

    Only files that ``Checkpoint.open`` takes: the host's function would unpickle others.
    """
    Checkpoint.open(info.filename)
    try:
        return sd_models.read_state_dict(info.filename, map_location="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{info.name}: can't be read ({error})") from error


def read_config(info: Any, weights: dict[str, torch.Tensor]) -> Any:
    """The parameters of a checkpoint's model, as the host builds it."""
    config = OmegaConf.load(sd_models_config.find_checkpoint_config(weights, info))
    sd_models.repair_config(config, weights)
    return config.model.params


def load_unet(info: Any, device: torch.device, loras: bool = False) -> nn.Module:
    """The checkpoint's U-Net alone, in the host's class and its dtype, on ``device``, ready to run.

    Each tensor is cast, checked and moved as it is read, so the U-Net is in memory once. ``loras``: whether the LoRAs
    of the picture's prompt will act on it. Raises CheckpointError, also where a weight is not a finite number in that
    dtype.
    """
    with built_as_told(info):
        params = read_config(info, read_weights(info))
        node = params.network_config if "network_config" in params else params.unet_config
    no_init = sd_disable_initialization.DisableInitialization(), sd_disable_initialization.InitializeOnMeta()
    with built_as_told(info), no_init[0], no_init[1]:
        unet = sd_models.get_obj_from_str(node.target)(**OmegaConf.to_container(node.params, resolve=True))
    unet.eval().requires_grad_(False)
    unet.dtype = devices.dtype_unet
    wanted = {key: value.shape for key, value in unet.state_dict().items()}
    layers = rounded_layers(unet) if devices.fp8 else {}
    own: dict[str, torch.Tensor] = {}
    totals: dict[str, torch.Tensor] = {}
    for key, value in Checkpoint.open(info.filename).stream(UNET_PREFIX):
        if value.shape == wanted.get(key) and value.is_floating_point():
            value = arrange(value.to(device, unet.dtype))
            totals[key] = value.to(devices.device).sum(dtype=torch.float32)
            own[key] = value if key not in layers else in_fp8(layers[key], key, value, loras)
    lacking = [key for key in wanted if key not in own]
    if lacking:
        problem = "tensors of its U-Net are not there, not numbers, or of another shape than its .yaml says"
        raise CheckpointError(f"{info.name}: {len(lacking)} {problem}, such as {lacking[0]}")
    check_finite(totals, info.name, unet.dtype)
    unet.load_state_dict(own, assign=True)
    return unet.requires_grad_(False)


def arrange(value: torch.Tensor) -> torch.Tensor:
    """A weight in the order of numbers that the host's flag --opt-channelslast wants of its own model's."""
    if shared.cmd_opts.opt_channelslast and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


@contextmanager
def built_as_told(info: Any) -> Iterator[None]:
    """A checkpoint's .yaml can say anything; errors that the host raises for it are reported with the file's name."""
    try:
        yield
    except (FusionError, MemoryError):
        raise
    except Exception as error:
        problem = f"can't be built as its configuration says ({type(error).__name__}: {error})"
        raise CheckpointError(f"{info.name}: {problem}") from error


def check_finite(totals: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> None:
    """Raises CheckpointError where a weight is infinite or not a number: such a model draws noise or black.

    ``totals``: the sum of each tensor in float32, which shows it. All of them are read at once.
    """
    finite = torch.stack(list(totals.values())).isfinite().tolist()
    broken = [key for key, is_finite in zip(totals, finite) if not is_finite]
    if broken:
        problem = f"{len(broken)} tensors of its U-Net hold infinite values or NaN, such as {broken[0]}"
        raise CheckpointError(f"{name}: {problem}; the file is broken, or not made for {dtype}")


def rounded_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that the host's setting "FP8 weight" rounds, by the names of their weights."""
    return {
        f"{path}.{name}": layer
        for path, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
        for name in layer._parameters
    }


def in_fp8(layer: nn.Module, key: str, value: torch.Tensor, loras: bool) -> torch.Tensor:
    """A layer's weight or bias rounded; it computes in the host's own precision.

    Where LoRAs act on it, the layer keeps what they are added to, as the host's own layers do.
    """
    if loras and shared.opts.cache_fp16_weight:
        setattr(layer, f"fp16_{key.rpartition('.')[2]}", value.to(devices.cpu, torch.half, copy=True))
    return value.to(torch.float8_e4m3fn)


def store_in_fp8(model: nn.Module, loras: bool) -> None:
    """Rounds a model's layers as the host does where its setting "FP8 weight" is on."""
    for key, layer in rounded_layers(model).items():
        name = key.rpartition(".")[2]
        if layer._parameters[name] is not None:
            value = in_fp8(layer, key, layer._parameters[name].data, loras)
            layer._parameters[name] = nn.Parameter(value, requires_grad=False)


def copy_layer_names(source: nn.Module, target: nn.Module) -> None:
    """Gives the target's layers the names by which the host's LoRA code finds its layers."""
    layers = dict(target.named_modules())
    for path, module in source.named_modules():
        name = getattr(module, "network_layer_name", None)
        if name is not None and path in layers:
            layers[path].network_layer_name = name
