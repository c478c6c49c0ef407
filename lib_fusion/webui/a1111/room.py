"""Whether the experts that are chosen will fit into the GPU's memory, before they are loaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from modules import devices, sd_models

from lib_fusion.errors import FusionError
from lib_fusion.unet.checkpoint import Checkpoint
from lib_fusion.webui.a1111.loras import free_memory
from lib_fusion.webui.a1111.placement import PLACES, chosen_place


def shortage(checkpoints: Collection[str | None], loaded: Mapping[str, int]) -> tuple[float, float] | None:
    """(bytes that the experts' U-Nets need, bytes that there are for them) where that is too little, else None.

    ``checkpoints``: names from the host's list; others are passed over. ``loaded``: the experts on the GPU by file,
    and their bytes, which make room for others.
    """
    free = free_memory()
    if math.isinf(free):
        return None
    infos = {info.filename: info for info in map(sd_models.checkpoint_aliases.get, checkpoints) if info is not None}
    sizes = [_unet_blocks(file) for file in infos if file not in loaded]
    in_blocks = chosen_place() == PLACES[2]
    need = max((max(s) for s in sizes), default=0) if in_blocks else sum(sum(s) for s in sizes)
    room = free + sum(size for file, size in loaded.items() if file not in infos)
    return (need, room) if need > room else None


def _unet_blocks(file: str) -> list[float]:
    """Bytes of each part of a checkpoint's U-Net that runs by itself, as the host will store it."""
    try:
        shapes = Checkpoint.open(file).unet_shapes
    except FusionError:
        return [0.0]  # refused when it is used
    width = 1 if devices.fp8 else torch.empty(0, dtype=devices.dtype_unet).element_size()
    blocks: dict[str, float] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        block = ".".join(parts[: 2 if parts[0] in ("input_blocks", "output_blocks") else 1])
        blocks[block] = blocks.get(block, 0.0) + width * math.prod(shape)
    return list(blocks.values()) or [0.0]
