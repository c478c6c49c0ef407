"""How the predictions of a pass's models become one: which models run at a timestep, and who draws where.

Host-free. A ``Blend`` lives as long as its sampling pass and holds the mask that SNB decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lib_fusion.fusion.places import SHARP, Places
from lib_fusion.fusion.records import Keep, MaskRecord, Records
from lib_fusion.fusion.rows import take
from lib_fusion.methods import snb
from lib_fusion.requests.settings import FusionSettings

BASE = 0
#: Conditional and unconditional noise (B,C,H,W) of each model.
Halves = tuple[Mapping[int, torch.Tensor], Mapping[int, torch.Tensor]]


@dataclass(frozen=True)
class Shares:
    """Whose the fused noise of a step is: of one model at each position (``index``, int64 (B,1,H,W)), or in parts.

    ``parts``: of each model a number, or a map (B,1,H,W); they add up to one.
    """

    index: torch.Tensor | None = None
    parts: Mapping[int, torch.Tensor | float] | None = None

    def of(self, model: int, picture: int) -> torch.Tensor | float:
        """A model's share of a picture: a number, or a map (1,H,W)."""
        if self.index is not None:
            return (self.index[picture] == model).float()
        part = (self.parts or {}).get(model, 0.0)
        return part if isinstance(part, float) else part[picture]


class Blend:
    """Model 0 is the base, 1.. are the experts in the settings' order.

    SNB has three phases. Down to ``snb_hold`` its mask is decided: each step draws by its own mask, and the saliencies
    are gathered. Below it the mask is held, and used from ``snb_from`` on; between the two the models are averaged.
    ``shares`` are those of the last fused step. ``limits`` has for some models the timestep above which they cannot
    predict (noise models, where a step has no signal): there the others draw without them.
    """

    def __init__(self, settings: FusionSettings, places: Places, keep: Keep, records: Records) -> None:
        self.settings, self.places = settings, places
        self.num_models = 1 + len(settings.experts)
        self.shares = Shares(parts={BASE: 1.0})
        self.limits: Mapping[int, float] = {}
        self.weights = [1.0, *(expert.weight for expert in settings.experts)]
        self._masks = records.masks if "masks" in keep.kinds else None
        self._held = snb.HeldMask(settings.snb_hold, self._winner)
        self._index: torch.Tensor | None = None
        self._read: tuple[torch.Tensor, tuple[int, ...], set[int]] | None = None

    def models_at(self, timestep: float) -> tuple[int, ...]:
        """The models that must run at this timestep, ascending.

        Experts without weight, outside their own window, or with an empty place do not run, and the base does not
        where places cover the picture. Outside the fusion's window one model runs alone, or all for their average.
        Once the mask is held and used, models without a position in it do not run.
        """
        if self.in_lockstep(timestep):
            return tuple(range(self.num_models))
        active = self._active(timestep)
        if not self.settings.in_window(timestep):
            alone = {"base": BASE, "expert": 1 if 1 in active else BASE}.get(self.settings.snb_outside)
            return active if alone is None or not self._can_predict(alone, timestep) else (alone,)
        if self.settings.method == "Average" or len(active) == 1 or not self._decides(active):
            return active
        if not self._held.is_held(timestep):
            return active
        return self._averaged(active) if timestep > self.settings.snb_from else self._drawing(active)

    @property
    def needs_uncond(self) -> bool:
        """Whether the models' saliencies decide, for which each has to predict without the prompt, too."""
        start, end = self.settings.snb_window
        is_snb = self.settings.method == "SNB" and self.num_models > 1 and start > end
        return is_snb and self._decides(range(self.num_models))

    def in_lockstep(self, timestep: float) -> bool:
        """Whether the models of ``models_at`` make one prediction together (AFA): the base's, under its hooks."""
        return self.settings.method == "AFA" and self.num_models > 1 and self.settings.in_window(timestep)

    def decides_at(self, timestep: float) -> bool:
        """Whether this timestep takes part in deciding SNB's mask, which is held afterwards."""
        is_snb = self.settings.method == "SNB" and self._decides(self._active(timestep))
        return is_snb and self.settings.snb_hold > 0 and not self._held.is_held(timestep)

    def by_places(self, timestep: float) -> bool:
        """Whether places alone divide the picture at this timestep, so that each model draws in its own."""
        active = self._active(timestep)
        is_fused = self.settings.method == "SNB" and self.settings.in_window(timestep)
        return is_fused and len(active) > 1 and not self._decides(active)

    def fuse(
        self, timestep: float, outputs: Mapping[int, torch.Tensor], owners: Sequence[int],
        halves: Callable[[], Halves] | None, guidance_scale: float,
    ) -> torch.Tensor | None:  # fmt: skip
        """The fused rows (R,C,H,W) of the models' ``outputs`` (R,C,H,W), two models or more.

        ``owners``: each row's picture. ``halves`` gives the models' noises, for the saliency; None where the host has
        left out the unconditional half. The last mask is used then; without one, None is returned.
        """
        active = self._active(timestep)
        was_held = self._held.is_held(timestep)
        if halves is not None and self._gathers(timestep, active, outputs):
            self._index = self._held.update(timestep, self._log_maps(active, *halves(), guidance_scale))
        if self.settings.method == "Average" or not self.settings.in_window(timestep):
            return self._average(outputs)
        if not self._decides(active):
            first = next(iter(outputs.values()))
            nobody = torch.zeros((1, 1, *first.shape[-2:]), dtype=torch.int64, device=first.device)
            return self._place(timestep, nobody.expand(max(owners) + 1, -1, -1, -1), outputs, owners)
        if was_held:
            if timestep > self.settings.snb_from:
                return self._average(outputs)
            self._index = self._held.held()
        return None if self._index is None else self._place(timestep, self._index, outputs, owners)

    def _active(self, timestep: float) -> tuple[int, ...]:
        """The models that take part at this timestep and can predict there, ascending."""
        chosen = self._chosen(timestep)
        return tuple(model for model in chosen if self._can_predict(model, timestep)) or chosen

    def _can_predict(self, model: int, timestep: float) -> bool:
        return timestep <= self.limits.get(model, timestep)

    def _chosen(self, timestep: float) -> tuple[int, ...]:
        """The models that take part at this timestep, ascending."""
        experts = tuple(
            i for i, expert in enumerate(self.settings.experts, start=1)
            if expert.weight > 0 and expert.in_window(timestep) and not self.places.is_empty(i)
        )  # fmt: skip
        if self.places.maps and self.places.cover([i for i in experts if self.weights[i] == 1]):
            return tuple(i for i in experts if self.places.rules(i))  # nothing is left to the others
        return (BASE, *experts)

    def _decides(self, active: Iterable[int]) -> bool:
        """Whether saliency decides between some of these models, and not places alone."""
        return any(model and not self.places.rules(model) for model in active)

    def _gathers(self, timestep: float, active: tuple[int, ...], outputs: Mapping[int, torch.Tensor]) -> bool:
        """Whether the saliencies of this step count for the mask: wherever all models have run, until it is held."""
        is_snb = self.settings.method == "SNB" and self._decides(active)
        return is_snb and not self._held.is_held(timestep) and len(outputs) == len(self._chosen(timestep))

    @property
    def _is_reference(self) -> bool:
        """Whether the base is only what its experts are compared with, and draws nothing itself."""
        return self.settings.snb_saliency == "divergence" and len(self.settings.experts) > 1

    def _averaged(self, active: tuple[int, ...]) -> tuple[int, ...]:
        """The models whose average draws until the mask is used."""
        return tuple(model for model in active if model != BASE) if self._is_reference else active

    def _drawing(self, active: tuple[int, ...]) -> tuple[int, ...]:
        """The models with a position in the held mask or a place, and the base where one has less than full weight."""
        models = self._present(active) | {model for model in active if self.places.rules(model)}
        if any(self.weights[model] < 1 for model in models):
            models.add(BASE)
        return tuple(sorted(models))

    def _present(self, active: tuple[int, ...]) -> set[int]:
        """The models with a position in the held mask. It is read from the device once."""
        held = self._held.held()
        if self._read is None or self._read[0] is not held or self._read[1] != active:
            index = self._valid(held, active)
            has_position = torch.stack([(index == model).any() for model in active]).tolist()
            self._read = (held, active, {model for model, has in zip(active, has_position) if has})
        return self._read[2]

    def _valid(self, index: torch.Tensor, active: tuple[int, ...]) -> torch.Tensor:
        """The mask, with the positions of models that do not take part given to the first that does (the base)."""
        for model in range(self.num_models):
            if model not in active:
                index = torch.where(index == model, active[0], index)
        return index

    def _average(self, outputs: Mapping[int, torch.Tensor]) -> torch.Tensor:
        weights = {model: self.weights[model] for model in outputs}
        total = sum(weights.values())
        parts = {model: weight / total for model, weight in weights.items()}
        self.shares = Shares(parts=parts)
        return snb.average(outputs.values()) if len({*weights.values()}) == 1 else snb.mix(parts, outputs)

    def _place(
        self, timestep: float, index: torch.Tensor, outputs: Mapping[int, torch.Tensor], owners: Sequence[int]
    ) -> torch.Tensor:
        """Each position from the model that the mask names, and from those whose place it is."""
        maps = self.places.at(index.shape[-2:], index.device)
        ruled = {model: maps[model] for model in outputs if self.places.rules(model)}
        index = self._valid(index, tuple(outputs))
        for model, its_map in ruled.items():
            index = torch.where(its_map > 0.5, model, index)
        if self._masks is not None:
            self._masks.append(MaskRecord(timestep, index.to(torch.uint8)))
        if not (ruled and self.places.feather >= SHARP) and all(self.weights[model] == 1 for model in outputs):
            self.shares = Shares(index=index)
            return snb.select(take(index, owners), outputs)
        left = 1 - sum(ruled.values(), torch.zeros(1, device=index.device))
        parts = {
            model: self.weights[model] * (ruled[model] if model in ruled else left * (index == model))
            for model in outputs if model != BASE
        }  # fmt: skip
        parts = {model: part.expand(index.shape) for model, part in parts.items()}
        if BASE in outputs:
            parts[BASE] = 1 - sum(parts.values(), torch.zeros(1, device=index.device))
        self.shares = Shares(parts=parts)
        return snb.mix({model: take(part, owners) for model, part in parts.items()}, outputs)

    def _log_maps(
        self, active: tuple[int, ...], cond: Mapping[int, torch.Tensor], uncond: Mapping[int, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """The models' normalised saliencies (B,N,H,W), minus infinity for models that do not compete."""
        s = self.settings
        competing = [m for m in active if not self.places.rules(m) and not (m == BASE and self._by_divergence)]
        if self._by_divergence:
            found = [snb.divergence(cond[i], cond[BASE], guidance_scale) for i in competing]
        else:
            reference = {i: i if s.snb_saliency == "own" or BASE not in uncond else BASE for i in competing}
            found = [snb.saliency(cond[i], uncond[j], guidance_scale) for i, j in reference.items()]
        if self._by_divergence and not self._is_reference:
            return found[0]  # of the one expert, for Otsu's threshold
        maps = snb.log_maps(found, [s.k_expert if i else s.k_general for i in competing])
        for place, model in enumerate(competing):
            prior = self.places.prior(model, maps.shape[-2:], maps.device)
            if prior is not None:
                maps[:, place : place + 1] = maps[:, place : place + 1] + prior
        if len(competing) == self.num_models:
            return maps
        batch, _, height, width = maps.shape
        full = maps.new_full((batch, self.num_models, height, width), float("-inf"))
        for place, model in enumerate(competing):
            full[:, model] = maps[:, place]
        return full

    @property
    def _by_divergence(self) -> bool:
        return self.settings.snb_saliency == "divergence"

    def _winner(self, maps: torch.Tensor) -> torch.Tensor:
        """The winners (B,1,H,W) of summed maps. One expert compared with its base has a single map: its divergence."""
        if self._by_divergence and not self._is_reference:
            return (maps > snb.otsu(maps)).to(torch.int64)
        return snb.winner(maps)
