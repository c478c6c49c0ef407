"""Numbers on the device that the host decides by. Reading one waits until the device has done all it was given."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Readings:
    """Collects numbers while a step is computed; ``fetch`` reads them together, so that a step waits once."""

    def __init__(self) -> None:
        self._asked: list[tuple[torch.Tensor, Callable[[list[float]], None]]] = []

    def ask(self, values: torch.Tensor, take: Callable[[list[float]], None]) -> None:
        """``take`` is given these values (any shape, read as float32) when they are fetched."""
        self._asked.append((values, take))

    def fetch(self, *values: torch.Tensor) -> list[float]:
        """Reads all that was asked for, in its order, and ``values``, one number each, which are returned."""
        asked, self._asked = self._asked, []
        if not asked and not values:
            return []
        parts = [part.detach().flatten().float() for part in (*values, *(part for part, _ in asked))]
        numbers = torch.cat(parts).tolist()
        start = len(values)
        for part, take in asked:
            take(numbers[start : start + part.numel()])
            start += part.numel()
        return numbers[: len(values)]
