"""Skipping in one sampling pass: which pictures each model must be run for, the forecasts for the rest, the record.

Every picture has its own policy for each model, so that it does not depend on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lib_fusion.fusion.crops import Box
from lib_fusion.fusion.level import Level
from lib_fusion.fusion.readings import Readings
from lib_fusion.fusion.records import SkipRecord
from lib_fusion.methods.skipping import DenoisedForecaster, Forecaster, LastNoise, Policy
from lib_fusion.requests.settings import FusionSettings

#: The most skips in a row where the settings leave it to the policy.
POLICY_MAX = {"Forecast": 1, "Paper": 4}
#: Marks of a step in a path.
COMPUTED, SKIPPED = "#", "."


@dataclass
class Correction:
    """The change (K,C,H,W) of a model's noise for a picture, at the step of this noise level."""

    model: int
    picture: int
    log_sigma: float
    change: torch.Tensor


@dataclass
class Skips:
    """All policies of a pass, and their decisions.

    ``paths`` has for each model a text for each picture, one mark a step: COMPUTED or SKIPPED. ``make``, where given,
    makes the policy of a model and a picture instead of the settings. ``timeline``, where given, records each step.
    ``adds_noise``: whether the sampler does in its steps; the host sets it before the first one.

    In a step, ``begin_step`` comes first and then, for each model that runs, ``needed``, ``forecast`` for the pictures
    that it is not needed for, and ``observe`` for the others. Only ``begin_step`` reads from the device, unless
    ``watch`` came before and ``readings`` were fetched since.
    """

    settings: FusionSettings
    make: Callable[[int, int], Any] | None = None
    paths: dict[int, list[str]] = field(default_factory=dict)
    timeline: list[SkipRecord] | None = None
    adds_noise: bool = False
    readings: Readings = field(default_factory=Readings)

    def __post_init__(self) -> None:
        self._policies: dict[tuple[int, int], Policy] = {}
        self._corrections: list[Correction] = []
        self._most = self.settings.skip_max or POLICY_MAX.get(self.settings.skipping, 1)
        #: How many steps back a correction may go; 0: there are none.
        self.reach = self._most if self.settings.skip_correct and self.settings.skipping == "Forecast" else 0
        self._is_joint = self._spares_uncond = False
        self._latents: Sequence[torch.Tensor] = ()
        self._watched: Sequence[torch.Tensor] | None = None
        self._boxes: Mapping[int, Box] = {}
        self._signal = 1.0

    def watch(self, latents: Sequence[torch.Tensor]) -> None:
        """Shows the policies the latents that ``begin_step`` is given next, and asks for what they measure."""
        self._watched = latents
        for (_, picture), policy in self._policies.items():
            policy.watch(latents[picture])
            self._ask(policy)

    def begin_step(
        self, latents: Sequence[torch.Tensor], signal: float = 1.0, is_joint: bool = False, spares_uncond: bool = False
    ) -> None:
        """Begins a step. The history is cleared where the models join or part, or unconditional rows come back.

        ``latents``: each picture's (C,H,W), as the sampler holds it, with the picture in it scaled by ``signal``.
        ``is_joint``: the models make one prediction, the base's (AFA). ``spares_uncond``: unconditional rows are not
        computed.
        """
        if is_joint != self._is_joint or self._spares_uncond > spares_uncond:
            self._policies.clear()
        elif spares_uncond > self._spares_uncond:
            for policy in self._policies.values():
                policy.end_guidance()
        self._is_joint, self._spares_uncond = is_joint, spares_uncond
        if self._watched is not latents:
            self.watch(latents)
        self._latents, self._signal, self._watched = latents, signal, None
        self.readings.fetch()
        if self.timeline is not None:
            self.timeline.append({})

    def crop(self, boxes: Mapping[int, Box]) -> None:
        """From this step on these models predict their boxes only; a model with another box than before starts over."""
        if boxes != self._boxes:
            changed = {model for model in {*boxes, *self._boxes} if boxes.get(model) != self._boxes.get(model)}
            self._policies = {key: policy for key, policy in self._policies.items() if key[0] not in changed}
        self._boxes = boxes

    def pass_over(self, models: Sequence[int], pictures: int) -> None:
        """Records a step in which these models ran unasked: the host had left out half of its rows."""
        if self.timeline is not None:
            self.timeline.append({model: [(COMPUTED, None)] * pictures for model in models})

    def needed(self, model: int, level: Level, whole: bool = False, decides: bool = False) -> list[int]:
        """The pictures that the model must be run for in this step; ``whole``: all of them, or none.

        The last step is never forecast, nor is one that ``decides`` a mask which is then held: its edges are hard, so
        that a forecast's small error there may give a position to another model for good.
        """
        wanted, pictures = [], range(len(self._latents))
        is_due = (level.is_last or decides) and self.settings.skipping == "Forecast"
        for picture in pictures:
            if is_due or not self._policy(model, picture).may_skip(level.log_sigma, level.stride):
                wanted.append(picture)
        if whole and wanted:
            wanted = list(pictures)
        marks = [COMPUTED if picture in wanted else SKIPPED for picture in pictures]
        self.paths[model] = [a + b for a, b in zip(self.paths.get(model, [""] * len(marks)), marks)]
        if self.timeline is not None:
            estimates = [self._policy(model, i).estimate(level.log_sigma, level.stride) for i in pictures]
            judged = list(zip(marks, estimates))
            models = range(1 + len(self.settings.experts)) if self._is_joint else (model,)
            self.timeline[-1].update(dict.fromkeys(models, judged))
        return wanted

    def observe(self, model: int, picture: int, level: Level, noise: torch.Tensor, weights: torch.Tensor) -> None:
        """Takes a computed noise (K,C,H,W); with ``weights`` (K,1,1,1) its rows add up to the guided noise."""
        policy, box = self._policy(model, picture), self._boxes.get(model)
        part = noise if box is None else box.cut(noise)
        for log_sigma, change in policy.observe(level.log_sigma, part, weights, self._noisy(picture, box)):
            whole = change if box is None else box.paste(change, torch.zeros_like(noise))
            self._corrections.append(Correction(model, picture, log_sigma, whole))
        self._ask(policy)

    def forecast(self, model: int, picture: int, level: Level) -> torch.Tensor:
        """The noise (K,C,H,W) of a picture that the model is not run for; outside the model's box it is 0."""
        box = self._boxes.get(model)
        noise = self._policy(model, picture).forecast(level.log_sigma, self._noisy(picture, box))
        if box is None:
            return noise
        return box.paste(noise, noise.new_zeros((*noise.shape[:-2], *self._latents[picture].shape[-2:])))

    def take_corrections(self) -> list[Correction]:
        """What this step has shown about those skipped before it, once."""
        result, self._corrections = self._corrections, []
        return result if self.reach else []

    def record(self) -> dict[str, Any]:
        """By model and picture: predictions computed and skipped, the path, and the relative errors of forecasts."""
        self.readings.fetch()
        return {
            "computed": {model: [path.count(COMPUTED) for path in paths] for model, paths in self.paths.items()},
            "skipped": {model: [path.count(SKIPPED) for path in paths] for model, paths in self.paths.items()},
            "paths": self.paths,
            "errors": {model: [[round(e, 5) for e in self._policy(model, i).errors] for i in range(len(paths))]
                       for model, paths in self.paths.items()},
        }  # fmt: skip

    def _noisy(self, picture: int, box: Box | None = None) -> torch.Tensor:
        """A picture's latent (C,H,W), or a box of it, as picture + sigma * noise."""
        latent = self._latents[picture]
        return (latent if box is None else box.cut(latent)) / self._signal

    def _ask(self, policy: Policy) -> None:
        """Asks for the number that a policy's next decision waits for, if it has a new one."""
        measured, policy.measured = policy.measured, None
        if measured is not None:
            self.readings.ask(measured, lambda values: policy.settle(values[0]))

    def _policy(self, model: int, picture: int) -> Policy:
        key = (model, picture)
        if key not in self._policies:
            self._policies[key] = (self.make or self._make)(model, picture)
        return self._policies[key]

    def _make(self, _model: int, _picture: int) -> Policy:
        s = self.settings
        if s.skipping == "Paper":
            return LastNoise(s.skip_threshold, self._most)
        kind = DenoisedForecaster if self.adds_noise else Forecaster
        return kind(s.skip_tolerance, self._most, s.skip_warmup)


def make_skips(settings: FusionSettings, timeline: list[SkipRecord] | None, readings: Readings) -> Skips | None:
    """A pass's policies, or None where nothing can be skipped."""
    return Skips(settings, timeline=timeline, readings=readings) if settings.may_skip else None


def join_records(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of several batches' pictures, by the models' numbers."""
    models = sorted({model for record in records for model in record["computed"]})
    return {
        key: {str(model): [value for record in records for value in record[key].get(model, [])] for model in models}
        for key in ("computed", "skipped", "paths", "errors")
    }
