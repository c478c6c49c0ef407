"""One sampling pass from before its first step to its record, in any host: prepared, attached, run, and taken off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from lib_fusion.errors import FusionError, SettingError, is_out_of_memory, release
from lib_fusion.fusion.records import Keep
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import MAP_PARAMETERS, PREVIEWS, FusionSettings
from lib_fusion.webui.options import read_option
from lib_fusion.webui.refusal import RequestRefusedError

#: Why models are not run on their places only.
NO_CONTROL = "allowed without ControlNet, whose hints are for the whole picture; switch one of them off"
NO_TILING = "allowed without Tiling, since a part of the picture has no opposite edges; switch one of them off"
OUT_OF_MEMORY = "Denoiser Fusion: the models do not fit into memory together, so the experts have been unloaded"


class SamplingPass(Protocol):
    """One pass, as a host's adapter makes it. ``refined``: a refiner has taken over, and the pass was off since."""

    session: FusionSession
    refined: bool

    def attach(self) -> None:
        """Puts on all that acts on the host's objects; raises SettingError where it does not fit."""

    def detach(self) -> None:
        """Takes everything off, however the pass ended; may be called again."""

    def finish(self) -> None:
        """After the last step: raises what was not raised yet, and checks that all has acted."""

    def fail(self, error: Exception) -> None:
        """Ends the pass with an error at its next model call."""

    def levels_of(self, arguments: Mapping[str, Any]) -> list[float]:
        """The pass's noise levels, from the arguments of the sampling function; raises KeyError where it has none."""

    def begin_skipping(self, function: Any, arguments: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
        """The sampling function's callback, which may also correct its latents."""

    def room_for_vae(self, free: Callable[[], None], tell: Callable[[str], None]) -> Any:
        """What lets the VAE have the experts' memory after the pass, with a method ``remove``; or None."""


def launch(
    runtime: Any, prepare: Callable[[], SamplingPass], sampler: Any, sample: Callable[[], Any],
    tell: Callable[[str], None],
) -> tuple[Any, dict]:  # fmt: skip
    """Runs a sampler's launch with the experts on; returns its samples and the record of the pass.

    ``tell``: takes a line for under the picture. Everything that can be refused is refused before the first step, with
    RequestRefusedError, which nothing swallows.
    """
    began = time.perf_counter()
    runtime.keep_room(None)
    fusion = None
    try:
        fusion = runtime.current = prepare()
        try:
            fusion.attach()
            with announced_levels(sampler, fusion.session, fusion.levels_of, fusion.begin_skipping):
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
            raise RequestRefusedError(f"{OUT_OF_MEMORY}; {runtime.models.remedy} ({error})", status_code=500) from error
        raise
    runtime.keep_room(fusion.room_for_vae(runtime.free, tell))
    seconds = time.perf_counter() - began
    done = fusion.session
    record = {"calls": done.calls, "seconds": seconds, "refined": fusion.refined, "records": done.records}
    return samples, {**record, "rows": done.rows, "skipped_rows": done.skipped_rows}


def check_passes(p: Any, settings: FusionSettings) -> None:
    """Refuses settings for a pass that will not come; raises SettingError."""
    if settings.passes == "hires" and not getattr(p, "enable_hr", False):
        raise SettingError("passes", "hires", "allowed without hires fix: both, first")
    if settings.may_skip and settings.skip_passes == "hires" and not getattr(p, "enable_hr", False):
        raise SettingError("skip_passes", "hires", "allowed without hires fix: both, first")


def check_parts(weights: list[list[float]], own: list[list[float]], prompt: str, field: str) -> None:
    """Refuses an expert's prompt whose AND parts are others than the picture's; raises SettingError.

    Both: for each picture the weights of its prompt's parts.
    """
    if own != weights:
        parts = f"the picture's prompt has AND parts weighted {weights[0]}, this one {own[0]}"
        raise SettingError(f"{field}.prompt", prompt, f"{parts}; allowed: the same parts and weights")


def weights_of(cond: Any) -> list[list[float]]:
    """For each image the weights of its AND parts, from the host's composed conditioning."""
    return [[part.weight for part in image] for image in cond.batch]


def wanted_records(settings: FusionSettings) -> Keep:
    """The records that a request, or else the host's settings, want of a pass; raises SettingError."""
    kinds = settings.previews
    if kinds is None:
        kinds = tuple(kind for kind in PREVIEWS if read_option(f"preview_{kind}"))
    rows = MAP_PARAMETERS if "maps" in kinds else ()
    return Keep.read(kinds, {row.key: read_option(f"preview_{row.key}") for row in rows})


@contextmanager
def announced_levels(
    sampler: Any, session: FusionSession, levels_of: Callable[[Mapping[str, Any]], list[float]],
    wrap_callback: Callable[[Any, Mapping[str, Any]], Any] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Gives the session the pass's noise levels, which the host hands to its sampling function and to nobody else.

    FreeU's schedule and skipping go by them, since counters count something else than steps with second-order samplers,
    hires fix or adaptive steps. For these two, a sampling function without levels is an error.
    """
    function = sampler.func

    def func(*args: Any, **kwargs: Any) -> Any:
        try:
            session.begin(levels_of(kwargs))
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
