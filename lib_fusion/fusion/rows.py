"""The rows of one denoising step: for each picture one for every part of its prompt, then one without the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch


@dataclass(frozen=True)
class Rows:
    """The table of one step: the conditional rows picture by picture, then one unconditional row for each picture.

    ``weights``: for each picture the weights of its prompt's AND parts, ``[1.0]`` for a plain prompt. R is the number
    of all rows, B that of pictures.
    """

    weights: Sequence[Sequence[float]]
    _guidance: dict[tuple, list[torch.Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def plain(cls, pictures: int) -> Rows:
        """The table of pictures with plain prompts: B conditional rows, then B unconditional ones."""
        return cls([[1.0]] * pictures)

    @cached_property
    def num_pictures(self) -> int:
        return len(self.weights)

    @cached_property
    def num_cond(self) -> int:
        return sum(len(parts) for parts in self.weights)

    @cached_property
    def num_all(self) -> int:
        return self.num_cond + len(self.weights)

    @cached_property
    def owners(self) -> list[int]:
        """The picture of each row, (R,)."""
        cond = [i for i, parts in enumerate(self.weights) for _ in parts]
        return [*cond, *range(len(self.weights))]

    @cached_property
    def is_plain(self) -> bool:
        """Whether every prompt is a single part with weight one."""
        return all(list(parts) == [1.0] for parts in self.weights)

    def first_rows(self) -> list[int]:
        """Each picture's first conditional row."""
        starts, row = [], 0
        for parts in self.weights:
            starts.append(row)
            row += len(parts)
        return starts

    def rows_of(self, picture: int) -> list[int]:
        """A picture's rows: the parts of its prompt in their order, then the unconditional one."""
        start = self.first_rows()[picture]
        return [*range(start, start + len(self.weights[picture])), self.num_cond + picture]

    def combine(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditional and unconditional noise (B,C,H,W) of all rows (R,C,H,W).

        AND parts are added as the WebUI adds them: ``u + sum_j w_j (c_j - u)``.
        """
        uncond = rows[self.num_cond :]
        if self.is_plain:
            return rows[: self.num_cond], uncond
        cond = []
        for i, (start, parts) in enumerate(zip(self.first_rows(), self.weights)):
            cond.append(uncond[i] + sum(w * (rows[start + j] - uncond[i]) for j, w in enumerate(parts)))
        return torch.stack(cond), uncond

    def guidance(self, scale: float, device: torch.device) -> list[torch.Tensor]:
        """For each picture the weights (K,1,1,1) by which its rows (``rows_of``) add up to the guided noise.

        Made once for each scale and device: to put numbers on a device, the host waits for it.
        """
        key = (scale, device)
        if key not in self._guidance:
            scaled = [[part * scale for part in parts] for parts in self.weights]
            values = [torch.tensor([*parts, 1 - sum(parts)], dtype=torch.float32, device=device) for parts in scaled]
            self._guidance[key] = [value.view(-1, 1, 1, 1) for value in values]
        return self._guidance[key]


def take(values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Some rows of a tensor (R,...), in this order. By slices: the host would wait to put a list on the device.

    Neighbouring rows are a view, not a copy.
    """
    parts = [values[run] for run in _runs(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else values[:0]


def put(target: torch.Tensor, rows: Sequence[int], values: torch.Tensor) -> None:
    """Writes ``values`` (K,...) over K rows of a tensor (R,...), in place."""
    start = 0
    for run in _runs(rows):
        stop = start + run.stop - run.start
        target[run] = values[start:stop]
        start = stop


def _runs(rows: Sequence[int]) -> Iterator[slice]:
    """The rows as slices of neighbours."""
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield slice(rows[start], rows[i - 1] + 1)
            start = i
