"""An expert's own text encoder: the host's conditioner with the expert's weights in it.

With a base of the same kind it is a structural clone of the base's; with one of another kind it is built from the
expert's own configuration. Neither changes any state of the host.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from modules import devices, sd_disable_initialization, sd_models
from modules.sd_hijack import EmbeddingsWithFixes, model_hijack
from modules.sd_hijack_clip import FrozenCLIPEmbedderWithCustomWords
from modules.sd_hijack_open_clip import FrozenOpenCLIPEmbedderWithCustomWords
from modules.textual_inversion.textual_inversion import EmbeddingDatabase
from torch import nn

from lib_fusion.errors import SettingError
from lib_fusion.log import logger
from lib_fusion.webui.a1111.experts import read_config, read_weights, store_in_fp8

#: What helps where an expert of another kind than the base has no usable text encoder.
OTHER = "allowed: an expert with its own text encoder"
_FRESH = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks",
          "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_load_state_dict_pre_hooks",
          "_load_state_dict_post_hooks", "_state_dict_pre_hooks")  # fmt: skip
#: The buffer of CLIP's embeddings that checkpoints hold.
POSITIONS = "position_ids"
_LORA = ("network_layer_name", "network_current_names", "network_weights_backup", "network_bias_backup")


def clone_encoder(source: nn.Module, info: Any, prefix: str, loras: bool, field: str) -> nn.Module:
    """The host's conditioner ``source`` again, with a checkpoint's weights, which are named with ``prefix``.

    ``loras``: whether its layers keep the names by which LoRAs find them. Raises SettingError where the file has no
    such text encoder.
    """
    clone = clone_module(source, {})
    put_weights(clone, read_weights(info), prefix, info.name, field, "allowed: base")
    if not loras:
        strip_loras(clone)
    return clone


def build_encoder(info: Any, field: str) -> nn.Module:
    """The conditioner of an SD1 or SD2 checkpoint as the host would build it, on the CPU; raises SettingError.

    It has a table of textual inversions of its own (``share_embeddings``), and no LoRA finds it.
    """
    weights = read_weights(info)
    config = read_config(info, weights).cond_stage_config
    meta = sd_disable_initialization.InitializeOnMeta()
    try:
        with torch.random.fork_rng(devices=[]), sd_disable_initialization.DisableInitialization(), meta:
            encoder = sd_models.instantiate_from_config(config)
    except (OSError, RuntimeError, ValueError) as error:  # no such tokenizer, say
        problem = " ".join(str(error).split())[:300]
        problem = f"the text encoder of {info.name} can't be built ({problem})"
        raise SettingError(field, "own", f"{problem}; {OTHER}") from error
    hijack = SimpleNamespace(fixes=None, embedding_db=EmbeddingDatabase(), extra_generation_params={}, comments=[])
    if type(encoder) is FrozenOpenCLIPEmbedder:
        owner, wrapper = encoder.model, FrozenOpenCLIPEmbedderWithCustomWords
    elif type(encoder) is FrozenCLIPEmbedder:
        owner, wrapper = encoder.transformer.text_model.embeddings, FrozenCLIPEmbedderWithCustomWords
    else:
        raise SettingError(field, "own", f"the text encoder of {info.name} is a {type(encoder).__name__}; {OTHER}")
    owner.token_embedding = EmbeddingsWithFixes(owner.token_embedding, hijack)
    encoder = wrapper(encoder, hijack).eval().to(devices.dtype_unet)
    put_weights(encoder, weights, "cond_stage_model.", info.name, field, OTHER)
    if devices.fp8:
        store_in_fp8(encoder, loras=False)
    return encoder


def share_embeddings(encoder: nn.Module) -> None:
    """Tells a built encoder the host's textual inversions that fit it, which are not those that fit the base."""
    known, own = model_hijack.embedding_db, encoder.hijack.embedding_db
    width = next(m.wrapped.weight.shape[1] for m in encoder.modules() if isinstance(m, EmbeddingsWithFixes))
    own.ids_lookup.clear()
    own.word_embeddings.clear()
    for embedding in [*known.word_embeddings.values(), *known.skipped_embeddings.values()]:
        if embedding.shape == width:
            own.register_embedding(embedding, SimpleNamespace(cond_stage_model=encoder))


def clone_module(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    """A module of the same structure with tables of its own: no hooks, the same tensors until others are put in."""
    if id(module) in seen:
        return seen[id(module)]
    clone = seen[id(module)] = copy.copy(module)
    clone.__dict__["_parameters"] = module._parameters.copy()
    clone.__dict__["_buffers"] = module._buffers.copy()
    for table in _FRESH:
        if table in clone.__dict__:
            clone.__dict__[table] = OrderedDict()
    children = {
        name: None if child is None else clone_module(child, seen) for name, child in module._modules.items()
    }
    clone.__dict__["_modules"] = type(module._modules)(children)
    for name in _LORA[1:]:
        clone.__dict__.pop(name, None)
    return clone


def strip_loras(clone: nn.Module) -> None:
    """Makes the host's LoRA code pass over these layers."""
    for module in clone.modules():
        module.__dict__.pop(_LORA[0], None)


def put_weights(
    encoder: nn.Module, weights: dict[str, torch.Tensor], prefix: str, name: str, field: str, allowed: str
) -> None:
    """Gives an encoder the checkpoint's tensors; raises SettingError where the file has no such text encoder."""
    wanted: list[tuple[nn.Module, str, str]] = []
    find: Callable[[str], str] = lambda path: prefix + ".".join(x for x in path.split(".") if x != "wrapped")  # noqa: E731
    for path, module in encoder.named_modules():
        wanted += [(module, key, find(f"{path}.{key}" if path else key)) for key, p in module._parameters.items()
                   if p is not None]  # fmt: skip
    idle = idle_parameters(encoder)
    missing = [key for module, name_, key in wanted if key not in weights and module._parameters[name_] not in idle]
    if missing:
        problem = f"{name} lacks {len(missing)} of the text encoder's {len(wanted)} tensors; {allowed}"
        raise SettingError(field, "own", problem)
    lacking = sum(key not in weights for _, _, key in wanted)
    if lacking:
        logger.debug("%s lacks %d tensors of its text encoder, which it never uses; they are zero", name, lacking)
    for module, name_, source in wanted:
        old = module._parameters[name_]
        value = weights.get(source, torch.zeros(old.shape))
        if old.shape != value.shape:
            raise SettingError(field, "own", f"{source} has another shape in {name} than it should have; {allowed}")
        value = value.to(devices.cpu, devices.dtype_unet) if devices.fp8 else value
        if hasattr(module, f"fp16_{name_}"):  # what LoRAs are added to; a clone has the base's
            setattr(module, f"fp16_{name_}", value.to(torch.half, copy=True))
        value = value.to(device=devices.cpu, dtype=old.dtype, copy=True)
        module._parameters[name_] = nn.Parameter(value, requires_grad=False)
    put_positions(encoder, weights, find)


def put_positions(encoder: nn.Module, weights: dict[str, torch.Tensor], find: Callable[[str], str]) -> None:
    """Gives an encoder the checkpoint's own numbers of positions, which merges break in many files, or the usual ones.

    As the host does when it loads the file: fractions are cut off, and without any the positions count up from 0.
    """
    for path, module in encoder.named_modules():
        old = module._buffers.get(POSITIONS)
        if old is not None:
            usual = torch.arange(old.numel(), device=old.device).view(old.shape)
            own = weights.get(find(f"{path}.{POSITIONS}"), usual)
            module._buffers[POSITIONS] = torch.empty_like(old).copy_(own.view(old.shape))


def idle_parameters(encoder: nn.Module) -> set[nn.Parameter]:
    """Parameters of SD2's encoder that it never uses, and that many files of it leave out: its last layers."""
    found = set()
    for module in encoder.modules():
        if type(module) is FrozenOpenCLIPEmbedder:
            found |= {module.model.text_projection, module.model.logit_scale}
            blocks = module.model.transformer.resblocks
            found |= {p for block in blocks[len(blocks) - module.layer_idx :] for p in block.parameters()}
    return found
