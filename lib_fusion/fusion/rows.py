"""The rows of one denoising step: for each picture one for every part of its prompt, then one without the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """The table of one step: the conditional rows picture by picture, then one unconditional row for each picture.

    ``weights``: for each picture the weights of its prompt's AND parts, ``[1.0]`` for a plain prompt. R is the number
    of all rows, B that of pictures.
    """

    weights: Sequence[Sequence[float]]

    @classmethod
    def plain(cls, pictures: int) -> Rows:
        """The table of pictures with plain prompts: B conditional rows, then B unconditional ones."""
        return cls([[1.0]] * pictures)

    @property
    def num_pictures(self) -> int:
        return len(self.weights)

    @property
    def num_cond(self) -> int:
        return sum(len(parts) for parts in self.weights)

    @property
    def num_all(self) -> int:
        return self.num_cond + len(self.weights)

    @property
    def owners(self) -> list[int]:
        """The picture of each row, (R,)."""
        cond = [i for i, parts in enumerate(self.weights) for _ in parts]
        return [*cond, *range(len(self.weights))]

    @property
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
        """For each picture the weights (K,1,1,1) by which its rows (``rows_of``) add up to the guided noise."""
        result = []
        for parts in self.weights:
            scaled = [part * scale for part in parts]
            values = torch.tensor([*scaled, 1 - sum(scaled)], dtype=torch.float32, device=device)
            result.append(values.view(-1, 1, 1, 1))
        return result
