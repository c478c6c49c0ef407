"""Experts' U-Nets inside the host: found in its own list, checked, built alone in its own class, kept, and freed.

Building one changes no state of the host; what it computes equals what the host computes with that checkpoint loaded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from modules import devices, sd_disable_initialization, sd_models, sd_models_config, sd_unet, shared
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import nn

from lib_fusion.checkpoint import UNET_PREFIX, Checkpoint, unet_kind
from lib_fusion.errors import CheckpointError, FusionError, SettingError
from lib_fusion.settings import ExpertSettings


@dataclass(frozen=True)
class ExpertKey:
    """What makes a loaded expert reusable. ``loras``: one that LoRAs act on is altered by them, so it is kept apart.

    ``dtype``: how the host stores its models, which a setting of it (FP8 weight) changes between generations.
    """

    file: str
    changed: int
    loras: bool
    dtype: str


@dataclass
class Expert:
    """A loaded U-Net; ``unet`` is None where the expert is the base itself, and nothing is loaded twice."""

    info: Any
    unet: nn.Module | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.unet is None else sum(p.numel() * p.element_size() for p in self.unet.parameters())


class ExpertCache:
    """The loaded experts, most recently used last."""

    def __init__(self) -> None:
        self._experts: OrderedDict[ExpertKey, Expert] = OrderedDict()

    def acquire(self, infos: list[Any], settings: list[ExpertSettings], sd_model: nn.Module) -> list[Expert]:
        """The experts of one pass, loaded where they are not yet; all are checked before any is loaded."""
        for i, info in enumerate(infos):
            check_fits(info, sd_model, f"experts[{i}].checkpoint")
        kind = kind_of(sd_model)
        for key in [key for key, expert in self._experts.items() if unet_kind_of(expert.unet) != kind]:
            del self._experts[key]  # the base has changed to another kind: these can't be used with it
        keys = [
            None if is_base(info, setting, sd_model) else make_key(info, setting)
            for info, setting in zip(infos, settings)
        ]
        needed = {key for key in keys if key is not None}
        limit = max(int(shared.opts.data.get("denoiser_fusion_cache", 1)), len(needed))
        for key in [key for key in self._experts if key not in needed]:
            if len(needed | set(self._experts)) > limit:
                del self._experts[key]
                devices.torch_gc()
        experts = []
        for info, key in zip(infos, keys):
            if key is None:
                experts.append(Expert(info))
                continue
            if key not in self._experts:
                unet = load_unet(info)
                if key.loras:
                    copy_layer_names(sd_model.model.diffusion_model, unet)
                self._experts[key] = Expert(info, unet)
            self._experts.move_to_end(key)
            experts.append(self._experts[key])
        return experts

    def free(self) -> None:
        self._experts.clear()
        devices.torch_gc()

    def sizes(self) -> list[tuple[str, int]]:
        """(name, bytes) of what is loaded. The page asks for it at any time, so of a list as it is now."""
        return [(expert.info.name_for_extra, expert.bytes) for expert in list(self._experts.values())]


def find_checkpoint(name: str, field: str) -> Any:
    """The host's entry of exactly this name (title, file name, or hash); raises SettingError with the names there are.

    The host's own lookup also takes any part of a name, which would quietly use another model than was asked for.
    """
    info = sd_models.checkpoint_aliases.get(name)
    if info is None:
        names = [entry.name for entry in sd_models.checkpoints_list.values()]
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise SettingError(field, name, f"no such checkpoint; allowed: {shown}")
    return info


def list_checkpoints() -> list[str]:
    """Names for the panel: without hashes, since a name gets its hash only when the host has read the file."""
    return [info.name for info in sd_models.checkpoints_list.values()]


def make_key(info: Any, setting: ExpertSettings) -> ExpertKey:
    dtype = torch.float8_e4m3fn if devices.fp8 else devices.dtype_unet
    return ExpertKey(info.filename, Path(info.filename).stat().st_mtime_ns, setting.loras, str(dtype))


def is_base(info: Any, setting: ExpertSettings, sd_model: nn.Module) -> bool:
    """Whether the host's own U-Net is this expert: the same file, and under the same LoRAs."""
    same_file = info.filename == sd_model.sd_checkpoint_info.filename
    return same_file and (setting.loras or not active_loras())


def active_loras() -> list[Any]:
    """The LoRAs that the host has switched on."""
    import sys

    return getattr(sys.modules.get("networks"), "loaded_networks", [])


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
        told = "allowed with Denoiser Fusion: None, since an engine runs neither experts nor hooks"
        raise SettingError("SD Unet", label, told)


def check_fits(info: Any, sd_model: nn.Module, field: str) -> None:
    """Refuses an expert of another kind than the base; raises SettingError. Reads the file's header only."""
    try:
        file = Checkpoint.open(info.filename)
        kind, shapes = file.kind, file.unet_shapes
    except CheckpointError as error:
        raise SettingError(field, info.name, str(error).replace(f"{info.filename}: ", "")) from error
    base = unet_shapes_of(sd_model.model.diffusion_model)
    base_kind = kind_of(sd_model)
    if kind != base_kind:
        raise SettingError(field, info.name, f"it is {kind}; allowed with this base: {base_kind}")
    channels, base_channels = (sum(s["input_blocks.0.0.weight"][1:2]) for s in (shapes, base))
    if channels != base_channels:
        names = {4: "an ordinary", 8: "an instruct-pix2pix", 9: "an inpainting"}
        found, allowed = (f"{names.get(n, 'a')} model ({n} input channels)" for n in (channels, base_channels))
        raise SettingError(field, info.name, f"it is {found}; allowed with this base: {allowed}")
    missing = [key for key in base if key not in shapes]
    if missing:
        told = f"its U-Net lacks {len(missing)} tensors of the base's, such as {missing[0]}"
        raise SettingError(field, info.name, told)
    differ = [key for key, shape in shapes.items() if key in base and base[key] != shape]
    if differ:
        key = differ[0]
        told = f"{key} is {shapes[key]}, allowed with this base: {base[key]}"
        raise SettingError(field, info.name, f"{len(differ)} of its tensors have other shapes; {told}")
    try:
        with built_as_told(info):
            says = file.prediction if file.prediction == "v" else prediction_of_config(config_of(info, kind, sd_model))
    except CheckpointError as error:
        raise SettingError(field, info.name, str(error)) from error
    wanted = "v" if sd_model.parameterization == "v" else "epsilon"
    if says != wanted:
        raise SettingError(field, info.name, f"it predicts {says}; allowed with this base: {wanted}")


def config_of(info: Any, kind: str, sd_model: nn.Module) -> Any:
    """The configuration beside the file, or else the host's guess, which only for SD2 needs the weights."""
    path = sd_models_config.find_checkpoint_config_near_filename(info)
    if path is None:
        path = guess_config(info.filename, info) if kind == "sd2" else sd_model.used_config
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


def unet_kind_of(unet: nn.Module) -> str:
    return unet_kind(unet_shapes_of(unet), found="the base")


def kind_of(sd_model: nn.Module) -> str:
    return unet_kind_of(sd_model.model.diffusion_model)


def read_weights(info: Any) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as the host names them, on the CPU, mapped rather than read; raises CheckpointError.

    Only files that ``Checkpoint.open`` takes: the host's function would unpickle others.
    """
    Checkpoint.open(info.filename)
    try:
        return sd_models.read_state_dict(info.filename, map_location="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{info.name}: can't be read ({error})") from error


def load_unet(info: Any) -> nn.Module:
    """The checkpoint's U-Net alone, in the host's class, on the host's device and in its dtype, ready to run.

    Raises CheckpointError, also where a weight is not a finite number in that dtype.
    """
    weights = read_weights(info)
    with built_as_told(info):
        config = OmegaConf.load(sd_models_config.find_checkpoint_config(weights, info))
        sd_models.repair_config(config, weights)
        params = config.model.params
        node = params.network_config if "network_config" in params else params.unet_config
    dtype = devices.dtype_unet
    # Weights of a mapped file are not aligned, and stay mapped where no cast copies them.
    own = {
        key[len(UNET_PREFIX) :]: value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
        for key, value in weights.items()
        if key.startswith(UNET_PREFIX)
    }
    no_init = sd_disable_initialization.DisableInitialization(), sd_disable_initialization.InitializeOnMeta()
    with built_as_told(info), no_init[0], no_init[1]:
        unet = sd_models.get_obj_from_str(node.target)(**OmegaConf.to_container(node.params, resolve=True))
    wanted = {key: value.shape for key, value in unet.state_dict().items()}
    wrong = [key for key, shape in wanted.items()
             if key not in own or own[key].shape != shape or not own[key].is_floating_point()]  # fmt: skip
    if wrong:
        told = f"{len(wrong)} tensors of its U-Net are not there, not numbers, or of another shape than its .yaml says"
        raise CheckpointError(f"{info.name}: {told}, such as {wrong[0]}")
    unet.load_state_dict({key: own[key] for key in wanted}, assign=True)
    unet.eval().requires_grad_(False)
    unet.dtype = dtype
    check_finite(unet.to(devices.device), info.name)
    if devices.fp8:
        store_in_fp8(unet)
    return unet.to(devices.device)


@contextmanager
def built_as_told(info: Any) -> Iterator[None]:
    """A .yaml beside a checkpoint can say anything; whatever the host makes of it is told with the file's name."""
    try:
        yield
    except (FusionError, MemoryError):
        raise
    except Exception as error:
        told = f"can't be built as its configuration says ({type(error).__name__}: {error})"
        raise CheckpointError(f"{info.name}: {told}") from error


def check_finite(unet: nn.Module, name: str) -> None:
    """Raises CheckpointError where a weight is infinite or not a number: such a model draws noise or black.

    A sum shows it, and takes no second copy of the weights; it is read once for all of them.
    """
    totals = {key: value.sum(dtype=torch.float32) for key, value in unet.state_dict().items()}
    finite = torch.stack(list(totals.values())).isfinite().tolist()
    broken = [key for key, is_finite in zip(totals, finite) if not is_finite]
    if broken:
        told = f"{len(broken)} tensors of its U-Net hold infinite values or NaN, such as {broken[0]}"
        raise CheckpointError(f"{name}: {told}; the file is broken, or not made for {unet.dtype}")


def store_in_fp8(unet: nn.Module) -> None:
    """Rounds the layers that the host's setting "FP8 weight" rounds; they compute in the host's own precision."""
    for layer in unet.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            if shared.opts.cache_fp16_weight:  # what LoRAs are added to
                layer.fp16_weight = layer.weight.data.clone().cpu().half()
                if layer.bias is not None:
                    layer.fp16_bias = layer.bias.data.clone().cpu().half()
            layer.to(torch.float8_e4m3fn)


def copy_layer_names(source: nn.Module, target: nn.Module) -> None:
    """Gives the target's layers the names by which the host's LoRA code finds its layers."""
    layers = dict(target.named_modules())
    for path, module in source.named_modules():
        name = getattr(module, "network_layer_name", None)
        if name is not None and path in layers:
            layers[path].network_layer_name = name
