"""What outlives a step of a sampling pass: settings, the mask, skipping policies, FreeU, counts, records.

A session is made at the start of a pass and thrown away at its end. It knows no host: hosts make a ``Step`` of it for
each denoising step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.fusion.blend import BASE, Blend
from lib_fusion.fusion.crops import Box, Crops
from lib_fusion.fusion.level import Level, Schedule
from lib_fusion.fusion.lockstep import ELSEWHERE, Lockstep, point_names
from lib_fusion.fusion.places import Places
from lib_fusion.fusion.policies import Skips, make_skips
from lib_fusion.fusion.readings import Readings
from lib_fusion.fusion.records import AfaWatch, Keep, Records
from lib_fusion.methods import freeu
from lib_fusion.requests.settings import FREEU_AUTO, FREEU_PUBLISHED, FREEU_STAGES, FusionSettings

#: In ``watch``: the aggregate of all models.
AGGREGATOR = -1
#: The remedy where a model predicts no number.
NOT_FINITE = "half precision is not enough for it (--no-half helps then), or its file is broken"


class Guard:
    """Remembers the first model whose sum was not finite. Apart from the session, which would else refer to itself."""

    def __init__(self) -> None:
        self.broken: int | None = None

    def judge(self, models: Sequence[int], totals: Sequence[float]) -> None:
        if self.broken is None:
            self.broken = next((model for model, total in zip(models, totals) if not math.isfinite(total)), None)


@dataclass
class FusionSession:
    """One sampling pass. Model 0 is the base, 1.. are the experts in the settings' order.

    ``places``: where experts draw whose settings say so. ``kinds`` are those of the models' U-Nets
    (``checkpoint.unet_kind``), or one for all. ``keep``: the kinds of ``records`` for previews. ``freeu`` has for each
    model what is attached to its U-Net, one object for models of one kind; it is empty where FreeU is off.
    ``calls``, ``rows`` and ``skipped_rows`` count U-Net calls and batch rows of each model, cropped ones by their area.
    """

    settings: FusionSettings
    places: Places = field(default_factory=Places)
    keep: Keep = field(default_factory=Keep)
    kinds: Sequence[str] = ("sd1",)
    guidance_scale: float = 1.0
    records: Records = field(default_factory=Records)
    calls: list[int] = field(init=False)
    rows: list[float] = field(init=False)
    skipped_rows: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.blend = Blend(self.settings, self.places, self.keep, self.records)
        self.num_models = self.blend.num_models
        self.calls = [0] * self.num_models
        no_rows: list[float] = [0] * self.num_models
        self.rows, self.skipped_rows = [*no_rows], no_rows
        self.readings = Readings()
        self.skips = self._make_skips()
        self.lockstep: Lockstep | None = None
        self.schedule = Schedule()
        made = {kind: make_freeu(self.settings, kind) for kind in self.kinds}
        kinds = self.kinds if len(self.kinds) > 1 else [*self.kinds] * self.num_models
        self._crops = Crops(self.places, self.blend.weights, kinds) if self.settings.crops else None
        self.freeu = [acting for kind in kinds if (acting := made[kind]) is not None]
        self._afa_watch: AfaWatch | None = None
        self._guard = Guard()

    def begin(self, levels: Sequence[float], sigmas: Sequence[float] = ()) -> None:
        """Sets the noise levels of the pass (sigmas or timesteps, falling): step i goes from one to the next.

        ``sigmas``: the levels as sigmas, by which skipping knows how long the steps are. FreeU's schedule and skipping
        need the levels. Raises SettingError where FreeU would stop before it starts.
        """
        self.schedule = Schedule(levels, sigmas)
        start, stop, steps = self.settings.freeu_start, self.settings.freeu_stop, self.schedule.steps
        if not self.freeu or steps < 1:  # img2img may have no step to take
            return
        if freeu.whole_steps(start, steps) > steps:
            raise SettingError("freeu_start", start, f"allowed in a pass of {steps} steps: at most {steps}")
        if freeu.whole_steps(start, steps) > freeu.whole_steps(stop, steps):
            raise SettingError("freeu_stop", stop, f"allowed with freeu_start {start:g} in {steps} steps: no less")

    def guidance_at(self, timestep: float) -> float:
        """The guidance scale at a timestep: the host's, and below the interval's end a smaller one.

        Kynkaanniemi et al., "Applying Guidance in a Limited Interval" (NeurIPS 2024).
        """
        until = self.settings.guidance_until
        if not self.settings.lowers_guidance or timestep > until or until == 0:
            return self.guidance_scale
        return min(self.settings.guidance_after, self.guidance_scale)

    def join(self, lockstep: Lockstep) -> None:
        """The models run in lockstep (AFA) by these hooks; raises SettingError for unknown blocks in ``keep``."""
        self.lockstep = lockstep
        if self.keep.afa:
            self._afa_watch = AfaWatch(self.records, self.keep, point_names(lockstep.unet))
            lockstep.on_maps = self._afa_watch.take

    def forget(self) -> None:
        """Another base has taken over: the models' past noises say nothing of its."""
        self.skips = self.skips and self._make_skips()

    def check_finite(self, base: str = "the base") -> None:
        """Raises FusionError naming the model if any output since the last call is not finite. ``base``: its name.

        It waits for the device where that was not done since (``readings.fetch``).
        """
        self.readings.fetch()
        broken, self._guard.broken = self._guard.broken, None
        if broken is None:
            return
        names = {AGGREGATOR: f"the aggregator {self.settings.afa_aggregator or self.settings.afa_maps}", BASE: base}
        name = names.get(broken) or f"expert {broken} ({self.settings.experts[broken - 1].checkpoint})"
        problem = "has predicted infinite values or NaN, so the picture was not finished"
        raise FusionError(f"{name} {problem}; {NOT_FINITE}")

    def watch(self, models: Sequence[int], totals: torch.Tensor) -> None:
        """Takes sums (K,) over outputs of these models, or over their features, in the order of computing.

        A sum is finite only if all of its values are. They are judged when the host reads from the device next.
        """
        self.readings.ask(totals, partial(self._guard.judge, models))

    def watch_lockstep(self, models: Sequence[int]) -> None:
        """Takes the sums of the lockstep's last call."""
        assert self.lockstep is not None
        if not self.lockstep.totals:
            raise FusionError(f"AFA could not act: {ELSEWHERE}; switch that or AFA off")
        for totals in self.lockstep.totals:
            self.watch((*models, AGGREGATOR), totals)

    def check_acted(self) -> None:
        """Raises FusionError where FreeU was to act in the pass and none of its blocks has run under its hooks."""
        if any(acting.was_due and not acting.has_acted for acting in self.freeu):
            raise FusionError(f"FreeU could not act: {ELSEWHERE}; switch that or FreeU off")

    def begin_call(self, timestep: float, owners: Sequence[int]) -> None:
        """Before a call of the models in lockstep; ``owners``: the picture of each row."""
        if self._afa_watch is not None:
            self._afa_watch.begin(timestep, owners)

    def boxes_at(self, timestep: float, models: Sequence[int], size: Sequence[int]) -> Mapping[int, Box]:
        """The boxes on which some of these models are run at this timestep; ``size``: of the latents (H, W)."""
        if self._crops is None or not self.blend.by_places(timestep):
            return {}
        return self._crops.of(models, size)

    def count(self, model: int, rows: int, skipped: int = 0, share: float = 1) -> None:
        """Counts a U-Net call of ``rows`` batch rows, none where 0, and the rows that were forecast instead.

        ``share``: the part of the picture that the call was made for. A row counts as much, and its rest as skipped.
        """
        self.calls[model] += rows > 0
        self.rows[model] += rows * share
        self.skipped_rows[model] += skipped + rows * (1 - share)

    @contextmanager
    def using_freeu(self, model: int, level: Level) -> Iterator[None]:
        """Around a U-Net call of a model: lets FreeU act in it as far as the settings say.

        The strength goes by the noise level, not by counted calls, so samplers that call twice in a step get the same;
        and by the model, so two that share one U-Net are distinguished.
        """
        s = self.settings
        if not self.freeu or s.freeu_models == ("experts" if model == BASE else "base"):
            yield
            return
        acting = self.freeu[model]
        acting.strength = freeu.strength(
            level.position, self.schedule.steps, s.freeu_start, s.freeu_stop, s.freeu_smooth
        )
        try:
            yield
        finally:
            acting.strength = 0.0

    def _make_skips(self) -> Skips | None:
        timeline = self.records.skips if "skips" in self.keep.kinds else None
        return make_skips(self.settings, timeline, self.readings)


def make_freeu(settings: FusionSettings, kind: str) -> freeu.FreeU | None:
    """FreeU with the factors that the settings choose for this kind of U-Net, or None where it is off."""
    if settings.freeu == "Off":
        return None
    if settings.freeu == "Custom":
        keys = {"backbone": "b", "skip": "s", "offset": "offset", "width": "width", "high": "high", "cutoff": "cutoff"}
        stages = {
            multiple: freeu.Stage(**{name: getattr(settings, f"freeu_{key}{n}") for name, key in keys.items()})
            for n, multiple in FREEU_STAGES.items()
        }
    else:
        name = FREEU_AUTO[kind] if settings.freeu == "Auto" else settings.freeu
        b1, b2, s1, s2 = FREEU_PUBLISHED[name][settings.freeu_version]
        stages = {FREEU_STAGES[1]: freeu.Stage(b1, s1), FREEU_STAGES[2]: freeu.Stage(b2, s2)}
    return freeu.FreeU(stages, int(settings.freeu_version))
