"""One sampling pass in Forge's backend: on the patcher of the U-Net that the host makes for each pass and throws away.

Nothing of the host is replaced. What the pass sets are options of that patcher; hooks of FreeU and AFA are on the
blocks of U-Nets, and come off at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from modules import shared

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.fusion.hooks import Hooks, attach_freeu
from lib_fusion.fusion.level import Schedule
from lib_fusion.fusion.lockstep import Lockstep
from lib_fusion.fusion.places import Places
from lib_fusion.fusion.rows import Rows
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import FusionSettings
from lib_fusion.unet.layout import read_layout
from lib_fusion.webui.forge.conditions import Parts
from lib_fusion.webui.forge.engines import Expert, guidance_of, kind_of
from lib_fusion.webui.forge.host_step import HostStep
from lib_fusion.webui.forge.texts import Conditioning
from lib_fusion.webui.sampling.correcting import correcting_callback
from lib_fusion.webui.sampling.launch import NO_TILING, wanted_records
from lib_fusion.webui.sampling.levels import levels_of

#: The host's names for functions that it calls before a step, one after the other, and just before its model.
MODIFIERS, PRE_CFG = "conditioning_modifiers", "sampler_pre_cfg_function"
#: Those by which others change how the halves are added up, or the result.
OTHERS = ("sampler_cfg_function", "sampler_post_cfg_function")


class FusionPass:
    """State and hooks of one pass with one base."""

    refined = False

    def __init__(
        self, settings: FusionSettings, p: Any, experts: Sequence[Expert],
        conditionings: Sequence[Conditioning | None], places: Places, aggregators: torch.nn.Module | None,
    ) -> None:  # fmt: skip
        self.experts, self.conditionings, self.aggregators = list(experts), list(conditionings), aggregators
        self.sd_model, self.sampler = p.sd_model, p.sampler
        self.denoiser = p.sampler.model_wrap_cfg
        base = p.sd_model.forge_objects.unet.model
        self.models = [base, *(expert.patcher.model for expert in experts)]
        self.kinds = [kind_of(p.sd_model).kind, *(expert.model.kind for expert in experts)]
        self.session = FusionSession(settings, places, wanted_records(settings), self.kinds, guidance_of(p))
        if settings.skip_passes == ("first" if getattr(p, "is_hr_pass", False) else "hires"):
            self.session.skips = None
        self.session.blend.limits = self._limits()
        self._rows = Rows([])
        self._step: HostStep | None = None
        self._failure: Exception | None = None
        self._announced = False
        self._hooks: list[Hooks] = []
        self._undo: list[Callable[[], None]] = []

    def take_place(self, patchers: Sequence[Any]) -> None:
        """Before the host loads its models for the pass: a clone of its patcher, which also brings these to memory."""
        unet = self.sd_model.forge_objects.unet.clone()
        for patcher in patchers:
            unet.add_extra_model_patcher_during_sampling(patcher)
        self.sd_model.forge_objects.unet = unet

    def attach(self) -> None:
        """Puts all on; raises SettingError where it does not fit. All scripts have set their options by now."""
        unet = self.sd_model.forge_objects.unet
        own = [expert.patcher for expert in self.experts if not expert.is_base]
        if any(all(patcher is not one for one in unet.extra_model_patchers_during_sampling) for patcher in own):
            raise FusionError("another extension has replaced the U-Net after Denoiser Fusion; switch it or this off")
        if self.session.settings.crops and getattr(self.sd_model, "tiling_enabled", False):
            raise SettingError("place_crop", True, NO_TILING)
        kept = unet.model_options
        unet.model_options = {**kept, MODIFIERS: [*kept.get(MODIFIERS, []), self.announce],
                              PRE_CFG: [*kept.get(PRE_CFG, []), self.begin_step]}  # fmt: skip
        self._undo += [lambda: setattr(unet, "model_options", kept), lambda: self._remove_extras(unet, own)]
        unets = [model.diffusion_model for model in self.models]
        if self.aggregators is not None:
            lockstep = Lockstep(unets[0], unets[1:], self.aggregators)
            self.session.join(lockstep)
            self._hooks.append(lockstep.attach())
        for freeu in dict.fromkeys(self.session.freeu):
            acted_on = [unet for unet, its in zip(unets, self.session.freeu) if its is freeu]
            self._hooks.append(attach_freeu([p for unet in acted_on for p in read_layout(unet).decoder], freeu))

    def detach(self) -> None:
        """Takes everything off, so that a patcher that outlives the pass keeps nothing of it."""
        self._step = None
        while self._hooks:
            self._hooks.pop().remove()
        while self._undo:
            self._undo.pop()()

    def fail(self, error: Exception) -> None:
        """Ends the pass with an error at its next step."""
        self._failure = error

    def finish(self) -> None:
        """After the last step: raises the error that was not raised yet, and checks that all has acted."""
        if self._failure is not None:
            raise self._failure
        self._check_over()
        stopped = shared.state.interrupted or shared.state.skipped
        if self.session.schedule.steps > 0 and not (any(self.session.calls) or stopped):
            raise FusionError("Denoiser Fusion could not act: this WebUI, or an extension, runs its model elsewhere")
        self.check_finite()
        self.session.check_acted()

    def check_finite(self) -> None:
        """Ends the pass where a model has predicted NaN or infinite values, before they go into a picture."""
        self.session.check_finite(f"the base ({self.sd_model.sd_checkpoint_info.name_for_extra})")

    def announce(self, *given: Any) -> tuple:
        """The host begins a step, and all that others do before it is done, such as ControlNet's reading of a
        reference by calls of the model that are no step."""
        self._announced = True
        return given

    def begin_step(self, model: Any, cond: Any, uncond: Any, x: Any, timestep: Any, model_options: dict) -> tuple:
        """The host is about to call its model for a step, with all that it and others have decided for it."""
        if self._failure is not None:
            raise self._failure
        if model is not self.models[0]:
            raise FusionError("Denoiser Fusion could not act: the WebUI has changed its model in the middle of a pass")
        if not self._announced:
            return model, cond, uncond, x, timestep, model_options
        self._announced = False
        self._check_over()
        step = self._step = HostStep(self, Parts(cond, uncond), x, timestep, model_options)
        step.run()
        parts = step.parts_for_host()
        return model, parts.cond, parts.uncond, x, timestep, {**model_options, "model_function_wrapper": step.answer}

    def rows_of(self, weights: list[list[float]]) -> Rows:
        """The table of a step whose prompts have AND parts of these weights; the same one while they are the same."""
        if self._rows.weights != weights:
            self._rows = Rows(weights)
        return self._rows

    def timestep_of(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.models[0].predictor.timestep(sigma).float()

    @property
    def is_sigma_scaled(self) -> bool:
        """Whether the sampler's own latents are picture + sigma * noise; those of DDIM and its kin are not."""
        return not self.denoiser.classic_ddim_eps_estimation

    def levels_of(self, arguments: Mapping[str, Any]) -> list[float]:
        """The pass's noise levels as sigmas, which the host makes of timesteps, too."""
        levels = levels_of(arguments, self.denoiser.steps)
        if self.is_sigma_scaled:
            return levels
        sigmas = ((1 - self._alphas()) / self._alphas()) ** 0.5
        return [float(sigmas[round(level)]) for level in levels]

    def begin_skipping(self, function: Any, arguments: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
        """The callback for the host's sampling function, which also corrects its latents where that is exact."""
        schedule = self.session.schedule
        self.session.schedule = Schedule(schedule.levels, schedule.levels)
        options = self.sd_model.forge_objects.unet.model_options
        is_plain = self.denoiser.mask is None and not any(options.get(name) for name in OTHERS)
        alphas = [1 / (1 + sigma**2) for sigma in schedule.levels]
        return correcting_callback(
            self.session, function, arguments, alphas, is_plain, lambda: self._step and self._step.step
        )

    def room_for_vae(self, free: Callable[[], None], tell: Callable[[str], None]) -> None:
        """The host's memory manager makes room for its VAE by itself."""
        return

    def _limits(self) -> dict[int, float]:
        """For each model the base's timestep above which it was not trained: with zero terminal SNR the base's sigmas
        go further than those of an expert that predicts the noise."""
        base, limits = self.models[0].predictor, {}
        for number, model in enumerate(self.models):
            if float(model.predictor.sigma_max) < float(base.sigma_max) * (1 - 1e-3):
                limits[number] = float(base.timestep(torch.as_tensor(model.predictor.sigma_max).view(1)))
        return limits

    def _alphas(self) -> torch.Tensor:
        return self.sd_model.alphas_cumprod

    def _check_over(self) -> None:
        if self._step is not None and not self._step.is_over:
            problem = "another extension has computed a step by itself"
            raise FusionError(f"Denoiser Fusion could not act: {problem}; switch that or Denoiser Fusion off")

    @staticmethod
    def _remove_extras(unet: Any, own: Sequence[Any]) -> None:
        kept = unet.extra_model_patchers_during_sampling
        kept[:] = [patcher for patcher in kept if all(patcher is not one for one in own)]


def check_guidance(session: FusionSession, p: Any) -> None:
    """Refuses what needs predictions without the prompt where the host makes none; raises SettingError."""
    if not session.blend.needs_uncond:
        return
    is_hires = getattr(p, "is_hr_pass", False)
    scales = {"hr_cfg" if is_hires else "cfg_scale": session.guidance_scale}
    if getattr(p, "enable_hr", False) and session.settings.passes != "first":  # before the first pass is made
        scales["hr_cfg"] = float(p.hr_cfg)
    for field, scale in scales.items():
        if scale == 1:
            problem = "allowed with SNB in this WebUI, where nothing is predicted without the prompt at 1: 1.1, say"
            raise SettingError(field, scale, problem)
