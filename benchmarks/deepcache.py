"""DeepCache (Ma et al., CVPR 2024), from PyPI, on diffusers' U-Net with a checkpoint's weights: a control."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lib_fusion.engine.generate import Engine
from lib_fusion.engine.samplers import make_scheduler
from lib_fusion.unet.checkpoint import UNET_PREFIX
from lib_fusion.unet.model import SD1_HEADS, Downsample, UNet


class DiffusersUNet(nn.Module):
    """diffusers' class with an SD1 U-Net's weights, called as ours is. ``flops`` adds up what its calls have cost."""

    prediction = "epsilon"

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.out_channels, self.context_dim, self.flops = unet.out_channels, unet.context_dim, 0
        levels: list[list[nn.Module]] = [[]]
        for block in list(unet.input_blocks)[1:]:
            if isinstance(block[0], Downsample):
                levels.append([])
            else:
                levels[-1].append(block)
        has_attention = [len(blocks[0]) > 1 for blocks in levels]
        self.unet = UNet2DConditionModel(
            block_out_channels=[blocks[0][0].out_channels for blocks in levels],
            layers_per_block=len(levels[0]),
            down_block_types=["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_attention],
            up_block_types=["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)],
            attention_head_dim=SD1_HEADS,  # in truth the number of heads
            cross_attention_dim=unet.context_dim,
        )
        weights = {UNET_PREFIX + name: value for name, value in unet.state_dict().items()}
        self.unet.load_state_dict(convert_ldm_unet_checkpoint(weights, self.unet.config))
        self.unet.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.unet(x, timesteps[0], encoder_hidden_states=context).sample


def make_diffusers_engine(engine: Engine) -> Engine:
    """The engine with diffusers' U-Net in place of the base's."""
    result = copy.copy(engine)
    result.models = [replace(engine.models[0], unet=DiffusersUNet(engine.models[0].unet)), *engine.models[1:]]
    return result


@contextmanager
def deep_cache(engine: Engine, sampler: str, steps: int, interval: int) -> Iterator[None]:
    """DeepCache on for one run: the whole U-Net at every ``interval``-th step, between them its outermost layers."""
    from DeepCache import DeepCacheSDHelper

    unet = engine.models[0].unet.unet
    helper = DeepCacheSDHelper(SimpleNamespace(unet=unet, scheduler=make_scheduler(sampler, steps)))
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def cached_share(engine: Engine, height: int, width: int) -> float:
    """The floating-point operations of a cached U-Net call as a share of a whole one's."""
    unet, timesteps = engine.models[0].unet, make_scheduler("DDIM", 2).timesteps
    context = torch.zeros(1, 77, unet.context_dim)
    counts = []
    with deep_cache(engine, "DDIM", 2, interval=2):
        for t in timesteps:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(torch.zeros(1, 4, height, width), t.expand(1), context)
            counts.append(counter.get_total_flops())
    return counts[1] / counts[0]
