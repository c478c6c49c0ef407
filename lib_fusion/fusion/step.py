"""One denoising step of N models. A host says how models are run on some rows; everything else happens here.

Which models run, alone or in lockstep; which rows are computed and which are forecast; FreeU's strength; the guard
against NaN; the counts; and how the models' outputs become one. A host makes a ``Step``, calls ``run`` for the rows of
each U-Net call, then ``observe`` and ``fuse`` once it has them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from lib_fusion.fusion.blend import BASE, Halves, Shares
from lib_fusion.fusion.crops import Box
from lib_fusion.fusion.level import Level
from lib_fusion.fusion.rows import Rows, put, take
from lib_fusion.fusion.session import FusionSession

#: Runs models on some rows of the step: one model alone, or several in lockstep. Returns their output (R,C,H,W); with a
#: box it is run on that of the latents, and returns so much.
Predict = Callable[[Sequence[int], Sequence[int], "Box | None"], torch.Tensor]


class Step:
    """One step of a session at a noise level.

    ``latents``: each picture's (C,H,W) as the sampler holds it; None where nothing may be skipped in this step.
    ``sigma_scaled``: whether that is picture + sigma * noise; else it is variance-preserving. ``whole``: a model is run
    for all pictures or for none. ``outputs``: what the models' outputs are in this step, ``noise``, ``v``, or
    ``denoised`` latents where ``x`` of ``run`` is picture + sigma * noise. Models that predict otherwise are converted
    by the host. ``has_uncond``: whether the host has unconditional rows; it may have none at a guidance scale of 1.
    """

    def __init__(
        self, session: FusionSession, level: Level, rows: Rows, latents: Sequence[torch.Tensor] | None = None, *,
        sigma_scaled: bool = False, whole: bool = False, outputs: str = "noise", has_uncond: bool = True,
    ) -> None:  # fmt: skip
        self.session, self.level, self.rows = session, level, rows
        self.is_joint = session.blend.in_lockstep(level.timestep)
        self.models = session.blend.models_at(level.timestep)
        self.scale = session.guidance_at(level.timestep)
        #: Without guidance the unconditional rows play no part, so no model computes them.
        self.spares_uncond = rows.is_plain and self.scale == 1 and (session.guidance_scale != 1 or not has_uncond)
        self._shares = Shares(parts={self.models[0]: 1.0})
        self._skips = None if latents is None else session.skips
        self._whole = whole
        self._outputs: dict[int, list[torch.Tensor]] = {}
        self._needed: dict[int, list[int]] = {}
        self._noises: dict[int, dict[int, torch.Tensor]] = {}
        self._boxes: Mapping[int, Box] | None = None
        self._owners = rows.owners
        self._signal, self._shift = noise_of(outputs, level)
        if latents is not None and self._skips is not None:
            self._skips.begin_step(latents, 1.0 if sigma_scaled else level.signal, self.is_joint, self.spares_uncond)

    @property
    def skips(self) -> bool:
        """Whether the skipping policies decide in this step."""
        return self._skips is not None

    def run(self, rows: range, x: torch.Tensor, predict: Predict) -> torch.Tensor:
        """Runs the step's models for these rows of its table; returns the first model's output (R,C,H,W).

        ``x`` (R,C,H,W) is what the U-Nets are given for these rows. Rows of pictures that a model is not needed for
        are forecast.
        """
        if self._boxes is None:
            self._boxes = self.session.boxes_at(self.level.timestep, self.models, x.shape[-2:])
            if self._skips is not None:
                self._skips.crop(self._boxes)
        for models in [self.models] if self.is_joint else [(model,) for model in self.models]:
            output = self._run(models, rows, x, predict)
            self._outputs.setdefault(models[0], []).append(output)
        return self._outputs[self.models[0]][-1]

    def observe(self) -> None:
        """All rows are there: shows the computed ones to the skipping policies."""
        if self._skips is None:
            if self.session.skips is not None and self._outputs:
                self.session.skips.pass_over(self.models, self.rows.num_pictures)
            return
        for model, needed in self._needed.items():
            for picture in needed:
                noise = self._noises[model][picture]
                if self.spares_uncond:
                    noise[-1] = noise[0]
                self._skips.observe(model, picture, self.level, noise, self.guidance(noise.device)[picture])

    def fuse(self) -> torch.Tensor | None:
        """The fused rows (R,C,H,W) of those that ran; None where the first model's output stands as it is."""
        if self.is_joint or len(self.models) < 2 or not self._outputs:
            return None
        outputs = {model: self.output(model) for model in self.models}
        first = outputs[self.models[0]]
        owners = self._owners[: len(first)]
        halves = self._halves if len(first) == self.rows.num_all and not self.spares_uncond else None
        blend = self.session.blend
        fused = blend.fuse(self.level.timestep, outputs, owners, halves, self.session.guidance_scale)
        self._shares = blend.shares
        return fused

    def output(self, model: int = -1) -> torch.Tensor:
        """A model's output for all rows that ran (R,C,H,W), by default the first model's."""
        model = self.models[0] if model < 0 else model
        parts = self._outputs[model]
        if len(parts) > 1:
            self._outputs[model] = parts = [torch.cat(parts)]
        return parts[0]

    def guidance(self, device: torch.device) -> list[torch.Tensor]:
        """For each picture the weights (K,1,1,1) by which its rows add up to the guided noise."""
        return self.rows.guidance(self.scale, device)

    def correct(self, model: int, picture: int, change: torch.Tensor) -> None:
        """Adds ``change`` (K,C,H,W) to a model's output for the rows of a picture (noise predictions only)."""
        output = self.output(model)
        for row, its_change in zip(self.rows.rows_of(picture), change):
            output[row] += its_change

    def share(self, model: int, picture: int) -> torch.Tensor | float:
        """How much of a picture's fused noise is the model's: a part of one, or a map (1,H,W)."""
        return self._shares.of(model, picture)

    def _run(self, models: Sequence[int], rows: range, x: torch.Tensor, predict: Predict) -> torch.Tensor:
        """The output of one model, or of all in lockstep, for these rows: computed, forecast, or spared."""
        wanted = [row for row in rows if row < self.rows.num_cond] if self.spares_uncond else rows
        computed = self._computed(models[0], wanted)
        output = None
        if len(computed) == len(rows):
            output = self._predict(models, rows, x.shape[-2:], predict)
        elif computed:
            part = self._predict(models, computed, x.shape[-2:], predict)
            output = torch.zeros((len(x), *part.shape[1:]), dtype=part.dtype, device=part.device)
            put(output, [row - rows.start for row in computed], part)
        box = self._box_of(models[0])
        share = 1 if box is None else box.share(x.shape)
        for model in models:
            self.session.count(model, len(computed), len(wanted) - len(computed), share)
        if self._skips is not None:
            if output is not None:
                self._keep(models[0], computed, rows.start, output, x)
            spared = [row for row in wanted if row not in computed]
            output = self._with_forecasts(models[0], rows.start, spared, output, x)
        if len(wanted) < len(rows):
            output = self._with_copies(models[0], rows, output)
        assert output is not None
        return output

    def _computed(self, model: int, rows: Sequence[int]) -> Sequence[int]:
        """Those of the rows that the model must be run for."""
        if self._skips is None:
            return rows
        if model not in self._needed:
            decides = self.session.blend.decides_at(self.level.timestep)
            self._needed[model] = needed = self._skips.needed(model, self.level, self._whole, decides)
            spared = [i for i in range(self.rows.num_pictures) if i not in needed]
            self._noises[model] = {i: self._skips.forecast(model, i, self.level) for i in spared}
        return [row for row in rows if self._owners[row] in self._needed[model]]

    def _box_of(self, model: int) -> Box | None:
        """On what part of the latents a model is run; None: on the whole."""
        return self._boxes.get(model) if self._boxes else None

    def _predict(
        self, models: Sequence[int], rows: Sequence[int], size: Sequence[int], predict: Predict
    ) -> torch.Tensor:
        """One U-Net call, with FreeU where it acts; its sums go to the guard against NaN.

        The output has the latents' ``size`` (H, W), with zeros outside a model's box.
        """
        session, box = self.session, self._box_of(models[0])
        if self.is_joint:
            session.begin_call(self.level.timestep, [self._owners[row] for row in rows])
        with session.using_freeu(BASE if self.is_joint else models[0], self.level):
            output = predict(models, rows, box)
        if self.is_joint:
            session.watch_lockstep(models)
        else:
            session.watch(models, output.sum(dtype=torch.float32)[None])
        if box is None:
            return output
        return box.paste(output, output.new_zeros((*output.shape[:2], *size)))

    def _keep(self, model: int, computed: Sequence[int], start: int, output: torch.Tensor, x: torch.Tensor) -> None:
        """Keeps computed rows as noise, by picture, until the policies are shown them."""
        for row in computed:
            picture = self._owners[row]
            its_rows = self.rows.rows_of(picture)
            raw = output[row - start]
            if picture not in self._noises[model]:
                shape = (len(its_rows), *raw.shape)
                self._noises[model][picture] = torch.zeros(shape, dtype=torch.float32, device=raw.device)
            noise = self._signal * raw + self._shift * x[row - start] if self._shift else raw
            self._noises[model][picture][its_rows.index(row)] = noise

    def _with_forecasts(
        self, model: int, start: int, spared: Sequence[int], output: torch.Tensor | None, x: torch.Tensor
    ) -> torch.Tensor | None:
        """The rows with forecasts in the places of those that were not computed."""
        for row in spared:
            i, picture = row - start, self._owners[row]
            noise = self._noises[model][picture][self.rows.rows_of(picture).index(row)].to(x.device)
            if output is None:
                output = torch.zeros((len(x), *noise.shape), dtype=x.dtype, device=x.device)
            output[i] = ((noise - self._shift * x[i]) / self._signal).to(output.dtype)
        return output

    def _with_copies(self, model: int, rows: range, output: torch.Tensor | None) -> torch.Tensor:
        """The rows with each picture's conditional row in the place of its unconditional one, which nobody computed."""
        earlier = self._outputs.get(model, [])
        known = torch.cat([*earlier, *([] if output is None else [output])])
        first = rows.start - sum(map(len, earlier))
        copies = [self._owners[row] if row >= self.rows.num_cond else row for row in rows]
        return take(known, [row - first for row in copies])

    def _halves(self) -> Halves:
        """Conditional and unconditional noise (B,C,H,W) of each model, up to what is common to both."""
        combined = {model: self.rows.combine(self.output(model).float() * self._signal) for model in self.models}
        return {i: cond for i, (cond, _) in combined.items()}, {i: uncond for i, (_, uncond) in combined.items()}


def noise_of(outputs: str, level: Level) -> tuple[float, float]:
    """The factors a, b of ``noise = a * output + b * input``, by what outputs are (as ``Step`` takes it)."""
    if outputs == "denoised":
        sigma = math.exp(level.log_sigma)
        return -1 / sigma, 1 / sigma
    return (level.signal, level.noise) if outputs == "v" else (1.0, 0.0)
