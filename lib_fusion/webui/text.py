"""What an expert is told: its prompts through its own text encoder, or the base's, as the host would read them.

An own encoder is a structural clone of the host's conditioner that carries the expert's weights, so emphasis, prompt
editing, BREAK, AND, embeddings and clip skip work as they do for the base, and the base's encoder is never touched.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from modules import devices, extra_networks, lowvram, prompt_parser, sd_models_xl, shared
from torch import nn

from lib_fusion.errors import SettingError
from lib_fusion.settings import ExpertSettings
from lib_fusion.webui.experts import ExpertKey, is_base, make_key, read_weights

#: How many sets of conditionings are kept: both passes of two experts.
KEPT = 4
#: Brackets in an expert's prompt. The host's reader of prompts takes minutes and gigabytes for some thousand.
MOST_BRACKETS = 200

_FRESH = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks",
          "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_load_state_dict_pre_hooks",
          "_load_state_dict_post_hooks", "_state_dict_pre_hooks")  # fmt: skip
_LORA = ("network_layer_name", "network_current_names", "network_weights_backup", "network_bias_backup")


@dataclass
class Told:
    """The host's conditionings for one expert: ``cond`` composed and scheduled, ``uncond`` scheduled."""

    cond: Any
    uncond: Any
    empty: torch.Tensor


class CloneEncoder:
    """Stands where the host's prompt parser expects a model: encodes texts with an expert's conditioner."""

    def __init__(self, conditioner: nn.Module, is_sdxl: bool) -> None:
        self.conditioner, self.is_sdxl = conditioner, is_sdxl

    def get_learned_conditioning(self, texts: Any) -> Any:
        return sd_models_xl.get_learned_conditioning(self, texts) if self.is_sdxl else self.conditioner(texts)


class TextCache:
    """Clones of the text encoder and the last conditionings. The host's own caches are never written to."""

    def __init__(self) -> None:
        self._clones: OrderedDict[tuple[ExpertKey, Any], nn.Module] = OrderedDict()
        self._told: list[tuple[Any, Told]] = []  # newest last; the keys are compared as the host compares its own

    def tell(self, p: Any, info: Any, expert: ExpertSettings, field: str) -> Told | None:
        """The conditionings of this pass for an expert; None: exactly the base's."""
        own_encoder = expert.text_encoder == "own" and not is_base(info, expert, p.sd_model)
        if not own_encoder and not expert.prompt and not expert.negative_prompt:
            return None
        prompts, negatives, steps, hires_steps, extra = prompts_of(p)
        if expert.prompt:
            prompts = replace_texts(prompts, expert.prompt, f"{field}.prompt")
        if expert.negative_prompt:
            negatives = replace_texts(negatives, expert.negative_prompt, f"{field}.negative_prompt")
        encoder_key = make_key(info, expert) if own_encoder else None
        shape = (prompts.width, prompts.height)
        key = (encoder_key, negatives, shape, p.cached_params(prompts, steps, extra, hires_steps, old_scheduling()))
        found = next((told for known, told in self._told if known == key), None)
        if found is None:
            with devices.autocast():
                model = p.sd_model
                if own_encoder:
                    model = self._clone(info, encoder_key, p.sd_model, f"{field}.text_encoder")
                found = encode(model, prompts, negatives, steps, hires_steps, p.sd_model)
            self._told = [*self._told, (key, found)][-KEPT:]
        return found

    def free(self) -> None:
        self._clones.clear()
        self._told.clear()

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for clone in self._clones.values() for p in clone.parameters())

    def _clone(self, info: Any, key: ExpertKey, sd_model: nn.Module, field: str) -> CloneEncoder:
        is_sdxl = hasattr(sd_model, "conditioner")
        source = sd_model.conditioner if is_sdxl else sd_model.cond_stage_model
        # A clone shares the structure that the host built for this base, so another base needs another clone.
        full_key = (key, id(source))
        if full_key not in self._clones:
            limit = max(int(shared.opts.data.get("denoiser_fusion_cache", 1)), 1)
            while len(self._clones) >= limit:
                self._clones.popitem(last=False)
            clone = clone_module(source, {})
            prefix = "conditioner." if is_sdxl else "cond_stage_model."
            put_weights(clone, read_weights(info), prefix, info.name, field)
            if not key.loras:
                strip_loras(clone)
            self._clones[full_key] = clone
        self._clones.move_to_end(full_key)
        return CloneEncoder(self._clones[full_key], is_sdxl)


def old_scheduling() -> bool:
    return shared.opts.use_old_scheduling


def prompts_of(p: Any) -> tuple[Any, Any, int, int | None, Any]:
    """This pass's prompts, negative prompts, steps, hires steps and LoRA call, as the host conditions its own model."""
    if not getattr(p, "is_hr_pass", False):
        size = {"width": p.width, "height": p.height}
        prompts, negatives, steps, hires_steps = p.prompts, p.negative_prompts, p.firstpass_steps, None
        extra = p.extra_network_data
    else:
        from modules import sd_samplers

        size = {"width": p.hr_upscale_to_x, "height": p.hr_upscale_to_y}
        prompts, negatives, steps = p.hr_prompts, p.hr_negative_prompts, p.firstpass_steps
        config = sd_samplers.find_sampler_config(p.hr_sampler_name or p.sampler_name)
        hires_steps = p.hr_second_pass_steps or p.steps
        hires_steps = config.total_steps(hires_steps) if config else hires_steps
        extra = p.hr_extra_network_data
    negatives = prompt_parser.SdConditioning(negatives, is_negative_prompt=True, **size)
    return prompt_parser.SdConditioning(prompts, **size), negatives, steps, hires_steps, extra


def replace_texts(prompts: Any, text: str, field: str) -> Any:
    """The expert's own text for every picture; LoRAs can't be named in it, since the host switches them for all."""
    if sum(map(text.count, "()[]")) > MOST_BRACKETS:
        raise SettingError(field, text, f"allowed: at most {MOST_BRACKETS} brackets")
    plain, networks = extra_networks.parse_prompts([text])
    if networks:
        raise SettingError(field, text, "allowed: a prompt without <...>; LoRAs are named in the picture's prompt")
    return prompt_parser.SdConditioning(plain * len(prompts), copy_from=prompts)


def encode(model: Any, prompts: Any, negatives: Any, steps: int, hires_steps: int | None, sd_model: nn.Module) -> Told:
    """Encodes as the host does. A clone waits on the CPU where the host's own or the experts do."""
    in_ram = lowvram.is_enabled(sd_model) or shared.opts.data.get("denoiser_fusion_place", "GPU") != "GPU"
    moved = isinstance(model, CloneEncoder) and in_ram
    if isinstance(model, CloneEncoder):
        model.conditioner.to(devices.device)
    try:
        schedule = (steps, hires_steps, old_scheduling())
        uncond = prompt_parser.get_learned_conditioning(model, negatives, *schedule)
        cond = prompt_parser.get_multicond_learned_conditioning(model, prompts, *schedule)
        empty = model.get_learned_conditioning([""])
    finally:
        if moved:
            model.conditioner.to(devices.cpu)
    return Told(cond, uncond, empty["crossattn"] if isinstance(empty, dict) else empty)


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


def put_weights(clone: nn.Module, weights: dict[str, torch.Tensor], prefix: str, name: str, field: str) -> None:
    """Gives a clone the checkpoint's tensors; raises SettingError where the file has no such text encoder."""
    wanted: list[tuple[nn.Module, str, str]] = []
    find: Callable[[str], str] = lambda path: prefix + ".".join(x for x in path.split(".") if x != "wrapped")  # noqa: E731
    for path, module in clone.named_modules():
        wanted += [(module, key, find(f"{path}.{key}" if path else key)) for key, p in module._parameters.items()
                   if p is not None]  # fmt: skip
    missing = [key for _, _, key in wanted if key not in weights]
    if missing:
        told = f"{name} lacks {len(missing)} of the text encoder's {len(wanted)} tensors; allowed: base"
        raise SettingError(field, "own", told)
    for module, key, source in wanted:
        old = module._parameters[key]
        if old.shape != weights[source].shape:
            raise SettingError(field, "own", f"{source} has another shape in {name} than in the base; allowed: base")
        value = weights[source].to(devices.cpu, devices.dtype_unet) if devices.fp8 else weights[source]
        value = value.to(device=devices.cpu, dtype=old.dtype, copy=True)
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
