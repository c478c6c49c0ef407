"""Reads any LDM-shaped U-Net, the host's or ours, by its module structure: its points and its channel splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lib_fusion.errors import FusionError

#: A U-Net with LDM's modules, the host's class or ours; a module's attributes have no types.
UNetLike = Any


@dataclass(frozen=True, eq=False)
class Point:
    """A block of a U-Net, whose output is a feature map (B,channels,H,W).

    A decoder block is given ``[h | skip]`` (B, h_channels + skip_channels, H, W): the features so far and the stored
    output of an encoder block. ``stage`` is ``h_channels`` in multiples of the model's channels: 4 deepest, 1 outermost
    in SD1, SD2 and SDXL. All three are 0 for encoder and middle blocks.
    """

    name: str
    module: nn.Module
    channels: int
    h_channels: int = 0
    skip_channels: int = 0
    stage: int = 0


@dataclass(frozen=True, eq=False)
class Layout:
    """A U-Net's blocks in the order in which they run: ``input_blocks.*``, ``middle_block``, ``output_blocks.*``."""

    model_channels: int
    points: tuple[Point, ...]

    @property
    def decoder(self) -> tuple[Point, ...]:
        """The points that take ``[h | skip]``."""
        return tuple(point for point in self.points if point.h_channels)


def read_layout(unet: nn.Module) -> Layout:
    """The layout of a U-Net with LDM's modules. Raises FusionError for any other module."""
    try:
        return Layout(_model_channels(unet), tuple(_points(unet)))
    except (AttributeError, IndexError, TypeError) as error:
        raise FusionError(
            f"{type(unet).__name__} is not a Stable Diffusion U-Net as LDM builds it ({error})"
        ) from error


# U-Nets and blocks are Any below: the host's classes share attributes with ours, but no base that declares them.


def _model_channels(unet: Any) -> int:
    return _channels_out(unet.input_blocks[0])


def _points(unet: Any) -> Iterator[Point]:
    model_channels = _model_channels(unet)
    skips: list[int] = []
    for i, block in enumerate(unet.input_blocks):
        skips.append(_channels_out(block))
        yield Point(f"input_blocks.{i}", block, skips[-1])
    h = _channels_out(unet.middle_block)
    yield Point("middle_block", unet.middle_block, h)
    for i, block in enumerate(unet.output_blocks):
        skip = block[0].channels - h
        if skip != skips.pop():
            raise FusionError(f"output_blocks.{i} takes {block[0].channels} channels, which are not its two inputs'")
        yield Point(f"output_blocks.{i}", block, _channels_out(block), h, skip, h // model_channels)
        h = _channels_out(block)


def _channels_out(block: Any) -> int:
    """Output channels of the last convolution, ResBlock or up- or down-sampling; transformers keep the number."""
    return [layer.out_channels for layer in block if hasattr(layer, "out_channels")][-1]
