"""What a pass needs in this host before its first step: checked, loaded and encoded."""

from __future__ import annotations

from typing import Any

from modules import prompt_parser
from torch import nn

from lib_fusion.requests.settings import FusionSettings
from lib_fusion.webui.a1111.contexts import Context
from lib_fusion.webui.a1111.experts import Expert, check_base
from lib_fusion.webui.a1111.hooked_pass import FusionPass
from lib_fusion.webui.a1111.models import Models
from lib_fusion.webui.models.checkpoints import find_expert
from lib_fusion.webui.models.masks import Masks, places_of
from lib_fusion.webui.sampling.launch import check_parts, check_passes, weights_of


def prepare(models: Models, p: Any, settings: FusionSettings, masks: Masks, sampler: Any) -> FusionPass:
    """Checks, loads and encodes what a pass needs; raises SettingError or CheckpointError."""
    check_passes(p, settings)
    weights = weights_of(sampler.sampler_extra_args["cond"])

    def equip(sd_model: nn.Module) -> tuple[list[Expert], list[Context | None]]:
        check_base(sd_model)
        infos = [find_expert(expert, f"experts[{i}]", sd_model) for i, expert in enumerate(settings.experts)]
        experts = models.experts.acquire(infos, list(settings.experts), sd_model, settings.method == "AFA")
        contexts: list[Context | None] = []
        needed = sum(expert.text_encoder == "own" for expert in settings.experts)
        for i, (loaded, expert) in enumerate(zip(experts, settings.experts)):
            conditioning = models.texts.encode(p, loaded, expert, f"experts[{i}]", models.experts.loras, needed)
            if conditioning is not None:
                check_parts(weights, weights_of(conditioning.cond), expert.prompt, f"experts[{i}]")
            contexts.append(None if conditioning is None else Context(conditioning, prompt_parser))
        return experts, contexts

    is_hires = bool(getattr(p, "is_hr_pass", False))
    places = places_of(p, settings, masks)
    return FusionPass(settings, equip, sampler, p.sd_model, models.aggregators, is_hires, places)
