"""Reading checkpoints in the original Stable Diffusion format, part by part, from ``.safetensors`` only.

A file's kind follows from its tensors' names and shapes; only its header is read until a part is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lib_fusion.errors import CheckpointError

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model."  # SD1: transformer.*, SD2: model.*; SDXL keeps its two under conditioner.*
SDXL_TEXT_PREFIX = "conditioner."

#: What to tell the owner of a file that is something else: (substring of a key, what it is).
FOREIGN = (
    ("lora", "a LoRA"),
    ("joint_blocks.", "a Stable Diffusion 3 transformer"),
    ("double_blocks.", "a FLUX transformer"),
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("down_blocks.", "a model in diffusers' format"),
    ("emb_params", "a textual inversion embedding"),
)


#: The format's names of dtypes (https://github.com/huggingface/safetensors).
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """The header of one ``.safetensors`` file; its parts are read on demand.

    ``shapes`` maps each tensor's name to its shape, ``metadata`` is the file's own string table.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads the header. Raises CheckpointError if the file is missing, truncated, or not safetensors."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        if path.suffix.lower() != ".safetensors":
            raise CheckpointError(
                f"{path}: only .safetensors files are read, this is {path.suffix or 'without suffix'}"
            )
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                return cls(path, shapes, file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error

    def stream(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors whose names start with ``prefix``, by their names without it, in the order of the file.

        Each is read into memory of its own when it is asked for, so a caller that moves or casts it at once holds one
        copy of the part and one tensor more; a mapped file would count as a second copy. Raises CheckpointError.
        """
        try:
            with self.path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                entries = [(key, entry) for key, entry in header.items() if key in self.shapes]
                for key, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
                    if key.startswith(prefix):
                        start, stop = entry["data_offsets"]
                        data = torch.empty(stop - start, dtype=torch.uint8)
                        file.seek(8 + size + start)
                        if file.readinto(data.numpy().data) != stop - start:
                            raise ValueError("truncated")
                        yield key[len(prefix) :], data.view(DTYPES[entry["dtype"]]).view(self.shapes[key])
        except KeyError as error:
            raise CheckpointError(f"{self.path}: can't be read (tensors of the type {error})") from error
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: can't be read ({error})") from error

    def read(self, prefix: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The tensors whose names start with ``prefix``, without it; on the CPU, floats cast to ``dtype``."""
        try:
            return {
                key: value.to(dtype if dtype and value.is_floating_point() else value.dtype)
                for key, value in self.stream(prefix)
            }
        except NotImplementedError as error:  # a dtype that torch can't cast
            raise CheckpointError(f"{self.path}: can't be read ({error})") from error

    @cached_property
    def unet_prefix(self) -> str:
        """What the names of the U-Net's tensors start with: nothing in a file that holds just a U-Net."""
        return unet_prefix(self.shapes)

    @cached_property
    def unet_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the U-Net's tensors, by their names without prefix."""
        prefix = self.unet_prefix
        return {key[len(prefix) :]: shape for key, shape in self.shapes.items() if key.startswith(prefix)}

    @cached_property
    def kind(self) -> str:
        """``sd1``, ``sd2``, ``sdxl`` or ``sdxl-refiner``; raises CheckpointError for anything else."""
        return unet_kind(self.unet_shapes, found=self.describe())

    @property
    def text_prefix(self) -> str:
        """What the names of the tensors of this kind's text encoders start with; raises CheckpointError as ``kind``."""
        return SDXL_TEXT_PREFIX if self.kind.startswith("sdxl") else TEXT_PREFIX

    @property
    def latent_channels(self) -> int:
        """Channels of the latent that the U-Net predicts (4 for Stable Diffusion)."""
        return self.unet_shapes["out.2.weight"][0]

    @cached_property
    def prediction(self) -> str:
        """``v`` where the file or its .yaml says so, else ``epsilon``."""
        says = self.metadata.get("modelspec.prediction_type") or self.metadata.get("prediction_type") or ""
        if says:
            return "v" if says.lower().startswith("v") else "epsilon"
        if "v_pred" in self.shapes:
            return "v"
        config = self.path.with_suffix(".yaml")
        text = config.read_text("utf-8", errors="replace") if config.is_file() else ""
        if re.search(r"^\s*(parameterization:\s*[\"']?v|target:\s*[\"']?[\w.]+\.VScaling)\b", text, re.MULTILINE):
            return "v"
        return "epsilon"

    def describe(self) -> str:
        """What the file seems to be, for error messages."""
        return f"{self.path}: {describe_keys(self.shapes)}"


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names for people of the files in a list, by their position where several are called the same."""
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]


def describe_keys(keys: Mapping[str, object]) -> str:
    """A few words on a set of tensor names that is not what was hoped for."""
    for part, what in FOREIGN:
        if any(part in key for key in keys):
            return f"this looks like {what}"
    if any("input_blocks." in key for key in keys):
        return f"{len(keys)} tensors with a U-Net among them"
    if any("decoder.conv_in." in key for key in keys):
        return "this looks like a VAE"
    first = ", ".join(sorted(keys)[:3])
    return f"{len(keys)} tensors" + (f", such as {first}" if first else "")


def unet_prefix(keys: Mapping[str, object]) -> str:
    """``model.diffusion_model.`` where names start with it, else nothing."""
    return UNET_PREFIX if any(key.startswith(UNET_PREFIX) for key in keys) else ""


def unet_kind(shapes: Mapping[str, tuple[int, ...]], found: str) -> str:
    """The kind of an LDM U-Net, from its tensors' shapes (names without prefix).

    SD1 projects into its transformers by 1x1 convolutions, SD2 by linear layers. SDXL also has ``label_emb``, and no
    transformers at its first resolution; the refiner has four resolutions, the base three.
    """
    if "input_blocks.0.0.weight" not in shapes or "out.2.weight" not in shapes:
        raise CheckpointError(f"no Stable Diffusion U-Net in {found}")
    proj_in = next((s for key, s in shapes.items() if key.endswith("proj_in.weight")), None)
    if proj_in is None:
        raise CheckpointError(f"a U-Net without spatial transformers, which is not Stable Diffusion's, in {found}")
    if "label_emb.0.0.weight" in shapes:
        if "input_blocks.1.1.proj_in.weight" in shapes:
            raise CheckpointError(f"a U-Net of unCLIP, which is guided by pictures and not supported, in {found}")
        downsamplings = sum(key.endswith(".0.op.weight") for key in shapes)
        return "sdxl-refiner" if downsamplings == 3 else "sdxl"
    return "sd1" if len(proj_in) == 4 else "sd2"
