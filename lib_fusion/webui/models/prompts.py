"""The prompts of a pass as the host conditions its own model by them, and an expert's text in their place."""

from __future__ import annotations

from typing import Any

from modules import extra_networks, prompt_parser, shared

from lib_fusion.errors import SettingError

#: Brackets in an expert's prompt. The host's reader of prompts takes minutes and gigabytes for some thousand.
MOST_BRACKETS = 200


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
    """The expert's own text, without LoRAs, for every picture."""
    if sum(map(text.count, "()[]")) > MOST_BRACKETS:
        raise SettingError(field, text, f"allowed: at most {MOST_BRACKETS} brackets")
    plain, networks = extra_networks.parse_prompts([text])
    if networks:
        raise SettingError(field, text, "allowed: a prompt without <...>; LoRAs are named in the prompt")
    return prompt_parser.SdConditioning(plain * len(prompts), copy_from=prompts)
