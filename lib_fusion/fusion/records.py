"""What a sampling pass keeps about itself, where it is asked to: what the previews are drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lib_fusion.errors import SettingError
from lib_fusion.fusion.rows import take
from lib_fusion.requests.settings import MAP_PARAMETERS, PREVIEWS, TIMESTEPS, read_rows

#: Of one step, by model: for each picture a mark (``skips.COMPUTED`` or ``SKIPPED``), and what the policy has
#: estimated; None where it has not judged. A model that was not asked is not named.
SkipRecord = dict[int, list[tuple[str, "float | None"]]]


@dataclass(frozen=True)
class Keep:
    """What is to be kept, by the names in ``settings.PREVIEWS``; ``map_blocks`` () is a choice of the pass's own."""

    kinds: frozenset[str] = frozenset()
    map_blocks: tuple[str, ...] = ()
    map_timesteps: tuple[float, ...] = ()

    @classmethod
    def read(cls, kinds: Iterable[str], values: Mapping[str, Any] | None = None) -> Keep:
        """From previews' names and the rows MAP_PARAMETERS as text; raises SettingError naming the field."""
        kinds = list(kinds)
        for kind in kinds:
            if kind not in PREVIEWS:
                raise SettingError("previews", kind, f"allowed: {', '.join(PREVIEWS)}")
        read = read_rows(MAP_PARAMETERS, values or {})
        blocks, timesteps = (read[key].replace(",", " ").split() for key in ("map_blocks", "map_timesteps"))
        try:
            chosen = sorted({float(t) for t in timesteps}, reverse=True)
        except ValueError:
            chosen = []
        if not chosen or not all(0 < t <= TIMESTEPS for t in chosen):
            allowed = f"allowed: numbers above 0 and at most {TIMESTEPS}, with spaces between"
            raise SettingError("map_timesteps", read["map_timesteps"], allowed)
        return cls(frozenset(kinds), tuple(blocks), tuple(chosen))

    @property
    def afa(self) -> bool:
        """Whether anything of AFA's is wanted."""
        return bool(self.kinds & {"weights", "maps"})


@dataclass
class MaskRecord:
    """What SNB decided at one timestep: the winning model per position, uint8 (B,1,H,W), 0 the base."""

    timestep: float
    winner: torch.Tensor


@dataclass
class AfaRecord:
    """How AFA's aggregators weighed the models at one timestep, by (picture, point): sums over rows, and the rows.

    ``weights``: (N,), the mean over positions. ``maps``: (N,h,w), at chosen points and timesteps only.
    """

    timestep: float
    weights: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    maps: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    rows: dict[tuple[int, int], int] = field(default_factory=dict)


@dataclass
class PictureRecords:
    """The records of one picture.

    ``masks``: (timestep, winners (h,w)). ``skips``: for each step {model: (mark, estimate)}. ``weights``: for each
    computed step (timestep, (P,N)). ``maps``: (timestep, {point: (N,h,w)}). ``points``: names of AFA's points.
    """

    masks: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    skips: list[dict[int, tuple[str, float | None]]] = field(default_factory=list)
    weights: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    maps: list[tuple[float, dict[int, torch.Tensor]]] = field(default_factory=list)
    points: Sequence[str] = ()


@dataclass
class Records:
    """The records of a batch, in the order of sampling; those of a second pass are added to those of the first.

    Their tensors stay on the device of the pass, so that a step does not wait for them; ``of`` copies.
    """

    masks: list[MaskRecord] = field(default_factory=list)
    skips: list[SkipRecord] = field(default_factory=list)
    afa: list[AfaRecord] = field(default_factory=list)
    points: Sequence[str] = ()

    def add(self, other: Records) -> None:
        self.masks += other.masks
        self.skips += other.skips
        self.afa += other.afa
        self.points = other.points or self.points

    def of(self, picture: int) -> PictureRecords:
        """Those of one picture of the batch."""
        result = PictureRecords(points=self.points)
        result.masks = [(record.timestep, record.winner[picture, 0].to("cpu", torch.int64)) for record in self.masks]
        result.skips = [{model: found[picture] for model, found in record.items()} for record in self.skips]
        for record in self.afa:
            points = [point for of, point in record.weights if of == picture]
            if points:
                means = [record.weights[picture, point] / record.rows[picture, point] for point in sorted(points)]
                result.weights.append((record.timestep, torch.stack(means).cpu()))
            maps = {point: value.cpu() / record.rows[of, point]
                    for (of, point), value in record.maps.items() if of == picture}  # fmt: skip
            if maps:
                result.maps.append((record.timestep, maps))
        return result


class AfaWatch:
    """Listens to the aggregators of a pass; ``points`` are the names of theirs, in order.

    Whole maps are kept of the blocks in ``keep`` (else of four, evenly spread), for each picture at the first computed
    step at or below each of the chosen timesteps. Raises SettingError for a block that is none.
    """

    def __init__(self, records: Records, keep: Keep, points: Sequence[str]) -> None:
        for name in keep.map_blocks:
            if name not in points:
                raise SettingError("map_blocks", name, f"allowed with these models: {', '.join(points)}")
        last = len(points) - 1
        names = keep.map_blocks or [points[round(i * last / 3)] for i in range(4)]
        self._shown = {points.index(name) for name in names} if "maps" in keep.kinds else set()
        self._keep, self._records = keep, records
        self._owners: list[int] = []
        self._levels: dict[int, float] = {}  # how far down each picture's maps have been kept
        self._due: set[int] = set()
        records.points = points

    def begin(self, timestep: float, owners: Sequence[int]) -> None:
        """Before a call of the U-Nets: its timestep, and the picture of each row."""
        if not self._records.afa or self._records.afa[-1].timestep != timestep:
            self._records.afa.append(AfaRecord(timestep))
            self._due = set()
        self._owners = list(owners)
        for picture in set(owners) - self._due:
            passed = [t for t in self._keep.map_timesteps if timestep <= t < self._levels.get(picture, float("inf"))]
            if passed:
                self._due.add(picture)
                self._levels[picture] = min(passed)

    def take(self, point: int, maps: torch.Tensor) -> None:
        """The attention maps (B,N,H,W) of one aggregator."""
        record = self._records.afa[-1]
        for picture in set(self._owners):
            key = (picture, point)
            rows = take(maps, [i for i, owner in enumerate(self._owners) if owner == picture]).float()
            record.weights[key] = record.weights.get(key, 0) + rows.mean((2, 3)).sum(0)
            record.rows[key] = record.rows.get(key, 0) + len(rows)
            if point in self._shown and picture in self._due:
                record.maps[key] = record.maps.get(key, 0) + rows.sum(0)
