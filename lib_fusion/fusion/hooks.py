"""Attaches methods to the blocks of an LDM-shaped U-Net, the host's or ours, and takes them off again.

Module hooks: nothing is replaced, a forward that someone else has put on the U-Net still runs them, and their removal
is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lib_fusion.errors import SettingError
from lib_fusion.methods.freeu import FreeU
from lib_fusion.unet.layout import Point


class Hooks:
    """Hooks that come off together, at ``remove`` or at the end of a ``with`` block, however it ends."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], with_kwargs: bool = False) -> None:
        """``hook(module, args)`` (or ``hook(module, args, kwargs)``) runs before each call of the module."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    def after(self, module: nn.Module, hook: Callable[[nn.Module, tuple, Any], Any]) -> None:
        """``hook(module, args, output)`` runs after each call; what it returns, if not None, is the output instead."""
        self._handles.append(module.register_forward_hook(hook))

    def remove(self) -> None:
        """Takes all off; may be called again."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def attach_freeu(decoder: Iterable[Point], freeu: FreeU | None) -> Hooks:
    """Lets FreeU edit what decoder blocks (``Layout.decoder``) are given: the freshly joined ``[h | skip]``, in place.

    Takes the blocks of any number of U-Nets; one that is named twice gets one hook, and one at whose stage nothing is
    done gets none. Raises SettingError where FreeU has factors but no block to use them on.
    """
    hooks = Hooks()
    if freeu is None:
        return hooks
    decoder = list(decoder)
    acting = {point.module: point for point in decoder if point.stage in freeu.stages}
    if freeu.stages and not acting:
        needs, found = (
            " or ".join(f"{m} x" for m in sorted(multiples, reverse=True))
            for multiples in (freeu.stages, {point.stage for point in decoder})
        )
        problem = f"allowed for this U-Net: Custom with factors for features of {found} its model channels"
        raise SettingError("freeu", f"factors for {needs}", problem)
    for module, point in acting.items():
        hooks.before(module, _freeu_hook(freeu, point))
    return hooks


def _freeu_hook(freeu: FreeU, point: Point) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def edit(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        freeu.edit_(args[0], point.h_channels, point.stage)

    return edit
