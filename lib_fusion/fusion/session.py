"""One sampling pass: which models run at each timestep, and how their noise predictions become one.

Built from settings at the start of a pass and thrown away at its end; it holds all state there is (the mask that is
held, the counts). It knows neither the engine nor the WebUI: both call ``models_at``, run those models, and ``fuse``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.fusion.lockstep import Lockstep, point_names
from lib_fusion.fusion.policies import Skips, make_skips
from lib_fusion.fusion.records import AfaWatch, Keep, MaskRecord, Records
from lib_fusion.methods import freeu, snb
from lib_fusion.requests.settings import FREEU_AUTO, FREEU_PUBLISHED, FREEU_STAGES, FusionSettings

BASE = 0
#: In ``watch``: what is not a model's but comes of all of them.
AGGREGATOR = -1


@dataclass
class FusionSession:
    """Model 0 is the base, 1.. are the experts in the settings' order.

    ``fixed_mask``: bool (1 or B,1,h,w), True where the first expert rules, for method Mask; resized to the latent.
    ``kinds`` are those of the models' U-Nets (``checkpoint.unet_kind``), or one for all. ``freeu`` has for each model
    what is to be attached to its U-Net, models of one kind the same; it is empty where FreeU is off.
    ``keep`` says what is to be kept in ``records``, for previews.
    ``calls``, ``rows`` and ``skipped_rows`` count U-Net calls and batch rows per model, as reported by ``count``.
    """

    settings: FusionSettings
    fixed_mask: torch.Tensor | None = None
    keep: Keep = field(default_factory=Keep)
    kinds: Sequence[str] = ("sd1",)
    records: Records = field(default_factory=Records)
    calls: list[int] = field(init=False)
    rows: list[int] = field(init=False)
    skipped_rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.num_models = 1 + len(self.settings.experts)
        self.calls, self.rows, self.skipped_rows = ([0] * self.num_models for _ in range(3))
        self._hold = snb.HeldMask(self.settings.snb_hold)
        self._held_models: tuple[int, ...] | None = None
        self.last_winner: torch.Tensor | None = None
        self.skips = self._make_skips()
        self.afa_watch: AfaWatch | None = None
        made = {kind: make_freeu(self.settings, kind) for kind in self.kinds}
        kinds = self.kinds if len(self.kinds) > 1 else [*self.kinds] * self.num_models
        self.freeu = [] if self.settings.freeu == "Off" else [made[kind] for kind in kinds]
        self.levels: Sequence[float] = (1000.0, 0.0)
        self._watched: list[tuple[Sequence[int], torch.Tensor]] = []

    def models_at(self, timestep: float) -> tuple[int, ...]:
        """The models that must run at this timestep, ascending.

        Outside the window the one that runs alone, or all for their average; inside, all, less those without a
        position in a held mask.
        """
        if self.num_models == 1:
            return (BASE,)
        if not self.settings.in_window(timestep):
            alone = {"base": (BASE,), "expert": (1,)}
            return alone.get(self.settings.snb_outside, tuple(range(self.num_models)))
        if self.settings.method == "SNB" and self._hold.is_held(timestep):
            if self._held_models is None:
                self._held_models = tuple(self._hold.held().unique().tolist())
            return self._held_models
        if self.settings.method == "Mask":
            return (BASE, 1)
        return tuple(range(self.num_models))

    def in_lockstep(self, timestep: float) -> bool:
        """Whether the models of ``models_at`` make one prediction together (AFA): the base's, under its hooks."""
        return self.settings.method == "AFA" and self.num_models > 1 and self.settings.in_window(timestep)

    def count(self, model: int, rows: int, skipped: int = 0) -> None:
        """Notes a U-Net call of ``rows`` batch rows, none where 0, and how many rows were forecast instead."""
        self.calls[model] += rows > 0
        self.rows[model] += rows
        self.skipped_rows[model] += skipped

    def watch(self, models: Sequence[int], totals: torch.Tensor) -> None:
        """Takes sums (K,) over predictions of these models, or over their features, in the order of computing.

        A sum is finite only if all of its values are. Nothing waits for the device here; ``check`` does.
        """
        self._watched.append((models, totals))

    def check(self, base: str = "the base") -> None:
        """Raises FusionError naming the model, if any that was watched since the last call is not finite.

        It waits for the device, so it is called where that is waited for anyway. ``base`` is the base's name.
        """
        watched, self._watched = self._watched, []
        if not watched:
            return
        finite = torch.cat([totals for _, totals in watched]).isfinite().tolist()
        models = [model for models, _ in watched for model in models]
        if all(finite):
            return
        broken = models[finite.index(False)]
        names = {AGGREGATOR: f"the aggregator {self.settings.afa_aggregator or self.settings.afa_maps}", BASE: base}
        name = names.get(broken) or f"expert {broken} ({self.settings.experts[broken - 1].checkpoint})"
        told = "half precision is not enough for it (--no-half helps then), or its file is broken"
        raise FusionError(f"{name} has predicted infinite values or NaN, so the picture was not finished; {told}")

    def begin(self, levels: Sequence[float]) -> None:
        """Tells the noise levels of the pass, sigmas or timesteps: step i goes from ``levels[i]`` to ``levels[i + 1]``.

        Needed for FreeU's schedule only; raises SettingError where that would stop before it starts.
        """
        self.levels = levels
        start, stop = self.settings.freeu_start, self.settings.freeu_stop
        steps = len(levels) - 1
        if self.freeu and freeu.whole_steps(start, steps) > freeu.whole_steps(stop, steps):
            raise SettingError("freeu_stop", stop, f"allowed with freeu_start {start:g} in {steps} steps: no less")

    @contextmanager
    def using_freeu(self, model: int, level: float) -> Iterator[None]:
        """Around a U-Net call of a model at a noise level: lets FreeU act in it as far as the settings say.

        Going by the level and not by counted calls, a step is the same to samplers that call twice in one, and going
        by the model, two that share one U-Net are told apart.
        """
        s = self.settings
        if not self.freeu or s.freeu_models == ("experts" if model == BASE else "base"):
            yield
            return
        step, steps = freeu.step_at(level, self.levels), len(self.levels) - 1
        acting = self.freeu[model]
        acting.strength = freeu.strength(step, steps, s.freeu_start, s.freeu_stop, s.freeu_smooth)
        try:
            yield
        finally:
            acting.strength = 0.0

    def forget(self) -> None:
        """Another base has taken over: what is known of the models' noises holds no more."""
        self.skips = self.skips and self._make_skips()

    def _make_skips(self) -> Skips | None:
        return make_skips(self.settings, self.records.skips if "skips" in self.keep.kinds else None)

    def watch_afa(self, lockstep: Lockstep) -> None:
        """Keeps what the aggregators of a lockstep give, if that is wanted; raises SettingError for unknown blocks."""
        if self.keep.afa:
            self.afa_watch = AfaWatch(self.records, self.keep, point_names(lockstep.unet))
            lockstep.on_maps = self.afa_watch.take

    def begin_call(self, timestep: float, owners: Sequence[int]) -> None:
        """Before a call of the models in lockstep; ``owners``: the picture of each row."""
        if self.afa_watch is not None:
            self.afa_watch.begin(timestep, owners)

    def fuse(
        self,
        timestep: float,
        cond: Mapping[int, torch.Tensor],
        uncond: Mapping[int, torch.Tensor],
        guidance_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One conditional and one unconditional noise (B,C,H,W) from those of the models in ``models_at(timestep)``."""
        if len(cond) == 1:
            return next(iter(cond.values())), next(iter(uncond.values()))
        if self._averages(timestep):
            self.last_winner = None  # no position is one model's here
            return snb.average(cond.values()), snb.average(uncond.values())
        index = self.winner(timestep, cond, uncond, guidance_scale)
        return snb.select(index, cond), snb.select(index, uncond)

    def fuse_rows(
        self,
        timestep: float,
        rows: Mapping[int, torch.Tensor],
        owner: torch.Tensor,
        cond: Mapping[int, torch.Tensor] | None,
        uncond: Mapping[int, torch.Tensor] | None,
        guidance_scale: float,
    ) -> torch.Tensor | None:
        """The fused rows (R,C,H,W) where an image has several, as with composed prompts.

        ``rows`` are the models' raw outputs (R,C,H,W), and ``owner`` (R,) tells whose image each row is. ``cond`` and
        ``uncond`` (B,C,H,W) are noises, for the saliency; None where the host left the unconditional half out, and then
        the last mask is held. None is returned where there is no mask yet.
        """
        if self._averages(timestep):
            self.last_winner = None
            return snb.average(rows.values())
        index = self.last_winner if cond is None else self.winner(timestep, cond, uncond, guidance_scale)
        return None if index is None else snb.select(index[owner], rows)

    def _averages(self, timestep: float) -> bool:
        """Whether the models' noises are averaged here: by the method, or outside the window."""
        return self.settings.method == "Average" or not self.settings.in_window(timestep)

    def winner(
        self,
        timestep: float,
        cond: Mapping[int, torch.Tensor],
        uncond: Mapping[int, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        """Which model each position is taken from at this timestep: int64 (B,1,H,W)."""
        first = next(iter(cond.values()))
        if self.settings.method == "Mask":
            mask = F.interpolate(self.fixed_mask.float(), size=first.shape[-2:], mode="area") > 0.5
            index = mask.to(first.device, torch.int64).expand(first.shape[0], 1, -1, -1)
        elif self._hold.is_held(timestep):
            index = self._hold.held()
        else:
            s = self.settings
            maps = snb.log_maps(
                [
                    snb.saliency(cond[i], uncond[i if s.snb_saliency == "own" else BASE], guidance_scale)
                    for i in range(self.num_models)
                ],
                [s.k_general] + [s.k_expert] * (self.num_models - 1),
            )
            index = self._hold.update(timestep, maps)
        self.last_winner = index
        if "masks" in self.keep.kinds:
            self.records.masks.append(MaskRecord(timestep, index.cpu()))
        return index


def make_freeu(settings: FusionSettings, kind: str) -> freeu.FreeU | None:
    """FreeU with the factors that the settings choose for this kind of U-Net, or None where it is off."""
    if settings.freeu == "Off":
        return None
    if settings.freeu == "Custom":
        keys = {"backbone": "b", "skip": "s", "offset": "offset", "width": "width", "high": "high", "cutoff": "cutoff"}
        stages = {
            multiple: freeu.Stage(**{name: getattr(settings, f"freeu_{key}{n}") for name, key in keys.items()})
            for n, multiple in FREEU_STAGES.items()
        }
    else:
        name = FREEU_AUTO[kind] if settings.freeu == "Auto" else settings.freeu
        b1, b2, s1, s2 = FREEU_PUBLISHED[name][settings.freeu_version]
        stages = {FREEU_STAGES[1]: freeu.Stage(b1, s1), FREEU_STAGES[2]: freeu.Stage(b2, s2)}
    return freeu.FreeU(stages, int(settings.freeu_version))
