"""The host's checkpoints: found in its own list by name, and checked by their headers before one is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules import sd_models
from torch import nn

from lib_fusion.errors import CheckpointError, SettingError
from lib_fusion.requests.settings import SAME_AS_BASE, ExpertSettings
from lib_fusion.unet.checkpoint import UNET_PREFIX, Checkpoint
from lib_fusion.webui.models.lora_files import find_loras

#: Tensor names without prefix, and their shapes.
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelKind:
    """What a U-Net is: its ``kind`` (``checkpoint.unet_kind``), and whether it predicts ``epsilon`` or ``v``."""

    kind: str
    prediction: str

    def shares_latents(self, kind: str) -> bool:
        return self.kind == kind or {self.kind, kind} == {"sd1", "sd2"}


def find_expert(setting: ExpertSettings, field: str, sd_model: nn.Module) -> Any:
    """The host's entry of an expert's checkpoint, beside the base ``sd_model``; raises SettingError."""
    if setting.checkpoint == SAME_AS_BASE:
        return sd_model.sd_checkpoint_info
    return find_checkpoint(setting.checkpoint, f"{field}.checkpoint")


def find_checkpoint(name: str, field: str) -> Any:
    """The host's entry of exactly this name (title, file name, or hash); raises SettingError with the names there are.

    A name in full, with folder and ending, goes before one without ending, and that before any other that the host has
    for a file. The host's own lookup takes the file that was listed last, and any part of a name, which would quietly
    use another model than was asked for.
    """
    infos = list_infos()
    for is_named in (
        lambda info: name in (info.name, info.title),
        lambda info: _posix(name) in (_posix(info.name), _posix(info.title)),  # as another system writes it
        lambda info: _posix(name) == _posix(str(Path(info.name).with_suffix(""))),
        lambda info: name in info.ids,
    ):
        found = [info for info in infos if is_named(info)]
        files = {info.sha256 or info.filename for info in found}  # of equal files any will do
        if len(files) > 1:
            several = ", ".join(info.name for info in found)
            raise SettingError(field, name, f"several checkpoints are called so; allowed: {several}")
        if found:
            return found[0]
    info = sd_models.checkpoint_aliases.get(name)  # a file of another format, to be refused as what it is
    if info is None:
        names = list_checkpoints()
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise SettingError(field, name, f"no such checkpoint; allowed: {shown}")
    return info


def _posix(name: str) -> str:
    return name.replace("\\", "/")


def list_infos() -> list[Any]:
    """The host's entries of the checkpoints that can be experts: no pickles are read."""
    return [info for info in list(sd_models.checkpoints_list.values()) if info.is_safetensors]


def list_checkpoints() -> list[str]:
    """Names for the panel: without hashes, since a name gets its hash only when the host has read the file."""
    return [info.name for info in list_infos()]


def is_base(info: Any, sd_model: nn.Module) -> bool:
    """Whether the host's own U-Net is this expert's, under whatever LoRAs."""
    return info.filename == sd_model.sd_checkpoint_info.filename


def check_is_whole(file: Checkpoint) -> None:
    """Refuses a file that holds a U-Net alone, whose tensors' names lack the prefix; raises CheckpointError."""
    if not file.unet_prefix:
        problem = f"it holds a U-Net alone, whose tensors' names do not start with {UNET_PREFIX}"
        raise CheckpointError(f"{file.path}: {problem}; allowed: a whole checkpoint in Stable Diffusion's format")


def check_same_shapes(shapes: Shapes, base: Shapes, field: str, name: str) -> None:
    missing = [key for key in base if key not in shapes]
    if missing:
        problem = f"its U-Net lacks {len(missing)} tensors of the base's, such as {missing[0]}"
        raise SettingError(field, name, problem)
    differ = [key for key, shape in shapes.items() if key in base and base[key] != shape]
    if differ:
        key = differ[0]
        problem = f"{key} is {shapes[key]}, allowed with this base: {base[key]}"
        raise SettingError(field, name, f"{len(differ)} of its tensors have other shapes; {problem}")


def check_other_kind(shapes: Shapes, kind: str, setting: ExpertSettings, base: Shapes, field: str) -> None:
    """What an expert of another kind than the base can't share with it."""
    width, base_width = (
        next(shape[1] for key, shape in s.items() if key.endswith("attn2.to_k.weight")) for s in (shapes, base)
    )
    if setting.text_encoder == "base" and width != base_width:
        widths = f"takes texts of width {width}, the base's have {base_width}"
        problem = f"the expert is {kind}, which {widths}; allowed: own"
        raise SettingError(f"{field}.text_encoder", "base", problem)
    if setting.loras:
        problem = f"the expert is {kind} and the picture's LoRAs are made for the base's kind; allowed: false"
        raise SettingError(f"{field}.loras", True, problem)
    if find_loras(setting.prompt, f"{field}.prompt")[1]:
        problem = f"the expert is {kind}; allowed: no LoRAs, since the host reads them for the base's kind only"
        raise SettingError(f"{field}.prompt", setting.prompt, problem)
