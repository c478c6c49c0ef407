"""One sampling pass from before its first step to its record: checked, loaded, attached, run, and taken off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from modules import prompt_parser
from torch import nn

from lib_fusion.errors import FusionError, SettingError, is_out_of_memory, release
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import FusionSettings
from lib_fusion.webui.models.experts import Expert, check_base, find_expert
from lib_fusion.webui.models.masks import Masks, places_of
from lib_fusion.webui.models.placement import waits_in_ram
from lib_fusion.webui.refusal import RequestRefusedError
from lib_fusion.webui.sampling.contexts import Context, weights_of
from lib_fusion.webui.sampling.decoding import RoomForVae
from lib_fusion.webui.sampling.hooked_pass import FusionPass
from lib_fusion.webui.sampling.levels import levels_of

OUT_OF_MEMORY = ("Denoiser Fusion: the models do not fit into memory together, so the experts have been unloaded; "
                 "Settings > Denoiser Fusion lets experts wait in RAM")  # fmt: skip


def launch(
    runtime: Any, p: Any, settings: FusionSettings, masks: Masks, sampler: Any, sample: Callable[[], Any]
) -> tuple[Any, dict]:
    """Runs a sampler's launch with the experts on; returns its samples and the record of the pass.

    Everything that can be refused is refused before the first step, with RequestRefusedError, which nothing swallows.
    """
    began = time.perf_counter()
    runtime.keep_room(None)
    fusion = None
    try:
        fusion = runtime.current = prepare(runtime, p, settings, masks, sampler)
        try:
            fusion.attach()
            with announced_levels(sampler, fusion.session, fusion.begin_skipping):
                samples = sample()
            fusion.finish()
        finally:
            fusion.detach()
            runtime.current = None  # not before: what could not be taken off is taken off at the next start
    except FusionError as error:
        raise RequestRefusedError(str(error)) from error
    except Exception as error:
        del fusion
        release(error)
        runtime.free()  # after any error the next picture has all memory, and loads again what it needs
        if is_out_of_memory(error):
            raise RequestRefusedError(f"{OUT_OF_MEMORY} ({error})", status_code=500) from error
        raise
    if fusion.experts and not waits_in_ram(fusion.sd_model):
        runtime.keep_room(RoomForVae(fusion.sd_model, runtime.free, p.comment))
    seconds = time.perf_counter() - began
    done = fusion.session
    record = {"calls": done.calls, "seconds": seconds, "refined": fusion.refined, "records": done.records}
    return samples, {**record, "rows": done.rows, "skipped_rows": done.skipped_rows}


def prepare(runtime: Any, p: Any, settings: FusionSettings, masks: Masks, sampler: Any) -> FusionPass:
    """Checks, loads and encodes what a pass needs; raises SettingError or CheckpointError."""
    if settings.passes == "hires" and not getattr(p, "enable_hr", False):
        raise SettingError("passes", "hires", "allowed without hires fix: both, first")
    if settings.may_skip and settings.skip_passes == "hires" and not getattr(p, "enable_hr", False):
        raise SettingError("skip_passes", "hires", "allowed without hires fix: both, first")
    weights = weights_of(sampler.sampler_extra_args["cond"])

    def equip(sd_model: nn.Module) -> tuple[list[Expert], list[Context | None]]:
        check_base(sd_model)
        infos = [find_expert(expert, f"experts[{i}]", sd_model) for i, expert in enumerate(settings.experts)]
        experts = runtime.experts.acquire(infos, list(settings.experts), sd_model, settings.method == "AFA")
        contexts: list[Context | None] = []
        needed = sum(expert.text_encoder == "own" for expert in settings.experts)
        for i, (loaded, expert) in enumerate(zip(experts, settings.experts)):
            conditioning = runtime.texts.encode(p, loaded, expert, f"experts[{i}]", runtime.experts.loras, needed)
            own = weights if conditioning is None else weights_of(conditioning.cond)
            if own != weights:
                parts = f"the picture's prompt has AND parts weighted {weights[0]}, this one {own[0]}"
                raise SettingError(f"experts[{i}].prompt", expert.prompt,
                                   f"{parts}; allowed: the same parts and weights")  # fmt: skip
            contexts.append(None if conditioning is None else Context(conditioning, prompt_parser))
        return experts, contexts

    is_hires = bool(getattr(p, "is_hr_pass", False))
    places = places_of(p, settings, masks)
    return FusionPass(settings, equip, sampler, p.sd_model, runtime.aggregators, is_hires, places)


@contextmanager
def announced_levels(
    sampler: Any, session: FusionSession, wrap_callback: Callable[[Any, Mapping[str, Any]], Any] | None = None
) -> Iterator[None]:
    """Gives the session the pass's noise levels, which the host hands to its sampling function and to nobody else.

    FreeU's schedule and skipping go by them, since counters count something else than steps with second-order samplers,
    hires fix or adaptive steps. For these two, a sampling function without levels is an error.
    """
    function = sampler.func

    def func(*args: Any, **kwargs: Any) -> Any:
        try:
            session.begin(levels_of(kwargs, sampler.model_wrap_cfg.steps))
        except KeyError:
            if session.freeu or session.skips is not None:
                raise
        if session.skips is not None:
            kwargs["callback"] = wrap_callback(function, kwargs)
        return function(*args, **kwargs)

    sampler.func = func
    try:
        yield
    finally:
        sampler.func = function
