"""An expert's conditioning: its prompts through its own text encoder, or the base's, as the host would read them.

An own encoder (``encoders.py``) is the host's conditioner with the expert's weights, so emphasis, prompt editing,
BREAK, AND, embeddings and clip skip work as they do for the base, and the base's encoder is never touched.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from modules import devices, prompt_parser, sd_models_xl, shared
from torch import nn

from lib_fusion.log import log_loaded
from lib_fusion.requests.settings import MAX_EXPERTS, ExpertSettings
from lib_fusion.webui.a1111.experts import Expert, ExpertKey, kind_of_model, make_key
from lib_fusion.webui.a1111.loras import LoraCache, acting_calls, with_embeddings
from lib_fusion.webui.a1111.placement import home_of, on_device, settle, waits_in_ram
from lib_fusion.webui.a1111.text_encoders import build_encoder, clone_encoder, share_embeddings
from lib_fusion.webui.a1111.worn import merge_into
from lib_fusion.webui.models.checkpoints import is_base
from lib_fusion.webui.models.lora_files import find_loras
from lib_fusion.webui.models.prompts import old_scheduling, prompts_of, replace_texts
from lib_fusion.webui.options import read_option

#: How many sets of conditionings are kept: both passes of all experts.
KEPT = 2 * MAX_EXPERTS


@dataclass
class Conditioning:
    """The host's conditionings for one expert: ``cond`` composed and scheduled, ``uncond`` scheduled."""

    cond: Any
    uncond: Any
    empty: torch.Tensor


class OwnEncoder:
    """Stands where the host's prompt parser expects a model: encodes texts with an expert's conditioner."""

    def __init__(self, conditioner: nn.Module, is_sdxl: bool) -> None:
        self.conditioner, self.is_sdxl = conditioner, is_sdxl

    def get_learned_conditioning(self, texts: Any) -> Any:
        return sd_models_xl.get_learned_conditioning(self, texts) if self.is_sdxl else self.conditioner(texts)


class TextCache:
    """The experts' text encoders and the last conditionings. The host's own caches are never written to."""

    def __init__(self) -> None:
        self._encoders: OrderedDict[tuple[ExpertKey, Any], nn.Module] = OrderedDict()
        self._kept: list[tuple[Any, Conditioning]] = []  # newest last; keys compare as the host compares its own

    def encode(
        self, p: Any, loaded: Expert, expert: ExpertSettings, field: str, loras: LoraCache, needed: int = 1
    ) -> Conditioning | None:
        """The conditionings of this pass for an expert; None: exactly the base's.

        ``needed``: how many experts of the pass have an encoder of their own; that many are kept in any case.
        """
        info = loaded.info
        own_encoder = expert.text_encoder == "own" and not is_base(info, p.sd_model)
        has_bases_loras = loaded.loras == acting_calls()
        if not own_encoder and not expert.prompt and not expert.negative_prompt and has_bases_loras:
            return None
        prompts, negatives, steps, hires_steps, extra = prompts_of(p)
        words = find_loras(expert.prompt, f"{field}.prompt")[0]
        if words.strip():
            prompts = replace_texts(prompts, words, f"{field}.prompt")
        if expert.negative_prompt:
            negatives = replace_texts(negatives, expert.negative_prompt, f"{field}.negative_prompt")
        encoder_key = make_key(info, loaded.loras) if own_encoder else None
        given = p.cached_params(prompts, steps, extra, hires_steps, old_scheduling())
        how = (encoder_key, loaded.loras, bool(shared.opts.data.get("lora_functional", False)))
        key = (how, negatives, (prompts.width, prompts.height), given)
        found = next((kept for known, kept in self._kept if known == key), None)
        if found is None:
            with devices.autocast(), ExitStack() as stack:
                model = p.sd_model
                if not has_bases_loras:
                    nets = loras.nets(loaded.loras, p.sd_model, f"{field}.prompt")
                    stack.enter_context(with_embeddings(nets))
                    if not own_encoder:
                        stack.enter_context(loras.for_text(loaded.loras, p.sd_model, f"{field}.prompt").on())
                if own_encoder:
                    model = self._own(loaded, encoder_key, p.sd_model, field, loras, needed)
                found = encode(model, prompts, negatives, steps, hires_steps, p.sd_model)
            self._kept = [*self._kept, (key, found)][-KEPT:]
        return found

    def settle(self, device: torch.device) -> None:
        """Moves all encoders to the device, or to RAM."""
        for encoder in self._encoders.values():
            settle(encoder, device)

    def free(self) -> None:
        self._encoders.clear()
        self._kept.clear()

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for encoder in self._encoders.values() for p in encoder.parameters())

    def _own(
        self, loaded: Expert, key: ExpertKey, sd_model: nn.Module, field: str, loras: LoraCache, needed: int
    ) -> OwnEncoder:
        is_sdxl = hasattr(sd_model, "conditioner")
        source = sd_model.conditioner if is_sdxl else sd_model.cond_stage_model
        is_other = loaded.model.kind != kind_of_model(sd_model).kind
        # A clone shares the structure that the host built for this base, so another base needs another clone.
        full_key = (key, None if is_other else id(source))
        if full_key not in self._encoders:
            limit = max(read_option("cache"), needed)
            while len(self._encoders) >= limit:
                self._encoders.popitem(last=False)
            if is_other:
                encoder = build_encoder(loaded.info, f"{field}.text_encoder")
            else:
                prefix = "conditioner." if is_sdxl else "cond_stage_model."
                encoder = clone_encoder(source, loaded.info, prefix, bool(key.loras), f"{field}.text_encoder")
                if key.loras:
                    merge_into(encoder, loras.nets(key.loras, sd_model, f"{field}.prompt"), f"{field}.prompt")
            self._encoders[full_key] = encoder
            log_loaded(f"expert {loaded.info.name}, its text encoder", encoder, home_of(sd_model))
        self._encoders.move_to_end(full_key)
        encoder = self._encoders[full_key]
        if is_other:
            share_embeddings(encoder)
        return OwnEncoder(encoder, is_sdxl)


def encode(
    model: Any, prompts: Any, negatives: Any, steps: int, hires_steps: int | None, sd_model: nn.Module
) -> Conditioning:
    """Encodes as the host does, on its device."""
    own = model.conditioner if isinstance(model, OwnEncoder) else None
    if own is not None and not waits_in_ram(sd_model):
        settle(own, devices.device)
        own = None
    with nullcontext() if own is None else on_device(own):
        schedule = (steps, hires_steps, old_scheduling())
        uncond = prompt_parser.get_learned_conditioning(model, negatives, *schedule)
        cond = prompt_parser.get_multicond_learned_conditioning(model, prompts, *schedule)
        empty = model.get_learned_conditioning([""])
    return Conditioning(cond, uncond, empty["crossattn"] if isinstance(empty, dict) else empty)
