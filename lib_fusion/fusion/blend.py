"""How the predictions of a pass's models become one: which models run at a timestep, and who draws where.

Host-free. A ``Blend`` lives as long as its sampling pass and holds the mask that SNB keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from lib_fusion.fusion.records import Keep, MaskRecord, Records
from lib_fusion.methods import snb
from lib_fusion.requests.settings import FusionSettings

BASE = 0
#: Conditional and unconditional noise (B,C,H,W) of each model.
Halves = tuple[Mapping[int, torch.Tensor], Mapping[int, torch.Tensor]]


class Blend:
    """Model 0 is the base, 1.. are the experts in the settings' order.

    ``fixed_mask``: bool (1 or B,1,h,w), True where the first expert draws, for method Mask; resized to the latent.
    ``winner``: the model that each position was last taken from, int64 (B,1,H,W); None where no single model was.
    """

    def __init__(self, settings: FusionSettings, fixed_mask: torch.Tensor | None, keep: Keep, records: Records) -> None:
        self.settings, self.fixed_mask = settings, fixed_mask
        self.num_models = 1 + len(settings.experts)
        self.winner: torch.Tensor | None = None
        self._masks = records.masks if "masks" in keep.kinds else None
        self._held = snb.HeldMask(settings.snb_hold)
        self._held_models: tuple[int, ...] | None = None

    def models_at(self, timestep: float) -> tuple[int, ...]:
        """The models that must run at this timestep, ascending.

        Outside the window the one that runs alone, or all for their average; inside, all, less those without a
        position in a held mask.
        """
        if self.num_models == 1:
            return (BASE,)
        everyone = tuple(range(self.num_models))
        if not self.settings.in_window(timestep):
            return {"base": (BASE,), "expert": (1,)}.get(self.settings.snb_outside, everyone)
        if self.settings.method == "SNB" and self._held.is_held(timestep):
            if self._held_models is None:
                self._held_models = tuple(self._held.held().unique().tolist())
            return self._held_models
        return (BASE, 1) if self.settings.method == "Mask" else everyone

    def in_lockstep(self, timestep: float) -> bool:
        """Whether the models of ``models_at`` make one prediction together (AFA): the base's, under its hooks."""
        return self.settings.method == "AFA" and self.num_models > 1 and self.settings.in_window(timestep)

    def fuse(
        self, timestep: float, outputs: Mapping[int, torch.Tensor], owners: torch.Tensor, halves: Halves | None,
        guidance_scale: float,
    ) -> torch.Tensor | None:  # fmt: skip
        """The fused rows (R,C,H,W) of the models' ``outputs`` (R,C,H,W), two models or more.

        ``owners`` (R,): the picture of each row. ``halves``: the models' noises, for the saliency; None where the host
        has left out the unconditional half. The last mask is used then; without one, None is returned.
        """
        if self.settings.method == "Average" or not self.settings.in_window(timestep):
            self.winner = None  # no position is one model's here
            return snb.average(outputs.values())
        if halves is not None:
            self.winner = self._decide(timestep, *halves, guidance_scale)
        return None if self.winner is None else snb.select(self.winner[owners], outputs)

    def _decide(
        self, timestep: float, cond: Mapping[int, torch.Tensor], uncond: Mapping[int, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """The model that each position is taken from at this timestep, int64 (B,1,H,W)."""
        first = next(iter(cond.values()))
        if self.settings.method == "Mask":
            assert self.fixed_mask is not None  # the request was checked
            mask = F.interpolate(self.fixed_mask.float(), size=first.shape[-2:], mode="area") > 0.5
            index = mask.to(first.device, torch.int64).expand(first.shape[0], 1, -1, -1)
        elif self._held.is_held(timestep):
            index = self._held.held()
        else:
            index = self._held.update(timestep, self._log_maps(cond, uncond, guidance_scale))
        if self._masks is not None:
            self._masks.append(MaskRecord(timestep, index.cpu()))
        return index

    def _log_maps(
        self, cond: Mapping[int, torch.Tensor], uncond: Mapping[int, torch.Tensor], guidance_scale: float
    ) -> torch.Tensor:
        """The models' normalised saliencies (B,N,H,W), by the paper's formula or the official code's."""
        s = self.settings
        reference = {i: i if s.snb_saliency == "own" else BASE for i in range(self.num_models)}
        saliencies = [snb.saliency(cond[i], uncond[j], guidance_scale) for i, j in reference.items()]
        return snb.log_maps(saliencies, [s.k_general] + [s.k_expert] * (self.num_models - 1))
