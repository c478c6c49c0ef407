"""One denoising step in Forge's backend: all models run on its rows, and the host is answered from the fused table.

The host calls us where a step begins (``sampler_pre_cfg_function``). Its own function for calling a model runs each
model that the step needs, so batching by free memory, ControlNet and wrappers of other extensions are as ever. Then the
host calls its model, and a wrapper gives it the fused rows instead: all that comes after (guidance, Dynamic
Thresholding, functions after it) finds them where it finds the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from backend.sampling.sampling_function import calc_cond_uncond_batch
from modules import shared

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.fusion.blend import BASE
from lib_fusion.fusion.crops import Box
from lib_fusion.fusion.lockstep import mean_context
from lib_fusion.fusion.rows import put, take
from lib_fusion.fusion.step import Step
from lib_fusion.webui.forge.conditions import PART, Parts, Texts, alike
from lib_fusion.webui.sampling.launch import NO_CONTROL

if TYPE_CHECKING:
    from lib_fusion.webui.forge.fusion_pass import FusionPass

#: The host's name for a function around each call of its model, in the options of a model.
WRAPPER = "model_function_wrapper"


class HostStep:
    """A step from the host's announcement to its last question for a row.

    ``base``: the base's conditions in this step; ``x`` (B,C,H,W) is picture + sigma * noise, ``sigma`` (B,).
    """

    def __init__(self, fusion: FusionPass, base: Parts, x: torch.Tensor, sigma: torch.Tensor, options: dict) -> None:
        self.fusion, self.base, self.x, self.sigma, self.options = fusion, base, x, sigma, options
        self.rows = fusion.rows_of([base.weights] * len(x))
        self._conds = {BASE: base.marked()}
        self.step = self._begin()
        self._denoised: torch.Tensor | None = None
        self._open: set[int] = set()

    @property
    def is_over(self) -> bool:
        """Whether the host has asked for all rows."""
        return self._denoised is not None and not self._open

    def run(self) -> None:
        """Computes the step's rows (R,C,H,W): denoised latents, fused, in the order of ``Rows``."""
        step, rows = self.step, self.rows
        asked = range(rows.num_all if self.base.uncond is not None or step.spares_uncond else rows.num_cond)
        x = take(self.x, [rows.owners[row] for row in asked])
        step.run(asked, x, self._predict)
        step.observe()
        fused = step.fuse()
        denoised = step.output() if fused is None else fused
        given = self.fusion.session.guidance_scale
        if step.scale != given and not step.spares_uncond and self.base.uncond is not None:
            denoised = self._guided(denoised, step.scale / given)
        self._denoised = denoised
        self._open = {number for number, _ in enumerate(self.base)}

    def answer(self, apply: Callable[..., torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
        """In the place of the host's call of its model: the fused rows of the parts that it asks for, each once.

        Later calls are those of other extensions (SAG, PAG), on other latents or with other options: the base's.
        """
        parts = given["c"].get(PART)
        if self._denoised is None or parts is None or not self._open.issuperset(parts):
            return self._call_base(apply, given)
        self._open -= set(parts)
        return torch.cat([take(self._denoised, self._rows_of(part)) for part in parts])

    def parts_for_host(self) -> Parts:
        """The base's conditions as the host gets them back: marked, and without ControlNet, which has acted already."""
        return self._conds[BASE].without_control()

    def _begin(self) -> Step:
        fusion, session = self.fusion, self.fusion.session
        has_uncond = self.base.uncond is not None
        latents = None
        if session.skips is not None and (has_uncond or session.guidance_scale == 1):
            latents = list(self.x)
        timestep = fusion.timestep_of(self.sigma[:1])
        value, timestep = session.readings.fetch(self.sigma[:1], timestep)  # the step's one wait for the device
        fusion.check_finite()
        level = session.schedule.level(value, timestep, 1 / (1 + value**2))
        if latents is not None and not fusion.is_sigma_scaled:
            latents = [latent * level.signal for latent in latents]
        return Step(session, level, self.rows, latents, sigma_scaled=fusion.is_sigma_scaled, whole=self._is_whole(),
                    outputs="denoised", has_uncond=has_uncond)  # fmt: skip

    def _is_whole(self) -> bool:
        """Whether something of other extensions may rely on a call having all pictures."""
        options = self.options.get("transformer_options", {}).values()
        patched = any(value for value in options if not torch.is_tensor(value))  # Forge Neo's noise levels are one
        return patched or WRAPPER in self.options or any("control" in item for item in self.base)

    def _predict(self, models: Sequence[int], rows: Sequence[int], box: Box | None = None) -> torch.Tensor:
        """Denoised latents (R,C,H,W) of one model, or of all in lockstep, for some rows, or of a box of them."""
        pictures = sorted({self.rows.owners[row] for row in rows})
        has_uncond = rows[-1] >= self.rows.num_cond
        parts = self._conds_of(models).take(pictures, len(self.x), has_uncond)
        shape = (self.x if box is None else box.cut(self.x)).shape[1:]
        result = torch.empty((self.rows.num_all, *shape), dtype=self.x.dtype, device=self.x.device)
        if box is not None:
            parts = self._within(parts, models[0], box)

        def call(apply: Callable[..., torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
            inner = {**given, "c": dict(given["c"])}
            numbers = inner["c"].pop(PART)
            with self._together(inner["c"]) if len(models) > 1 else nullcontext():
                output = self._call_base(apply, inner)
            for number, own in zip(numbers, output.chunk(len(numbers))):
                chosen = self._rows_of(number)
                put(result, [chosen[picture] for picture in pictures], own.to(result.dtype))
            return output

        model = self.fusion.models[models[0]]
        calc_cond_uncond_batch(model, parts.cond, parts.uncond, take(self.x, pictures), take(self.sigma, pictures),
                               {**self.options, WRAPPER: call})  # fmt: skip
        return take(result, rows)

    def _within(self, parts: Parts, model: int, box: Box) -> Parts:
        """A model's conditions for a box; raises SettingError where others count on the whole picture."""
        if any("control" in item for item in self.base):
            raise SettingError("place_crop", True, NO_CONTROL)
        if any(key in item for item in self.base for key in ("area", "mask")):
            problem = "allowed without prompts by region, which are for the whole picture; switch one of them off"
            raise SettingError("place_crop", True, problem)
        corner = (shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left)
        return parts.within(box, self.fusion.kinds[model], corner)

    def _call_base(self, apply: Callable[..., torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
        """One call of a model, within the wrapper that another extension has put around it."""
        inner = {**given, "c": {key: value for key, value in given["c"].items() if key != PART}}
        if WRAPPER in self.options:
            return self.options[WRAPPER](apply, inner)
        return apply(inner["input"], inner["timestep"], **inner["c"])

    def _together(self, call: dict[str, Any]) -> Any:
        """Around the base's call: the experts take part in its blocks (AFA), with their texts in ``call``."""
        lockstep = self.fusion.session.lockstep
        texts = Texts.pop(call, len(self.fusion.experts))
        every = alike([call["c_crossattn"], *texts.states])
        return lockstep.running(texts.states, mean_context(every), texts.vectors)

    def _conds_of(self, models: Sequence[int]) -> Parts:
        if len(models) > 1:
            return self._conds[BASE].with_texts([self._conds_of([model]) for model in models[1:]])
        model = models[0]
        if model not in self._conds:
            conditioning = self.fusion.conditionings[model - 1]
            own = self.base
            if conditioning is not None:
                uncond = None if self.base.uncond is None else conditioning.uncond
                own = Parts.encoded(conditioning.cond, uncond, self.fusion.denoiser.step)
                if len(own.cond) != len(self.base.cond):
                    raise FusionError("an expert's prompt has another number of AND parts than the picture's")
            self._conds[model] = own.like(self._conds[BASE]).marked()
        return self._conds[model]

    def _rows_of(self, part: int) -> list[int]:
        """The row of each picture that has this part of its prompt; the one after the last is that without it."""
        count = len(self.base.cond)
        if part >= count:
            return list(range(self.rows.num_cond, self.rows.num_all))
        return list(range(part, self.rows.num_cond, count))

    def _guided(self, denoised: torch.Tensor, factor: float) -> torch.Tensor:
        """The rows with the conditional ones drawn towards the unconditional ones, so that less guidance acts."""
        num = self.rows.num_cond
        uncond = take(denoised, [num + owner for owner in self.rows.owners[:num]])
        return torch.cat([torch.lerp(uncond, denoised[:num], factor), denoised[num:]])
