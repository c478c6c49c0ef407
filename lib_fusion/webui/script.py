"""What the script class does, so that scripts/denoiser_fusion.py only registers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lib_fusion.errors import FusionError
from lib_fusion.infotext import infotext_keys, write_infotext
from lib_fusion.records import Records
from lib_fusion.settings import COMPARE, FusionSettings
from lib_fusion.webui import compare, gallery, sampling, xyz
from lib_fusion.webui.aggregators import complete
from lib_fusion.webui.experts import find_checkpoint
from lib_fusion.webui.refusal import RequestRefusedError
from lib_fusion.webui.request import read_args, values_of
from lib_fusion.webui.runtime import runtime

ATTRIBUTE = "_denoiser_fusion"
#: On a request that is to be compared: what it was before the host changed it.
KEPT = "_denoiser_fusion_kept"


@dataclass
class Job:
    """One generation's request: its settings, or the error that its sampling will be ended with.

    ``calls`` and ``seconds`` are those of the batch that is being made, over both of its passes, and so
    ``rows``, of which ``skipped_rows`` more were forecast; ``records``
    are those of each batch so far.
    """

    settings: FusionSettings | None = None
    error: FusionError | None = None
    names: list[str] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    skipped_rows: list[int] = field(default_factory=list)
    seconds: float = 0.0
    records: list[Records] = field(default_factory=list)

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
    try:
        asked = COMPARE.read(values_of(args).get(COMPARE.key, False))
    except FusionError:
        return  # told by ``begin``
    if asked and not hasattr(p, compare.OVERRIDE):
        setattr(p, KEPT, compare.keep_request(p))


def begin(p: Any, args: Sequence[Any]) -> None:
    """Reads the request and writes its infotext. Never raises: the host would go on without the effect."""
    runtime.drop_leftovers()
    for key in infotext_keys():  # an XYZ plot's cells share this dict
        p.extra_generation_params.pop(key, None)
    job = Job()
    setattr(p, ATTRIBUTE, job)
    try:
        if hasattr(p, compare.OVERRIDE):
            job.settings = getattr(p, compare.OVERRIDE)
        else:
            job.settings = read_args(args, getattr(p, xyz.ATTRIBUTE, None))
        if job.settings is not None:
            job.settings = complete(job.settings)
            infos = [
                find_checkpoint(expert.checkpoint, f"experts[{i}].checkpoint")
                for i, expert in enumerate(job.settings.experts)
            ]
            job.names = [info.name for info in infos]
            p.extra_generation_params.update(write_infotext(job.settings, job.names))
    except FusionError as error:
        job.error = error


def wrap_sampler(p: Any) -> None:
    """Wraps this sampler's launch, once: inside it errors are heard and nothing outlives the sampling."""
    job: Job | None = getattr(p, ATTRIBUTE, None)
    if job is None or (job.settings is None and job.error is None):
        return
    is_hires = bool(getattr(p, "is_hr_pass", False))
    if not is_hires:
        job.begin_batch()
    if job.settings is not None and job.settings.passes == ("first" if is_hires else "hires") and _has_pass(p, job):
        return
    sampler = p.sampler
    original = sampler.launch_sampling

    def launch_sampling(steps: int, func: Any) -> Any:
        del sampler.launch_sampling
        if job.error is not None:
            raise RequestRefusedError(str(job.error)) from job.error
        samples, record = sampling.launch(runtime, p, job.settings, sampler, lambda: original(steps, func))
        job.add(record)
        _tell(p, job, record)
        return samples

    sampler.launch_sampling = launch_sampling


def end(p: Any, processed: Any) -> None:
    """All pictures are there: shows how they came about, where that is wanted."""
    runtime.drop_leftovers()
    job: Job | None = getattr(p, ATTRIBUTE, None)
    if job is None or job.settings is None:
        return
    kept = getattr(p, KEPT, None)
    if kept is not None:
        compare.add_comparison(p, processed, kept, job.settings, job.names)
    kinds = sampling.wanted_records().kinds
    if kinds and not hasattr(p, compare.OVERRIDE):
        gallery.add_previews(p, processed, kinds, job.records, job.settings, job.names)


def _has_pass(p: Any, job: Job) -> bool:
    """Whether the pass that was asked for will come; if not, the wrapped launch says so."""
    return job.settings.passes == "first" or bool(getattr(p, "enable_hr", False))


def _tell(p: Any, job: Job, record: dict) -> None:
    """Writes what was done into the infotext: U-Net calls of each model, and seconds, over both passes of a picture."""
    names = ["base", *(f"expert {i + 1}" for i in range(len(job.calls) - 1))]
    told = ", ".join(f"{name} {calls}" for name, calls in zip(names, job.calls))
    p.extra_generation_params["Fusion U-Net calls"] = told
    if job.settings.may_skip:
        counts = zip(names, job.rows, job.skipped_rows)
        told = ", ".join(f"{name} {rows} of {rows + skipped}" for name, rows, skipped in counts)
        p.extra_generation_params["Fusion U-Net rows"] = told
    p.extra_generation_params["Fusion seconds"] = f"{job.seconds:.2f}"
    if record["refined"]:
        p.comment("Denoiser Fusion was off after the refiner took over.")
    if job.settings.freeu != "Off" and any(key.lower().startswith("freeu") for key in p.extra_generation_params):
        p.comment("Denoiser Fusion: another FreeU was on as well; both have acted, one after the other.")
