"""One sampling pass in the host: attached around the sampler's launch, taken off when it ends however it ends.

The one seam is ``apply_model`` of the model instance, which every built-in sampler's denoiser calls. Wrapped, it runs
the models that the session names for this timestep on the same rows, and returns the first one's output; when the
host has all rows of a step, it shows them to ``on_cfg_denoised``, where the fused rows are written over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from modules import devices, sd_samplers_cfg_denoiser, sd_samplers_timesteps, shared
from modules.sd_hijack import model_hijack
from torch import nn

from lib_fusion.errors import FusionError
from lib_fusion.fusion.hooks import Hooks, attach_freeu
from lib_fusion.fusion.lockstep import Lockstep
from lib_fusion.fusion.records import Keep
from lib_fusion.fusion.session import AGGREGATOR, BASE, FusionSession
from lib_fusion.requests.settings import MAP_PARAMETERS, PREVIEWS, FusionSettings
from lib_fusion.unet.layout import read_layout
from lib_fusion.webui.models.aggregators import AggregatorCache, make_lockstep, together
from lib_fusion.webui.models.experts import Expert, model_of
from lib_fusion.webui.sampling.contexts import Context, Rows, change_prediction, put_context, strip_marker, weights_of
from lib_fusion.webui.sampling.correcting import (
    CORRECTED,
    Corrector,
    StepSkips,
    alpha_of,
    has_timesteps,
    leaves_out_uncond,
)

#: Settings of the previews: this and a name in PREVIEWS or a key of MAP_PARAMETERS.
PREVIEW_OPTION = "denoiser_fusion_preview_"
PLACES = ("GPU", "RAM between pictures", "RAM between U-Net calls")

#: Base model -> the experts of a pass beside it, and the context of each (None: it is told what the base is).
Equip = Callable[[nn.Module], "tuple[list[Expert], list[Context | None]]"]


class FusionPass:
    """State and hooks of one pass; made for one model with one checkpoint.

    When the host has changed either, a refiner has taken over: the pass follows it where it is told to, with the
    experts and their contexts that ``equip`` gives for that base, and is inert where it is not.
    """

    def __init__(self, settings: FusionSettings, equip: Equip, sampler: Any, sd_model: nn.Module,
                 aggregators: AggregatorCache | None = None, is_hires: bool = False) -> None:  # fmt: skip
        self.equip, self.sampler, self.aggregators = equip, sampler, aggregators
        self._take(sd_model)
        kinds = [self.model.kind, *(expert.model.kind for expert in self.experts)]
        self.session = FusionSession(settings, keep=wanted_records(), kinds=kinds)
        if settings.skip_passes == ("first" if is_hires else "hires"):
            self.session.skips = None
        self.guidance_scale = float(sampler.sampler_extra_args["cond_scale"])
        self.place = shared.opts.data.get("denoiser_fusion_place", PLACES[0])
        self.refined = False
        self.error: Exception | None = None
        self._begun = self._attached = False
        self._rows: Rows | None = None
        self._denoiser: Any = None
        self._sigma: torch.Tensor | None = None
        self._timestep = 0.0
        self._models: tuple[int, ...] = (BASE,)
        self._original: Callable[..., torch.Tensor] | None = None
        self._previous = self._wrapper = None
        self._hooks: list[Hooks] = []
        self.lockstep: Lockstep | None = None
        self._skipping: StepSkips | None = None

    def _take(self, sd_model: nn.Module) -> None:
        self.experts, self.contexts = self.equip(sd_model)
        self.sd_model, self.checkpoint, self.model = sd_model, sd_model.sd_checkpoint_info, model_of(sd_model)

    def attach(self) -> None:
        self._previous = self.sd_model.__dict__.get("apply_model")
        self._original = self.sd_model.apply_model
        self._wrapper = self.sd_model.apply_model = self.apply_model
        self._attached = True
        if self.session.settings.method == "AFA" and self.experts:
            self.lockstep = make_lockstep(self.aggregators, self.session.settings, self.sd_model, self.experts)
            self.session.watch_afa(self.lockstep)
            self._hooks.append(self.lockstep.attach())
        base = self.sd_model.model.diffusion_model
        unets = [base, *(expert.unet or base for expert in self.experts)]
        for freeu in dict.fromkeys(self.session.freeu):
            acted_on = [unet for unet, its in zip(unets, self.session.freeu) if its is freeu]
            self._hooks.append(attach_freeu([p for unet in acted_on for p in read_layout(unet).decoder], freeu))
        for expert in self.experts:
            if expert.unet is not None:
                set_tiling(expert.unet, model_hijack.circular_enabled)
                if self.place != PLACES[2]:
                    expert.unet.to(devices.device)

    def detach(self) -> None:
        """Takes everything off; the wrapper stays inert where someone else has wrapped it since."""
        self._rows = self._skipping = None
        self._attached = False
        while self._hooks:
            self._hooks.pop().remove()
        if self._wrapper is not None and self.sd_model.__dict__.get("apply_model") is self._wrapper:
            if self._previous is None:
                del self.sd_model.apply_model
            else:
                self.sd_model.apply_model = self._previous
        if self.place != PLACES[0] or getattr(self.sd_model, "lowvram", False):
            for expert in self.experts:
                if expert.unet is not None:
                    expert.unet.to(devices.cpu)

    def begin_step(self, params: Any) -> None:
        """The host is about to compute a step's rows (its ``on_cfg_denoiser``)."""
        self._rows = self._skipping = None
        if params.denoiser.sampler is not self.sampler:
            return
        self._begun = True
        if shared.sd_model is not self.sd_model or self.sd_model.sd_checkpoint_info != self.checkpoint:
            if not self.session.settings.refiner:
                self.refined = True
                return
            self.detach()
            self._take(shared.sd_model)
            self.attach()
            self.session.forget()
        self._denoiser, self._sigma = params.denoiser, params.sigma
        self._rows = Rows(weights_of(self.sampler.sampler_extra_args["cond"]))
        if self.experts and self._rows.num_all != params.x.shape[0]:
            self._rows = None
            told = "another extension has changed how many rows a step has"
            raise FusionError(f"Denoiser Fusion can't tell which prompt a row belongs to: {told}")
        if self.session.skips is not None and self._rows.num_all == params.x.shape[0]:
            s_min_uncond = self.sampler.sampler_extra_args["s_min_uncond"]
            if not leaves_out_uncond(params.denoiser, params.sigma, s_min_uncond):
                self._skipping = StepSkips(self.session, self._rows, params.denoiser, params.x, params.sigma,
                                           self.sd_model.alphas_cumprod, self.guidance_scale)  # fmt: skip

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The first model's raw output for the rows of this call; the others' are kept for the end of the step."""
        if not self._attached:
            return self._original(x, t, cond, *args, **kwargs)
        if self.error is not None:
            raise self.error
        rows = self._rows
        if not self._begun:
            raise FusionError("Denoiser Fusion could not act: the host, or another extension, tells of no steps")
        if rows is None or not isinstance(cond, dict):
            return self._original(x, t, cond, *args, **kwargs)
        start, stop = rows.cursor, rows.cursor + x.shape[0]
        if self.experts and stop > rows.num_all:
            raise FusionError(f"Denoiser Fusion expected {rows.num_all} rows in a step, the host has asked for {stop}")
        rows.cursor = stop
        self._timestep = float(t.flatten()[0])  # this waits for all that was computed before
        self.check()
        self._models = self.session.models_at(self._timestep)
        joint = self.session.in_lockstep(self._timestep)
        chosen, before = range(start, stop), self.session.rows[BASE]
        outputs = {}
        for i in self._models[:1] if joint else self._models:

            def call(x: torch.Tensor, t: torch.Tensor, cond: Any, chosen: Sequence[int], i: int = i) -> torch.Tensor:
                with self.session.using_freeu(i, float(self._sigma[0])):
                    if joint:
                        output = self._run_together(x, t, cond, chosen, *args, **kwargs)
                        everyone = (*self._models, AGGREGATOR)
                        for totals in self.lockstep.totals:
                            self.session.watch(everyone, totals)
                        return output
                    if i == BASE:
                        output = self._original(x, t, cond, *args, **kwargs)
                    else:
                        output = self._run_expert(i, x, t, cond, chosen, *args, **kwargs)
                    self.session.watch((i,), output.sum(dtype=torch.float32)[None])
                    return output

            if self._skipping is not None:
                self.session.skips.join(joint)
                all_or_none = has_other_forward(self.sd_model.model.diffusion_model)
                is_v = self.sd_model.parameterization == "v"
                outputs[i] = self._skipping.run(i, x, t, cond, chosen, all_or_none, is_v, call)
            else:
                outputs[i] = call(x, t, cond, chosen)
                self.session.count(i, x.shape[0])
        if joint:  # the experts were run for the same rows, and nothing is left to blend at the end of the step
            computed = self.session.rows[BASE] - before
            for i in self._models[1:]:
                self.session.count(i, computed, x.shape[0] - computed)
            self._models = (BASE,)
        if len(outputs) > 1:
            for i, output in outputs.items():
                rows.raw.setdefault(i, []).append(output)
        return outputs[self._models[0]]

    def check(self) -> None:
        """Ends the pass where a model has predicted what is no number, before it goes into a picture."""
        self.session.check(f"the base ({self.sd_model.sd_checkpoint_info.name_for_extra})")

    def end_step(self, params: Any) -> None:
        """The host has all rows of a step (its ``on_cfg_denoised``): writes the fused ones over them, in place."""
        rows, self._rows = self._rows, None
        if self._skipping is not None:
            self._skipping.end()
        elif self.session.skips is not None and rows is not None and rows.cursor:
            self.session.skips.pass_over(self.session.models_at(self._timestep), len(rows.weights))
        if rows is None or len(self._models) < 2 or rows.cursor == 0:
            return
        raw = {i: torch.cat(parts) for i, parts in rows.raw.items()}
        fused = self._fuse(rows, raw)
        if fused is None:
            return
        has_uncond = rows.cursor == rows.num_all
        x = params.x
        change = (fused.float() - raw[self._models[0]].float()) * self._scale(params.inner_model)[: rows.cursor]
        x[: rows.cursor] += change.to(x.dtype)
        if not has_uncond:  # the host has put copies of each image's first row where the others would be
            for i, row in enumerate(rows.first_rows()):
                x[rows.num_cond + i] = x[row]

    def begin_skipping(self, function: Any, arguments: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
        """The callback for the host's sampling function, which also corrects its latent where that is exact."""
        callback, name = arguments["callback"], getattr(function, "__name__", "")
        noisy = arguments.get("s_churn", 0) or (name == "ddim" and arguments.get("eta", 0))
        denoiser = self.sampler.model_wrap_cfg
        if name not in CORRECTED or noisy or denoiser.mask is not None or not combines_as_ever(denoiser):
            self.session.skips.reach = 0
            return callback
        corrector = Corrector(name, self.session, self.sd_model.alphas_cumprod)

        def after_model(given: dict[str, Any]) -> None:
            models, winner = self._models, self.session.last_winner
            corrector.after_model(given, self._skipping, lambda i, picture: share_of(i, picture, models, winner))
            callback(given)

        return after_model

    def _fuse(self, rows: Rows, raw: dict[int, torch.Tensor]) -> torch.Tensor | None:
        owner = rows.owners(next(iter(raw.values())).device)[: rows.cursor]
        cond = uncond = None
        if rows.cursor == rows.num_all:
            cond, uncond = {}, {}
            for i, value in raw.items():
                cond[i], uncond[i] = rows.combine(value.float() * self._noise_scale(rows))
        return self.session.fuse_rows(self._timestep, raw, owner, cond, uncond, self.guidance_scale)

    def _run_together(self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], chosen: Sequence[int],
                      *args: Any, **kwargs: Any) -> torch.Tensor:  # fmt: skip
        """AFA: one call of the base for the rows ``chosen`` of the step's, in whose blocks the experts take part."""
        conds = [strip_marker(cond), *(self._told(i, cond, chosen) for i in self._models[1:])]
        own_empty = self.sd_model.cond_stage_model_empty_prompt
        empties = [own_empty, *(own_empty if context is None else context.told.empty for context in self.contexts)]
        if self.session.afa_watch is not None:
            owners = self._rows.owners(torch.device("cpu")).tolist()
            self.session.begin_call(self._timestep, [owners[row] for row in chosen])
        with (
            moved([e.unet for e in self.experts] if self.place == PLACES[2] else []),
            together(self.lockstep, conds, empties),
        ):
            return self._original(x, t, cond, *args, **kwargs)

    def _told(self, model: int, cond: dict[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
        """The host's conditioning of some of a step's rows as an expert is told it."""
        context = self.contexts[model - 1]
        if context is None:
            return strip_marker(cond)
        denoiser = self._denoiser
        padded = denoiser.padded_cond_uncond or denoiser.padded_cond_uncond_v0
        v0 = shared.opts.pad_cond_uncond_v0
        return put_context(cond, context.slice(denoiser.step, chosen, padded, v0))

    def _run_expert(self, model: int, x: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], chosen: Sequence[int],
                    *args: Any, **kwargs: Any) -> torch.Tensor:  # fmt: skip
        """An expert's raw output for the rows ``chosen`` of the step's."""
        expert, told = self.experts[model - 1], self._told(model, cond, chosen)
        if expert.unet is None:
            return self._original(x, t, told, *args, **kwargs)
        with (
            moved([expert.unet] if self.place == PLACES[2] else []),
            borrowed_forward(self.sd_model.model.diffusion_model, expert.unet),
        ):
            raw = self._original(x, t, told, *args, **kwargs)
        if expert.model.prediction == self.model.prediction:
            return raw
        alpha = alpha_of(self._denoiser, float(self._sigma[0]), self.sd_model.alphas_cumprod)
        return change_prediction(raw, x, alpha, self.model.prediction)

    def _scale(self, inner_model: Any) -> torch.Tensor:
        """What one unit of raw output is in the host's rows (R,1,1,1): its denoisers are linear in the output."""
        sigma = self._sigma
        if hasattr(inner_model, "get_scalings"):
            scale = inner_model.get_scalings(sigma)[-2]
        elif isinstance(inner_model, sd_samplers_timesteps.CompVisTimestepsVDenoiser):
            scale = self.sd_model.alphas_cumprod[sigma.to(torch.int)].sqrt()
        else:
            scale = torch.ones_like(sigma, dtype=torch.float32)
        return scale[:, None, None, None]

    def _noise_scale(self, rows: Rows) -> torch.Tensor | float:
        """What one unit of raw output is in noise: 1, or for v the square root of alpha. Saliency needs noise."""
        if self.sd_model.parameterization != "v":
            return 1.0
        sigma = self._sigma[: rows.cursor]
        if has_timesteps(self._denoiser):
            scale = self.sd_model.alphas_cumprod[sigma.to(torch.int)].sqrt()
        else:
            scale = (sigma**2 + 1).rsqrt()
        return scale[:, None, None, None]


def combines_as_ever(denoiser: Any) -> bool:
    """Whether the halves are added up by the host's own rule, and not by another extension's (Dynamic Thresholding)."""
    return denoiser.combine_denoised.__module__ == sd_samplers_cfg_denoiser.__name__


def wanted_records() -> Keep:
    """What the settings want to be shown of a pass; raises SettingError."""
    values = shared.opts.data
    kinds = [kind for kind in PREVIEWS if values.get(PREVIEW_OPTION + kind, False)]
    rows = MAP_PARAMETERS if "maps" in kinds else ()
    return Keep.read(kinds, {row.key: values.get(PREVIEW_OPTION + row.key, row.default) for row in rows})


def share_of(model: int, picture: int, models: tuple[int, ...], winner: torch.Tensor | None) -> torch.Tensor | float:
    """How much (or where, (1,H,W)) a model's noise is that of a step of these models."""
    if len(models) < 2 or winner is None:
        return 1 / len(models)
    return (winner[picture] == model).float()


def set_tiling(unet: nn.Module, tiling: bool) -> None:
    """Lets convolutions wrap around at the edges, as the host does with its own model's."""
    for layer in unet.modules():
        if type(layer) is nn.Conv2d:
            layer.padding_mode = "circular" if tiling else "zeros"


@contextmanager
def moved(unets: Iterable[nn.Module | None]) -> Iterator[None]:
    """U-Nets that wait in RAM are on the device within; None is the base's, which the host moves."""
    own = [unet for unet in unets if unet is not None]
    for unet in own:
        unet.to(devices.device)
    try:
        yield
    finally:
        for unet in own:
            unet.to(devices.cpu)


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
