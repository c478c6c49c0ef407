"""An expert's conditioning: its prompts through its own text encoder, or the base's, as the host reads its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from backend.text_processing import classic_engine
from modules import devices, prompt_parser, shared

from lib_fusion.requests.settings import MAX_EXPERTS, ExpertSettings
from lib_fusion.webui.forge.engines import (
    Expert,
    Lora,
    clip_skip,
    loras_of_picture,
    unchanged_arguments,
    with_lora,
)
from lib_fusion.webui.models.lora_files import find_loras
from lib_fusion.webui.models.prompts import prompts_of, replace_texts

#: How many conditionings are kept: both passes of all experts.
KEPT = 2 * MAX_EXPERTS


@dataclass
class Conditioning:
    """The host's conditionings for one expert: ``cond`` composed and scheduled, ``uncond`` scheduled."""

    cond: Any
    uncond: Any


class Texts:
    """The last conditionings. The host's own caches are never written to."""

    def __init__(self) -> None:
        self._kept: list[tuple[Any, Conditioning]] = []  # newest last; keys compare as the host compares its own

    def encode(self, p: Any, expert: Expert, setting: ExpertSettings, field: str, sd_model: Any) -> Conditioning | None:
        """The conditionings of this pass for an expert; None: exactly the base's."""
        engine = expert.engine if setting.text_encoder == "own" else sd_model
        loras = tuple(lora for lora in expert.loras if lora.te)
        of_picture = tuple(lora for lora in loras_of_picture(sd_model) if lora.te)
        has_bases = engine is sd_model and loras == of_picture
        words = find_loras(setting.prompt, f"{field}.prompt")[0]
        if has_bases and not words.strip() and not setting.negative_prompt:
            return None
        prompts, negatives, steps, hires_steps, _ = prompts_of(p)
        if words.strip():
            prompts = replace_texts(prompts, words, f"{field}.prompt")
        if setting.negative_prompt:
            negatives = replace_texts(negatives, setting.negative_prompt, f"{field}.negative_prompt")
        opts = shared.opts
        how = (expert.engine.sd_checkpoint_info.filename, setting.text_encoder, loras, opts.emphasis, clip_skip(),
               opts.sdxl_crop_left, opts.sdxl_crop_top, id(engine))  # fmt: skip
        key = (how, prompts, negatives, (prompts.width, prompts.height), steps, hires_steps)
        found = next((kept for known, kept in self._kept if known == key), None)
        if found is None:
            clip = clip_of(engine, expert, loras, has_bases, f"{field}.prompt")
            with devices.autocast(), unchanged_arguments(), encoding_with(engine, clip):
                found = encode(engine, prompts, negatives, steps, hires_steps)
            self._kept = [*self._kept, (key, found)][-KEPT:]
        return found

    def free(self) -> None:
        self._kept.clear()


def clip_of(engine: Any, expert: Expert, loras: tuple[Lora, ...], has_bases: bool, field: str) -> Any:
    """The text encoders of an engine with the expert's LoRAs on them; raises SettingError."""
    if has_bases:
        return engine.forge_objects.clip
    if engine is expert.engine:
        return expert.clip
    unet, clip = engine.forge_objects_original.unet, engine.forge_objects_original.clip
    for lora in loras:
        clip = with_lora(unet, clip, lora, field)[1]
    return clip


@contextmanager
def encoding_with(engine: Any, clip: Any) -> Iterator[None]:
    """Within, an engine encodes with these text encoders. Its memory manager merges LoRAs as it loads them."""
    objects = engine.forge_objects
    before, objects.clip = objects.clip, clip
    try:
        yield
    finally:
        objects.clip = before


def encode(engine: Any, prompts: Any, negatives: Any, steps: int, hires_steps: int | None) -> Conditioning:
    """Encodes as the host does, and leaves its notes for the infotext as they were."""
    schedule: list[Any] = [steps, hires_steps]
    if "use_old_scheduling" in shared.opts.data_labels:  # Neo has no such setting
        schedule.append(shared.opts.use_old_scheduling)
    engine.set_clip_skip(clip_skip())
    notes = getattr(classic_engine, "last_extra_generation_params", None)  # Neo has them elsewhere
    if notes is not None:
        classic_engine.last_extra_generation_params = {}
    try:
        uncond = prompt_parser.get_learned_conditioning(engine, negatives, *schedule)
        cond = prompt_parser.get_multicond_learned_conditioning(engine, prompts, *schedule)
    finally:
        if notes is not None:
            classic_engine.last_extra_generation_params = notes
    return Conditioning(cond, uncond)
