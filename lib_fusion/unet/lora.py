"""LoRAs: their files, and their merging into a model's weights: ``W + weight * (alpha / rank) * up @ down``.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), section 4.1; for convolutions as LoCon does
it: ``down`` has the layer's kernel, ``up`` is 1x1. Files may name layers as kohya's trainers do (after LDM's or after
diffusers' module names) or as diffusers and PEFT do. Other kinds of networks are refused by name.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lib_fusion.errors import CheckpointError, shorten
from lib_fusion.unet.checkpoint import TEXT_PREFIX, Checkpoint, describe_keys
from lib_fusion.unet.model_file import LoraFile, ModelFile

#: Ends of tensors' names -> what the tensor is.
ROLES = {
    ".lora_up.weight": "up", ".lora_down.weight": "down", ".alpha": "alpha",  # kohya
    ".lora_B.weight": "up", ".lora_A.weight": "down",  # PEFT, and diffusers since 0.26
    ".lora_B.default.weight": "up", ".lora_A.default.weight": "down",
    ".lora.up.weight": "up", ".lora.down.weight": "down",  # diffusers before
    ".lora_linear_layer.up.weight": "up", ".lora_linear_layer.down.weight": "down",
    "_lora.up.weight": "up", "_lora.down.weight": "down",
}  # fmt: skip
#: The kinds of networks that are not read -> what the names of their tensors look like.
OTHER_KINDS = {
    "a LoRA with a textual inversion in its file": r"^bundle_emb", "LoHa": r"\.hada_", "LoKr": r"\.lokr_",
    "OFT": r"\.oft_", "LoCon in Tucker's form": r"\.lora_mid\.", "DoRA": r"\.(dora_scale|lora_magnitude_vector)",
    "IA3": r"\.on_input$", "trained norms": r"\.[wb]_norm$", "full weights": r"\.diff(_b)?$",
    "GLoRA": r"\.[ab][12]\.weight$", "a LoRA with biases": r"\.lora_(B|up)(\.default)?\.bias$",
}  # fmt: skip
#: Starts of layers' names -> the part of the model; the layers of files without any are the U-Net's.
PARTS = {
    "lora_unet_": "unet", "unet.": "unet", "base_model.model.": "unet", "lora_te_": "text", "text_encoder.": "text",
    "lora_te1_": "sdxl", "lora_te2_": "sdxl", "text_encoder_2.": "sdxl",
}  # fmt: skip
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
          "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
OUTER = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
         "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
         "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}  # fmt: skip
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class Factors:
    """One layer's change: ``up`` (out,rank) and ``down`` (rank,in,h,w or rank,in), times ``scale``."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the changed weight."""
        return (len(self.up), *self.down.shape[1:])

    def delta(self) -> torch.Tensor:
        """(out,in) or (out,in,h,w), float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.view(self.shape)


@dataclass(frozen=True)
class Lora:
    """A LoRA's tensors for one checkpoint: {module name in that part of the checkpoint: its change}."""

    file: LoraFile
    unet: Mapping[str, Factors]
    text: Mapping[str, Factors]

    @classmethod
    def read(cls, file: LoraFile, model: Checkpoint) -> Lora:
        """Reads a file for a checkpoint; raises CheckpointError where it is no LoRA, of another kind, or does not fit.

        SD2's and SDXL's text encoders are named otherwise by every library; LoRAs for those are refused.
        """
        header = Checkpoint.open(file.path)
        layers = _sort_tensors(header)
        scales = _read_scales(header)
        text_shapes = _text_shapes(model)
        tables = {"unet": (unet_names(model.unet_shapes), model.unet_shapes), "text": (_flat(text_shapes), text_shapes)}
        tensors = header.read("")
        parts: dict[str, dict[str, Factors]] = {"unet": {}, "text": {}}
        unknown = []
        for (part, layer), roles in layers.items():
            if part not in tables or (part == "text" and not text_shapes):
                problem = f"a LoRA that also changes the text encoder of {'SDXL' if part == 'sdxl' else 'SD1'}"
                other = "one of the U-Net alone" if model.kind == part else f"one for {model.kind}"
                raise CheckpointError(f"{file.path}: {problem}; allowed with {model.path.name}: {other}")
            names, shapes = tables[part]
            name = names.get(layer)
            if name is None:
                unknown.append(layer)
                continue
            factors = _factors(file.path, layer, {role: tensors[key] for role, key in roles.items()}, scales[part])
            wanted, given = shapes[f"{name}.weight"], factors.shape
            if given != wanted and given != (*wanted, 1, 1) and (*given, 1, 1) != wanted:
                raise CheckpointError(f"{file.path}: {layer} changes a weight {given}, {model.path.name} has {wanted}")
            parts[part][name] = factors
        if unknown:
            problem = f"{len(unknown)} layers that {model.path.name} ({model.kind}) does not have, such as {unknown[0]}"
            raise CheckpointError(f"{file.path}: a LoRA for {problem}; allowed: one for this kind of model")
        return cls(file, parts["unet"], parts["text"])

    def part_hash(self, part: str) -> str:
        """SHA-256 over the changes of ``unet`` or ``text`` and the weight; empty where there is no change."""
        layers: Mapping[str, Factors] = getattr(self, part)
        if not layers or self.file.weight == 0:
            return ""
        digest = hashlib.sha256(f"{self.file.weight:g}".encode())
        for name, factors in sorted(layers.items()):
            digest.update(f"{name} {factors.scale:g}".encode())
            for tensor in (factors.up, factors.down):
                digest.update(tensor.to(torch.float16).contiguous().numpy().tobytes())
        return digest.hexdigest()


def read_loras(model: ModelFile, checkpoint: Checkpoint) -> list[Lora]:
    """The LoRAs of a model, in its order; raises CheckpointError as ``Lora.read``."""
    return [Lora.read(file, checkpoint) for file in model.loras]


def with_loras(module: AnyModule, changes: Iterable[tuple[Mapping[str, Factors], float]]) -> AnyModule:
    """A copy of a module that shares all parameters but those that the changes, each with its weight, merge into.

    The sums are made in float32, whatever the module's dtype. Without changes it is the module itself.
    """
    given = [(layers, weight) for layers, weight in changes if layers and weight]
    if not given:
        return module
    copied = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    for name in {name for layers, _ in given for name in layers}:
        layer = copied.get_submodule(name)
        weight = layer.get_parameter("weight").detach()
        merged = weight.float()
        for layers, factor in given:
            if name in layers:
                merged = merged + factor * layers[name].delta().to(merged.device).view(merged.shape)
        layer.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)
    return copied


def unet_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{layer's name in a LoRA, dots as underscores: LDM's module name}, after both LDM's names and diffusers'.

    ``shapes``: the U-Net's tensors. The layers' numbers follow from the blocks, whatever the number of levels.
    """
    modules = [key.removesuffix(".weight") for key in shapes if key.endswith(".weight")]
    blocks = _block_names(shapes)
    names = {}
    for module in modules:
        top, _, rest = module.partition(".")
        index, _, inner = rest.partition(".")
        number, _, layer = inner.partition(".")
        if module in OUTER:
            names[OUTER[module]] = module
        elif top == "middle_block":
            names[_inside(f"mid_block.{'attentions' if index == '1' else 'resnets'}.{int(index) // 2}", inner)] = module
        elif (block := blocks.get(f"{top}.{index}.{number}")) is not None:
            names[_inside(block, layer)] = module
    flat = {name.replace(".", "_"): module for name, module in names.items()}
    return flat | _flat(shapes)


def _inside(block: str, layer: str) -> str:
    """diffusers' name of a layer in a block."""
    if "resnets" in block:
        return f"{block}.{RESNET.get(layer, layer)}"
    return f"{block}.conv" if "samplers" in block else f"{block}.{layer}"


def _block_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{LDM's module name: diffusers'} of the parts of all encoder and decoder blocks.

    diffusers numbers them by resolution: a sampler ends one.
    """
    names: dict[str, str] = {}
    for top, side, sampler in (("input_blocks", "down_blocks", "downsamplers"),
                               ("output_blocks", "up_blocks", "upsamplers")):  # fmt: skip
        parts = {tuple(key.split(".")[1:3]) for key in shapes if key.startswith(f"{top}.")}
        level = resnet = 0
        for index in range(1 if top == "input_blocks" else 0, 1 + max(int(index) for index, _ in parts)):
            here = {number for found, number in parts if int(found) == index}
            is_last = False
            for number in sorted(here):
                module = f"{top}.{index}.{number}"
                if f"{module}.in_layers.2.weight" in shapes:
                    names[module] = f"{side}.{level}.resnets.{resnet}"
                elif f"{module}.proj_in.weight" in shapes:
                    names[module] = f"{side}.{level}.attentions.{resnet}"
                else:
                    names[module] = f"{side}.{level}.{sampler}.0"
                    is_last = True
            level, resnet = (level + 1, 0) if is_last else (level, resnet + 1)
    return names


def _flat(shapes: Iterable[str]) -> dict[str, str]:
    """{module's name with underscores: module's name}, of those that have a weight."""
    modules = [key.removesuffix(".weight") for key in shapes if key.endswith(".weight")]
    return {module.replace(".", "_"): module for module in modules}


def _text_shapes(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of an SD1 text encoder by transformers' names; of other kinds none."""
    if model.kind != "sd1":
        return {}
    prefix, inner = f"{TEXT_PREFIX}transformer.", "text_model."
    names = {key.removeprefix(prefix): shape for key, shape in model.shapes.items() if key.startswith(prefix)}
    return {inner + key.removeprefix(inner): shape for key, shape in names.items()}


def _sort_tensors(file: Checkpoint) -> dict[tuple[str, str], dict[str, str]]:
    """{(part of the model, layer's name with underscores): {role: tensor's name}}; raises CheckpointError."""
    layers: dict[tuple[str, str], dict[str, str]] = {}
    for key in file.shapes:
        kind = next((kind for kind, pattern in OTHER_KINDS.items() if re.search(pattern, key)), None)
        if kind is not None:
            raise CheckpointError(f"{file.path}: this is {kind} ({shorten(key)}); allowed: LoRA and LoCon")
        end = next((end for end in ROLES if key.endswith(end)), None)
        if end is None:
            raise CheckpointError(f"{file.path}: {describe_keys(file.shapes)}; {shorten(key)} is no tensor of a LoRA")
        layer = key.removesuffix(end)
        start = next((start for start in PARTS if layer.startswith(start)), "")
        name = layer.removeprefix(start).replace(".processor", "").replace(".", "_")
        if name.endswith("_to_out"):  # of diffusers' attention processors
            name += "_0"
        part = PARTS.get(start, "unet")
        if part == "text":  # diffusers gave its attention the U-Net's names at first, transformers 5 has no text_model
            name = re.sub(r"_to_([qkv])$", r"_\1_proj", name.replace("_to_out_0", "_out_proj"))
            name = f"text_model_{name.removeprefix('text_model_')}"
        layers.setdefault((part, name), {})[ROLES[end]] = key
    if not layers:
        raise CheckpointError(f"{file.path}: there is no LoRA in it")
    return layers


def _factors(path: Path, layer: str, tensors: Mapping[str, torch.Tensor], scale: float | None) -> Factors:
    """One layer's change; ``scale``: alpha / rank where the file says it for all layers."""
    if not tensors.keys() >= {"up", "down"}:
        raise CheckpointError(f"{path}: {layer} lacks {'its second factor' if len(tensors) > 1 else 'a factor'}")
    up, down = tensors["up"], tensors["down"]
    rank = len(down)
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != rank or up[0, 0].numel() != 1:
        shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
        raise CheckpointError(f"{path}: the factors of {layer} do not fit each other ({shapes})")
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    numbers = [up, down, torch.tensor(0.0 if alpha is None else alpha)]
    if not all(value.is_floating_point() and value.isfinite().all() for value in numbers):
        raise CheckpointError(f"{path}: {layer} holds values that are not finite")
    if alpha is not None:
        return Factors(up.flatten(1), down, alpha / rank)
    return Factors(up.flatten(1), down, 1.0 if scale is None else scale)


def _read_scales(file: Checkpoint) -> dict[str, float | None]:
    """alpha / rank of each part where PEFT's configuration says it: in the file, or in the .json beside; else None."""
    beside = file.path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in file.metadata:
            values = dict(json.loads(file.metadata["lora_adapter_metadata"]))
        elif file.path.name == "adapter_model.safetensors" and beside.is_file():
            values = {f"unet.{key}": value for key, value in json.loads(beside.read_text("utf-8")).items()}
        else:
            values = {}
        scales = {}
        for part, start in (("unet", "unet."), ("text", "text_encoder.")):
            own = {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
            for key in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "lora_bias"):
                if own.get(key):
                    raise CheckpointError(f"{file.path}: PEFT's {key} is not read; allowed: one alpha and rank for all")
            scales[part] = float(own["lora_alpha"]) / float(own["r"]) if own else None
    except (ValueError, TypeError, KeyError, ZeroDivisionError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file.path}: PEFT's configuration of it can't be read ({error})") from error
    return scales
