"""What the script class does, so that scripts/denoiser_fusion.py only registers it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules import errors

from lib_fusion import __version__
from lib_fusion.errors import FusionError, SettingError, one_line
from lib_fusion.fusion.records import Records
from lib_fusion.requests.infotext import VERSION, infotext_keys, write_infotext
from lib_fusion.requests.loras import title_of
from lib_fusion.requests.refusals import in_panels_words
from lib_fusion.requests.request import is_panel, read_args, values_of
from lib_fusion.requests.settings import COMPARE, SAME_AS_BASE, ExpertSettings, FusionSettings
from lib_fusion.webui.host import adapter
from lib_fusion.webui.models import file_hashes, masks
from lib_fusion.webui.models.aggregators import complete
from lib_fusion.webui.models.checkpoints import find_checkpoint
from lib_fusion.webui.models.lora_files import find_loras
from lib_fusion.webui.options import all_presets
from lib_fusion.webui.panel import compare, gallery, xyz
from lib_fusion.webui.refusal import RequestRefusedError
from lib_fusion.webui.runtime import runtime
from lib_fusion.webui.sampling import launch
from lib_fusion.webui.words import translate

ATTRIBUTE = "_denoiser_fusion"
#: On a request that is to be compared: what it was before the host changed it.
KEPT = "_denoiser_fusion_kept"
#: A request's error until it is read: the host continues after any error of its scripts.
UNREAD = FusionError("Denoiser Fusion could not read the request; the console says why")


@dataclass
class Request:
    """One generation's request: its settings, or the error that its sampling will be ended with.

    ``calls`` and ``seconds`` are those of the batch that is being made, over both of its passes, and so
    ``rows``, of which ``skipped_rows`` more were forecast; ``records``
    are those of each batch so far.
    """

    settings: FusionSettings | None = None
    #: What the same request had asked for when it was read before.
    before: FusionSettings | None = None
    error: Exception | None = None
    #: Whether it came from the panel, whose errors name its controls.
    in_panel: bool = False
    names: list[str] = field(default_factory=list)
    #: The experts' painted masks.
    painted: masks.Masks = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    skipped_rows: list[float] = field(default_factory=list)
    seconds: float = 0.0
    records: list[Records] = field(default_factory=list)
    #: What stands in the place of the sampler's launch.
    launch: Any = None

    @property
    def titles(self) -> list[str]:
        """The experts' names for people."""
        experts = self.settings.experts if self.settings else ()
        stems = ("base" if name == SAME_AS_BASE else Path(name).stem for name in self.names)
        return [title_of(stem, expert.prompt) for stem, expert in zip(stems, experts)]

    def in_words(self, told: str) -> str:
        """A line for whoever asked: the panel's page may have another language."""
        return translate(told) if self.in_panel else told

    def begin_batch(self) -> None:
        self.calls, self.rows, self.skipped_rows = ([0] * (1 + len(self.names)) for _ in range(3))
        self.seconds = 0.0
        self.records.append(Records())

    def add(self, record: dict) -> None:
        """Notes what a pass has done."""
        for name in ("calls", "rows", "skipped_rows"):
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), record[name])])
        self.seconds += record["seconds"]
        self.records[-1].add(record["records"])


def before(p: Any, args: Sequence[Any]) -> None:
    """Before the host changes the request: keeps it, where a comparison is asked for."""
    p.__dict__.pop(KEPT, None)
    job = Request(before=getattr(getattr(p, ATTRIBUTE, None), "settings", None), error=UNREAD)
    setattr(p, ATTRIBUTE, job)
    try:
        if COMPARE.read(values_of(args).get(COMPARE.key, False)) and not hasattr(p, compare.OVERRIDE):
            if is_inside_script(p):
                raise SettingError(COMPARE.key, True, "allowed: false, or no script chosen under Script")
            setattr(p, KEPT, compare.keep_request(p))
    except Exception as error:
        job.error = error


def begin(p: Any, args: Sequence[Any]) -> None:
    """Reads the request and writes its infotext. Never raises: the host would continue without the effect."""
    job: Request = p.__dict__.setdefault(ATTRIBUTE, Request())
    earlier, params = job.settings or job.before, p.extra_generation_params
    job.in_panel = is_panel(args)
    try:
        runtime.drop_leftovers()
        told = {key: params.pop(key) for key in infotext_keys() if key in params}  # an XYZ plot's cells share it
        hashes = params.get(file_hashes.LORA_HASHES)
        file_hashes.remove(params)
        if hasattr(p, compare.OVERRIDE):
            job.settings = getattr(p, compare.OVERRIDE)
        else:
            job.settings = read_args(args, getattr(p, xyz.ATTRIBUTE, None), all_presets().get)
        if job.settings is not None:
            job.settings, job.painted = masks.settle(p, complete(job.settings))
            job.names = [name_of(expert, f"experts[{i}]") for i, expert in enumerate(job.settings.experts)]
            params.update(write_infotext(job.settings, job.names))
            if earlier == job.settings:
                params.update({**told, **params})  # ADetailer begins once more, between a picture and its infotext
                if hashes is not None:
                    params[file_hashes.LORA_HASHES] = hashes
        if job.error is UNREAD:
            job.error = None
    except Exception as error:
        job.error = error


def name_of(expert: ExpertSettings, field: str) -> str:
    """The name of an expert's checkpoint for infotexts; raises SettingError, also for LoRAs that are not there."""
    find_loras(expert.prompt, f"{field}.prompt")
    if expert.checkpoint == SAME_AS_BASE:
        return SAME_AS_BASE
    return find_checkpoint(expert.checkpoint, f"{field}.checkpoint").name


def wrap_sampler(p: Any) -> None:
    """Wraps this sampler's launch, once: inside it errors are heard and nothing outlives the sampling."""
    job: Request | None = getattr(p, ATTRIBUTE, None)
    if job is None or (job.settings is None and job.error is None):
        return
    sampler = p.sampler
    if job.launch is not None and sampler.__dict__.get("launch_sampling") is job.launch:
        del sampler.launch_sampling  # Forge comes here twice before a hires pass, and the second time counts
    original = sampler.launch_sampling
    is_hires = bool(getattr(p, "is_hr_pass", False))
    prepare = None
    try:
        if job.error is None and not _is_left_out(p, job, is_hires):
            prepare = adapter.prepare(runtime, p, job.settings, job.painted)
    except Exception as error:
        job.error = error

    def launch_sampling(steps: int, func: Any) -> Any:
        del sampler.launch_sampling
        try:
            return run(steps, func)
        except RequestRefusedError as error:
            cause = error.__cause__
            if job.in_panel and isinstance(cause, FusionError):
                raise RequestRefusedError(translate(in_panels_words(cause, job.names))) from cause
            raise

    def run(steps: int, func: Any) -> Any:
        if isinstance(job.error, FusionError):
            raise RequestRefusedError(str(job.error)) from job.error
        if job.error is not None:
            raise job.error
        if not is_hires or not job.records:  # hires fix of a finished picture has no first pass
            job.begin_batch()
        if prepare is None:
            file_hashes.add(p.extra_generation_params, job.settings, job.names)
            return original(steps, func)
        samples, record = launch.launch(
            runtime, prepare, sampler, lambda: original(steps, func), lambda told: p.comment(job.in_words(told)))
        job.add(record)
        _tell(p, job, record)
        file_hashes.add(p.extra_generation_params, job.settings, job.names)
        return samples

    sampler.launch_sampling = job.launch = launch_sampling


def end(p: Any, processed: Any) -> None:
    """All pictures are there: shows how they came about, where that is wanted."""
    runtime.drop_leftovers()
    job: Request | None = getattr(p, ATTRIBUTE, None)
    if job is None or job.settings is None or not processed.images:  # none yet: ADetailer ends once too early
        return
    with _told_of(processed, job, "mask"):
        masks.save_masks(p, processed, job.painted)
    kept = getattr(p, KEPT, None)
    if kept is not None:
        with _told_of(processed, job, "comparison"):
            compare.add_comparison(p, processed, kept, job.settings, job.titles)
    with _told_of(processed, job, "preview"):
        kinds = launch.wanted_records(job.settings).kinds
        if kinds and not hasattr(p, compare.OVERRIDE):
            shown = not is_inside_script(p)
            gallery.add_previews(p, processed, kinds, job.records, job.settings, job.titles, shown)


def is_inside_script(p: Any) -> bool:
    """Whether one of the host's scripts (SD upscale, Prompt matrix, X/Y/Z plot ..) makes pictures of this request.

    It counts and reads them by place, so nothing may be added to them.
    """
    chosen = (p.script_args or [0])[0]
    return isinstance(chosen, int) and chosen > 0


@contextmanager
def _told_of(processed: Any, job: Request, what: str) -> Iterator[None]:
    """The pictures exist already: where an extra can't be made or saved, they stay, and a line says so."""
    try:
        yield
    except Exception as error:
        told = f"Denoiser Fusion: the {what} could not be made ({one_line(f'{type(error).__name__}: {error}')})."
        processed.comments += f"{job.in_words(told)}\n"  # under the gallery
        processed.extra_generation_params["Fusion comment"] = told  # in the API's answer
        errors.report(told, exc_info=not isinstance(error, (FusionError, OSError)))


def _is_left_out(p: Any, job: Request, is_hires: bool) -> bool:
    """Whether this pass is not to be fused, but the other of hires fix; one that will not come is refused later."""
    other_comes = job.settings.passes == "first" or bool(getattr(p, "enable_hr", False))
    return job.settings.passes == ("first" if is_hires else "hires") and other_comes


def _tell(p: Any, job: Request, record: dict) -> None:
    """Writes what was done into the infotext: U-Net calls of each model, and seconds, over both passes of a picture."""
    names = ["base", *(f"expert {i + 1}" for i in range(len(job.calls) - 1))]
    told = ", ".join(f"{name} {calls}" for name, calls in zip(names, job.calls))
    p.extra_generation_params["Fusion U-Net calls"] = told
    if job.settings.may_skip or job.settings.crops:
        counts = zip(names, job.rows, job.skipped_rows)
        told = ", ".join(f"{name} {round(rows, 1):g} of {round(rows + skipped):g}" for name, rows, skipped in counts)
        p.extra_generation_params["Fusion U-Net rows"] = told
    elif job.settings.lowers_guidance and job.settings.guidance_after == 1:  # which spares unconditional rows
        p.extra_generation_params["Fusion U-Net rows"] = ", ".join(map("{} {}".format, names, job.rows))
    p.extra_generation_params["Fusion seconds"] = f"{job.seconds:.2f}"
    p.extra_generation_params[VERSION] = __version__
    if record["refined"]:
        p.comment(job.in_words("Denoiser Fusion was off after the refiner took over."))
    if job.settings.freeu != "Off" and any(key.lower().startswith("freeu") for key in p.extra_generation_params):
        told = "Denoiser Fusion: another FreeU was on as well; both have acted, one after the other."
        p.comment(job.in_words(told))
