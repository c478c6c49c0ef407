"""Skipping in one sampling pass: which pictures each model must be run for, the forecasts for the rest, the record.

Every picture has its own policy for each model, so that it does not depend on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lib_fusion.fusion.level import Level
from lib_fusion.fusion.records import SkipRecord
from lib_fusion.methods.skipping import Forecaster, LastNoise
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

    In a step, ``begin_step`` comes first and then, for each model that runs, ``needed``, ``forecast`` for the pictures
    that it is not needed for, and ``observe`` for the others.
    """

    settings: FusionSettings
    make: Callable[[int, int], Any] | None = None
    paths: dict[int, list[str]] = field(default_factory=dict)
    timeline: list[SkipRecord] | None = None

    def __post_init__(self) -> None:
        self._policies: dict[tuple[int, int], Forecaster | LastNoise] = {}
        self._corrections: list[Correction] = []
        self._most = self.settings.skip_max or POLICY_MAX.get(self.settings.skipping, 1)
        #: How many steps back a correction may go; 0: there are none.
        self.reach = self._most if self.settings.skip_correct and self.settings.skipping == "Forecast" else 0
        self._is_joint = self._spares_uncond = False

    def begin_step(self, is_joint: bool = False, spares_uncond: bool = False) -> None:
        """Begins a step; a change of either of these clears the history.

        ``is_joint``: the models make one prediction, the base's (AFA). ``spares_uncond``: unconditional rows are not
        computed.
        """
        if (is_joint, spares_uncond) != (self._is_joint, self._spares_uncond):
            self._policies.clear()
            self._is_joint, self._spares_uncond = is_joint, spares_uncond
        if self.timeline is not None:
            self.timeline.append({})

    def pass_over(self, models: Sequence[int], pictures: int) -> None:
        """Records a step in which these models ran unasked: the host had left out half of its rows."""
        if self.timeline is not None:
            self.timeline.append({model: [(COMPUTED, None)] * pictures for model in models})

    def needed(self, model: int, level: Level, latents: Sequence[torch.Tensor], whole: bool = False) -> list[int]:
        """The pictures that the model must be run for in this step; ``whole``: all of them, or none.

        ``latents``: each picture's (C,H,W), variance-preserving. The last step is never forecast.
        """
        wanted = []
        for picture, latent in enumerate(latents):
            may = self._policy(model, picture).may_skip(level.log_sigma, latent)
            if not may or (level.is_last and self.settings.skipping == "Forecast"):
                wanted.append(picture)
        if whole and wanted:
            wanted = list(range(len(latents)))
        marks = [COMPUTED if picture in wanted else SKIPPED for picture in range(len(latents))]
        self.paths[model] = [a + b for a, b in zip(self.paths.get(model, [""] * len(marks)), marks)]
        if self.timeline is not None:
            judged = [(mark, self._policy(model, i).estimate(level.log_sigma)) for i, mark in enumerate(marks)]
            models = range(1 + len(self.settings.experts)) if self._is_joint else (model,)
            self.timeline[-1].update(dict.fromkeys(models, judged))
        return wanted

    def observe(self, model: int, picture: int, level: Level, noise: torch.Tensor, weights: torch.Tensor) -> None:
        """Takes a computed noise (K,C,H,W); with ``weights`` (K,1,1,1) its rows add up to the guided noise."""
        for log_sigma, change in self._policy(model, picture).observe(level.log_sigma, noise, weights):
            self._corrections.append(Correction(model, picture, log_sigma, change))

    def forecast(self, model: int, picture: int, level: Level) -> torch.Tensor:
        """The noise (K,C,H,W) of a picture that the model is not run for."""
        return self._policy(model, picture).forecast(level.log_sigma)

    def take_corrections(self) -> list[Correction]:
        """What this step has shown about those skipped before it, once."""
        result, self._corrections = self._corrections, []
        return result if self.reach else []

    def record(self) -> dict[str, Any]:
        """By model and picture: predictions computed and skipped, the path, and the relative errors of forecasts."""
        return {
            "computed": {model: [path.count(COMPUTED) for path in paths] for model, paths in self.paths.items()},
            "skipped": {model: [path.count(SKIPPED) for path in paths] for model, paths in self.paths.items()},
            "paths": self.paths,
            "errors": {model: [[round(e, 5) for e in self._policy(model, i).errors] for i in range(len(paths))]
                       for model, paths in self.paths.items()},
        }  # fmt: skip

    def _policy(self, model: int, picture: int) -> Forecaster | LastNoise:
        key = (model, picture)
        if key not in self._policies:
            self._policies[key] = (self.make or self._make)(model, picture)
        return self._policies[key]

    def _make(self, _model: int, _picture: int) -> Forecaster | LastNoise:
        s = self.settings
        if s.skipping == "Paper":
            return LastNoise(s.skip_threshold, self._most)
        return Forecaster(s.skip_tolerance, self._most, s.skip_warmup)


def make_skips(settings: FusionSettings, timeline: list[SkipRecord] | None = None) -> Skips | None:
    """A pass's policies, or None where nothing can be skipped."""
    return Skips(settings, timeline=timeline) if settings.may_skip else None


def join_records(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of several batches' pictures, by the models' numbers."""
    models = sorted({model for record in records for model in record["computed"]})
    return {
        key: {str(model): [value for record in records for value in record[key].get(model, [])] for model in models}
        for key in ("computed", "skipped", "paths", "errors")
    }
