"""One sampling pass in the host: attached around the sampler's launch, taken off when it ends however it ends.

The one seam is ``apply_model`` of the model instance, which every built-in sampler's denoiser calls. Wrapped, it hands
each call to the step that is being made, which runs the models that this step needs and returns the first one's output;
when the host has all rows of a step, the fused rows are written over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from modules import devices, sd_samplers_cfg_denoiser, shared
from modules.sd_hijack import model_hijack
from torch import nn

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.fusion.hooks import Hooks, attach_freeu
from lib_fusion.fusion.places import Places
from lib_fusion.fusion.rows import Rows
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import PLACES, FusionSettings
from lib_fusion.unet.layout import read_layout
from lib_fusion.webui.a1111.contexts import Context
from lib_fusion.webui.a1111.decoding import RoomForVae
from lib_fusion.webui.a1111.experts import Expert, kind_of_model
from lib_fusion.webui.a1111.host_step import Call, HostStep, has_other_forward
from lib_fusion.webui.a1111.joining import make_lockstep
from lib_fusion.webui.a1111.levels import alpha_of, limits_of, sigmas_of
from lib_fusion.webui.a1111.placement import bring, chosen_place, put_back, settle, stream, waits_in_ram
from lib_fusion.webui.models.aggregators import AggregatorCache
from lib_fusion.webui.sampling.correcting import correcting_callback
from lib_fusion.webui.sampling.launch import NO_CONTROL, NO_TILING, wanted_records
from lib_fusion.webui.sampling.levels import levels_of

#: Base model -> the experts of a pass with it, and the context of each (None: it gets the base's conditioning).
Equip = Callable[[nn.Module], "tuple[list[Expert], list[Context | None]]"]


class FusionPass:
    """State and hooks of one pass; made for one model with one checkpoint.

    When the host has changed either, a refiner has taken over: the pass follows it where the settings say so, with the
    experts and their contexts that ``equip`` gives for that base, and is inert where they do not.
    """

    def __init__(self, settings: FusionSettings, equip: Equip, sampler: Any, sd_model: nn.Module,
                 aggregators: AggregatorCache | None = None, is_hires: bool = False,
                 places: Places | None = None) -> None:  # fmt: skip
        self.equip, self.sampler, self.aggregators = equip, sampler, aggregators
        self._take(sd_model)
        kinds = [self.model.kind, *(expert.model.kind for expert in self.experts)]
        guidance_scale = float(sampler.sampler_extra_args["cond_scale"])
        self.session = FusionSession(settings, places or Places(), wanted_records(settings), kinds, guidance_scale)
        if settings.skip_passes == ("first" if is_hires else "hires"):
            self.session.skips = None
        self._is_hires = is_hires
        self.refined = False
        self.original: Callable[..., torch.Tensor] = sd_model.apply_model
        self._failure: Exception | None = None
        self._begun = self._attached = False
        self._step: HostStep | None = None
        self._rows = Rows([])
        self._previous = self._wrapper = None
        self._hooks: list[Hooks] = []

    def _take(self, sd_model: nn.Module) -> None:
        self.experts, self.contexts = self.equip(sd_model)
        self.sd_model, self.checkpoint, self.model = sd_model, sd_model.sd_checkpoint_info, kind_of_model(sd_model)

    def rows_of(self, weights: list[list[float]]) -> Rows:
        """The table of a step whose prompts have AND parts of these weights; the same one while they are the same."""
        if self._rows.weights != weights:
            self._rows = Rows(weights)
        return self._rows

    def attach(self) -> None:
        """Wraps the model and puts all hooks on; raises SettingError where they do not fit."""
        if self.session.settings.crops:
            check_crops(self.sd_model.model.diffusion_model, self._is_hires)
        self._previous = self.sd_model.__dict__.get("apply_model")
        self.original = self.sd_model.apply_model
        self._wrapper = self.sd_model.apply_model = self.apply_model
        self._attached = True
        predictions = [self.model.prediction, *(expert.model.prediction for expert in self.experts)]
        alphas = self.sd_model.alphas_cumprod
        self.alphas: list[float] = alphas.tolist()
        trained = getattr(self.sd_model, "alphas_cumprod_original", alphas)
        self.session.blend.limits = limits_of(predictions, alphas, trained)
        if self.session.settings.method == "AFA" and self.experts:
            lockstep = make_lockstep(self.aggregators, self.session.settings, self.sd_model, self.experts)
            self.session.join(lockstep)
            self._hooks.append(lockstep.attach())
        base = self.sd_model.model.diffusion_model
        unets = [base, *(expert.unet or base for expert in self.experts)]
        for freeu in dict.fromkeys(self.session.freeu):
            acted_on = [unet for unet, its in zip(unets, self.session.freeu) if its is freeu]
            self._hooks.append(attach_freeu([p for unet in acted_on for p in read_layout(unet).decoder], freeu))
        for unet in self._own_unets():
            set_tiling(unet, model_hijack.circular_enabled)
            if chosen_place() == PLACES[2]:
                self._hooks.append(stream(unet))
            elif waits_in_ram(self.sd_model):
                bring(unet)
            else:
                settle(unet, devices.device)

    def detach(self) -> None:
        """Takes everything off; the wrapper stays inert where someone else has wrapped it since."""
        self._step = None
        self._attached = False
        while self._hooks:
            self._hooks.pop().remove()
        if self._wrapper is not None and self.sd_model.__dict__.get("apply_model") is self._wrapper:
            if self._previous is None:
                del self.sd_model.apply_model
            else:
                self.sd_model.apply_model = self._previous
        self._wrapper = self._previous = None  # a pass that refers to itself would keep its experts
        if waits_in_ram(self.sd_model):
            for unet in self._own_unets():
                put_back(unet)
            for expert in self.experts:
                if expert.worn is not None:
                    expert.worn.to(devices.cpu)
            if self.aggregators is not None:
                self.aggregators.settle(devices.cpu)

    def _own_unets(self) -> list[nn.Module]:
        """The experts' U-Nets, each once, without the base's."""
        return list(dict.fromkeys(expert.unet for expert in self.experts if expert.unet is not None))

    def fail(self, error: Exception) -> None:
        """Ends the pass with an error of a place where the host would swallow it: the next model call raises it."""
        self._failure = error

    def finish(self) -> None:
        """After the last step: raises the error that was not raised yet, and checks that all has acted."""
        if self._failure is not None:
            raise self._failure
        stopped = shared.state.interrupted or shared.state.skipped
        if self.session.schedule.steps > 0 and not (any(self.session.calls) or self.refined or stopped):
            raise FusionError("Denoiser Fusion could not act: this WebUI, or an extension, runs its model elsewhere")
        self.check_finite()
        self.session.check_acted()

    def check_finite(self) -> None:
        """Ends the pass where a model has predicted NaN or infinite values, before they go into a picture."""
        self.session.check_finite(f"the base ({self.sd_model.sd_checkpoint_info.name_for_extra})")

    def begin_step(self, params: Any) -> None:
        """The host is about to compute a step's rows (its ``on_cfg_denoiser``)."""
        self._step = None
        if params.denoiser.sampler is not self.sampler:
            return
        self._begun = True
        if shared.sd_model is not self.sd_model or self.sd_model.sd_checkpoint_info != self.checkpoint:
            if not self.session.settings.refiner:
                self.refined = True
                return
            self.check_finite()
            self.detach()
            self._take(shared.sd_model)
            self.attach()
            self.session.forget()
        self._step = HostStep(self, params)

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The first model's raw output for the rows of this call; the others' are kept for the end of the step."""
        if not self._attached:
            return self.original(x, t, cond, *args, **kwargs)
        if self._failure is not None:
            raise self._failure
        if not self._begun:
            raise FusionError("Denoiser Fusion could not act: the host, or another extension, announces no steps")
        if self._step is None or self._step.is_over or not isinstance(cond, dict):
            return self.original(x, t, cond, *args, **kwargs)
        return self._step.run(Call(x, t, cond, args, kwargs))

    def end_step(self, params: Any) -> None:
        """The host has all rows of a step (its ``on_cfg_denoised``)."""
        if self._step is not None:
            self._step.end(params)

    def begin_skipping(self, function: Any, arguments: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
        """The callback for the host's sampling function, which also corrects its latents where that is exact."""
        denoiser, levels = self.sampler.model_wrap_cfg, self.session.schedule.levels
        self.session.schedule = replace(self.session.schedule, sigmas=sigmas_of(levels, denoiser, self.alphas))
        is_plain = denoiser.mask is None and combines_as_ever(denoiser)
        alphas = [alpha_of(denoiser, level, self.alphas) for level in levels]
        return correcting_callback(
            self.session, function, arguments, alphas, is_plain, lambda: self._step and self._step.step
        )

    def levels_of(self, arguments: Mapping[str, Any]) -> list[float]:
        """The pass's noise levels in the sampler's own units."""
        return levels_of(arguments, self.sampler.model_wrap_cfg.steps)

    def room_for_vae(self, free: Callable[[], None], tell: Callable[[str], None]) -> RoomForVae | None:
        """Lets the VAE have the memory of experts that stay on the device."""
        stays = self.experts and not waits_in_ram(self.sd_model)
        return RoomForVae(self.sd_model, free, tell) if stays else None


def combines_as_ever(denoiser: Any) -> bool:
    """Whether the halves are added up by the host's own rule, and not by another extension's (Dynamic Thresholding)."""
    return denoiser.combine_denoised.__module__ == sd_samplers_cfg_denoiser.__name__


def check_crops(unet: nn.Module, is_hires: bool) -> None:
    """Refuses crops where something counts on whole pictures; raises SettingError."""
    hypertile = [name for name in ("hypertile_enable_unet", "hypertile_enable_unet_secondpass")[: 1 + is_hires]
                 if getattr(shared.opts, name, False)]  # fmt: skip
    if model_hijack.circular_enabled:
        problem = NO_TILING
    elif hypertile:
        problem = "allowed without Hypertile, whose tiles are those of the whole picture; switch it off in the settings"
    elif has_other_forward(unet):
        problem = NO_CONTROL
    else:
        return
    raise SettingError("place_crop", True, problem)


def set_tiling(unet: nn.Module, tiling: bool) -> None:
    """Lets convolutions wrap around at the edges, as the host does with its own model's."""
    for layer in unet.modules():
        if type(layer) is nn.Conv2d:
            layer.padding_mode = "circular" if tiling else "zeros"
