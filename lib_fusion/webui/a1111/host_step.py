"""One denoising step of the host: its rows, how models run on them, and what is written back over its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from modules import shared
from torch import nn

from lib_fusion.errors import FusionError
from lib_fusion.fusion.blend import BASE
from lib_fusion.fusion.crops import Box
from lib_fusion.fusion.lockstep import Lockstep, mean_context
from lib_fusion.fusion.rows import take
from lib_fusion.fusion.step import Step
from lib_fusion.webui.a1111.contexts import (
    change_prediction,
    crop_cond,
    keep_marker,
    locate,
    pad_alike,
    put_context,
    strip_marker,
    take_rows,
    tokens_of,
    vector_of,
)
from lib_fusion.webui.a1111.levels import alpha_of, has_timesteps, leaves_out_uncond, output_scale
from lib_fusion.webui.sampling.launch import weights_of

if TYPE_CHECKING:
    from lib_fusion.webui.a1111.hooked_pass import FusionPass


@dataclass(frozen=True)
class Call:
    """The arguments of one U-Net call of the host: input (R,C,H,W), timesteps (R,), conditioning, and all others."""

    x: torch.Tensor
    t: torch.Tensor
    cond: dict[str, Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    def take(self, rows: list[int]) -> Call:
        """The call for some of its rows only."""
        return replace(self, x=take(self.x, rows), t=take(self.t, rows), cond=take_rows(self.cond, rows))

    def crop(self, box: Box) -> Call:
        """The call for a box of its latents."""
        return replace(self, x=box.cut(self.x), cond=crop_cond(self.cond, box, self.x.shape[-2:]))

    def by(self, function: Any, cond: dict[str, Any] | None = None) -> torch.Tensor:
        """The result of a function with these arguments, or with another conditioning."""
        return function(self.x, self.t, self.cond if cond is None else cond, *self.args, **(self.kwargs or {}))


class HostStep:
    """A step between the host's ``on_cfg_denoiser`` and ``on_cfg_denoised``, whose parameters ``params`` are.

    Raises FusionError where another extension has changed the number of rows, and experts need to know them.
    """

    def __init__(self, fusion: FusionPass, params: Any) -> None:
        self.fusion, self.denoiser, self.sigma, self._x = fusion, params.denoiser, params.sigma, params.x
        extra = fusion.sampler.sampler_extra_args
        self.rows = fusion.rows_of(weights_of(extra["cond"]))
        self.step: Step | None = None
        self.is_over = False
        self._cursor = 0
        self._is_whole = self.rows.num_all == len(params.x)
        if fusion.experts and not self._is_whole:
            problem = "another extension has changed how many rows a step has"
            raise FusionError(f"Denoiser Fusion can't tell which prompt a row belongs to: {problem}")
        self._may_skip = fusion.session.skips is not None and self._is_whole

    def run(self, call: Call) -> torch.Tensor:
        """The first model's raw output (R,C,H,W) for the next rows of the step."""
        rows = range(self._cursor, self._cursor + len(call.x))
        if (self.fusion.experts or self._may_skip) and rows.stop > self.rows.num_all:
            expected = f"expected {self.rows.num_all} rows in a step"
            raise FusionError(f"Denoiser Fusion {expected}, the host has asked for {rows.stop}")
        self._cursor = rows.stop
        if self.step is None:
            self.step = self._begin(call.t)
        return self.step.run(rows, call.x, partial(self._predict, call, rows.start))

    def end(self, params: Any) -> None:
        """The host has all rows: writes the fused ones over them, in place."""
        self.is_over = True
        if self.step is None:
            return
        self.step.observe()
        fused = self.step.fuse()
        if fused is not None:
            self._write(params, fused)
        self._guide(params.x)

    def _write(self, params: Any, fused: torch.Tensor) -> None:
        x, rows = params.x, len(fused)
        scale = output_scale(params.inner_model, self.sigma, self.fusion.sd_model.alphas_cumprod)[:rows]
        x[:rows] = x[:rows] + ((fused.float() - self.step.output().float()) * scale).to(x.dtype)
        if rows != self.rows.num_all:  # the host has put copies of each picture's first row where the others would be
            for i, row in enumerate(self.rows.first_rows()):
                x[self.rows.num_cond + i] = x[row]

    def _guide(self, x: torch.Tensor) -> None:
        """Draws the conditional rows towards the unconditional ones, so that the host's guidance becomes the step's."""
        step, given = self.step, self.fusion.session.guidance_scale
        if step.scale == given or step.spares_uncond or self._cursor != self.rows.num_all:
            return
        uncond = take(x, [self.rows.num_cond + owner for owner in self.rows.owners[: self.rows.num_cond]])
        x[: self.rows.num_cond] = torch.lerp(uncond, x[: self.rows.num_cond], step.scale / given)

    def _begin(self, t: torch.Tensor) -> Step:
        sd_model, session = self.fusion.sd_model, self.fusion.session
        latents = list(take(self._x, self.rows.first_rows())) if self._may_skip else None
        if latents is not None and not self._leaves_out_uncond(0.0):
            session.skips.watch(latents)  # else whether the step may skip depends on its noise level
        value, timestep = session.readings.fetch(self.sigma[:1], t.flatten()[:1])  # the step's one wait for the device
        self.fusion.check_finite()
        if latents is not None and self._leaves_out_uncond(value):
            latents = None
        level = session.schedule.level(value, timestep, alpha_of(self.denoiser, value, self.fusion.alphas))
        whole = has_other_forward(sd_model.model.diffusion_model)
        scaled = not has_timesteps(self.denoiser)
        outputs = "v" if sd_model.parameterization == "v" else "noise"
        return Step(session, level, self.rows, latents, sigma_scaled=scaled, whole=whole, outputs=outputs)

    def _leaves_out_uncond(self, sigma: float) -> bool:
        return leaves_out_uncond(self.denoiser, sigma, self.fusion.sampler.sampler_extra_args["s_min_uncond"])

    def _predict(
        self, call: Call, start: int, models: Sequence[int], rows: Sequence[int], box: Box | None = None
    ) -> torch.Tensor:
        """Raw output of one model, or of all in lockstep, for some rows of the step, which are in ``call``."""
        if len(rows) < len(call.x):
            call = call.take([row - start for row in rows])
        if len(models) > 1:
            return self._run_together(call, models, rows)
        if box is not None:
            call = call.crop(box)
        if models[0] == BASE:
            return call.by(self.fusion.original, self._located(call.cond, BASE, box))
        return self._run_expert(call, models[0], rows, box)

    def _run_together(self, call: Call, models: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """AFA: one call of the base, in whose blocks the experts take part."""
        fusion = self.fusion
        conds = [self._unmarked(call.cond), *(self._cond_of(model, call.cond, rows) for model in models[1:])]
        empty = fusion.sd_model.cond_stage_model_empty_prompt
        empties = [empty, *(empty if context is None else context.conditioning.empty for context in fusion.contexts)]
        with together(fusion.session.lockstep, conds, empties):
            return call.by(fusion.original)

    def _run_expert(self, call: Call, model: int, rows: Sequence[int], box: Box | None) -> torch.Tensor:
        """An expert's raw output, as a model that predicts what the base predicts would have put it."""
        fusion, expert = self.fusion, self.fusion.experts[model - 1]
        cond = self._located(self._cond_of(model, call.cond, rows), model, box)
        if expert.unet is None:  # the host's own forward, with whatever ControlNet has put there
            with expert.wearing():
                # a marker can be there only under a forward of ControlNet's; looking for one waits for the device
                return call.by(fusion.original, keep_marker(cond, call.cond) if self._has_other_forward else cond)
        with borrowed_forward(fusion.sd_model.model.diffusion_model, expert.unet):
            raw = call.by(fusion.original, cond)
        if expert.model.prediction == fusion.model.prediction:
            return raw
        return change_prediction(raw, call.x, self.step.level.alpha, fusion.model.prediction)

    def _cond_of(self, model: int, cond: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """The host's conditioning of a call with an expert's own text states in it."""
        context = self.fusion.contexts[model - 1]
        if context is None:
            return self._unmarked(cond)
        denoiser = self.denoiser
        padded = denoiser.padded_cond_uncond or denoiser.padded_cond_uncond_v0
        return put_context(cond, context.slice(denoiser.step, rows, padded, shared.opts.pad_cond_uncond_v0))

    def _located(self, cond: dict[str, Any], model: int, box: Box | None) -> dict[str, Any]:
        """A model's conditioning of a call for a box of the picture."""
        if box is None:
            return cond
        fusion = self.fusion
        kind = (fusion.model if model == BASE else fusion.experts[model - 1].model).kind
        return locate(cond, kind, box, (shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left))

    def _unmarked(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The host's conditioning without a marker of ControlNet's, which is there only under a forward of its own."""
        return strip_marker(cond) if self._has_other_forward else cond

    @property
    def _has_other_forward(self) -> bool:
        return has_other_forward(self.fusion.sd_model.model.diffusion_model)


@contextmanager
def together(lockstep: Lockstep, conds: Sequence[dict[str, Any]], empties: Sequence[torch.Tensor]) -> Iterator[None]:
    """Around the base's call: all models take part. ``conds``: each model's conditioning of the call, base first.

    ``empties`` (1,T,D): each model's states of the empty prompt, which fill up shorter prompts for the mean.
    """
    states = [tokens_of(cond) for cond in conds]
    mean = mean_context(pad_alike(states, empties))
    with lockstep.running(states[1:], mean, [vector_of(cond) for cond in conds[1:]]):
        yield


def has_other_forward(unet: nn.Module) -> bool:
    """Whether another extension has put a forward on a U-Net. One that puts the old one back leaves an attribute."""
    forward = unet.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(unet).forward


@contextmanager
def borrowed_forward(unet: nn.Module, other: nn.Module) -> Iterator[None]:
    """The base's U-Net computes with another's weights for one call.

    So the host prepares inputs, casts and moves modules as ever, and a forward that another extension has put on the
    base's U-Net is out of the way and comes back.
    """
    previous = unet.__dict__.get("forward")
    unet.forward = other.__call__
    try:
        yield
    finally:
        if previous is None:
            del unet.forward
        else:
            unet.forward = previous
