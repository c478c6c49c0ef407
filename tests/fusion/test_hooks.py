"""Hooks on whole U-Nets: where FreeU acts, that it equals a forward with the formula in it, and that it leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_fusion.errors import SettingError
from lib_fusion.fusion.hooks import Hooks, attach_freeu
from lib_fusion.methods.freeu import FreeU, Stage, filter_skip, scale_backbone
from lib_fusion.unet.layout import read_layout
from lib_fusion.unet.model import load_unet, timestep_embedding
from tests.helpers import REAL, SMALL, ldm_forward, ldm_unet, random_inputs, random_weights

STAGES = {4: Stage(1.3, 0.9), 2: Stage(1.4, 0.2), 1: Stage(0.8, 1.1)}
DEEP = {kind: config | {"channel_mult": (1, 2, 4, 4)} for kind, config in SMALL.items() if kind != "sdxl"}
DEEP["sdxl"] = SMALL["sdxl"]


def acting(version: int = 2, strength: float = 1.0, stages: dict[int, Stage] = STAGES) -> FreeU:
    made = FreeU(stages, version)
    made.strength = strength
    return made


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


def forward_with_formula(unet: nn.Module, x, timesteps, context, y, version: int) -> torch.Tensor:
    """The U-Net's forward with FreeU written into its decoder, by the number of channels as in the official code."""
    emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels))
    if y is not None:
        emb = emb + unet.label_emb(y)
    h, skips = x, []
    for block in unet.input_blocks:
        h = block(h, emb, context)
        skips.append(h)
    h = unet.middle_block(h, emb, context)
    for block in unet.output_blocks:
        skip = skips.pop()
        h = nn.functional.interpolate(h, skip.shape[-2:], mode="nearest")
        for multiple, stage in STAGES.items():
            if h.shape[1] == multiple * unet.model_channels:
                h, skip = scale_backbone(h, stage.backbone, version), filter_skip(skip, stage.skip)
                break
        h = block(torch.cat([h, skip], dim=1), emb, context)
    return unet.out(h)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", DEEP)
def test_equals_a_forward_with_the_formula_in_it(kind, version):
    unet = load_unet(random_weights(DEEP[kind]))
    inputs = random_inputs(DEEP[kind], height=9, width=11)
    plain = unet(*inputs)
    with attach_freeu(read_layout(unet).decoder, acting(version)):
        edited = unet(*inputs)
    torch.testing.assert_close(edited, forward_with_formula(unet, *inputs, version=version), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(edited, plain, rtol=1e-2, atol=1e-3)
    assert torch.equal(unet(*inputs), plain)
    assert hooks_of(unet) == 0


def test_acts_alike_in_the_original_class():
    config = DEEP["sd1"]
    weights, inputs = random_weights(config), random_inputs(config)
    ours, original = load_unet(weights), ldm_unet(config, weights)
    with attach_freeu(read_layout(ours).decoder, acting()):
        expected = ours(*inputs)
    with attach_freeu(read_layout(original).decoder, acting()):
        torch.testing.assert_close(ldm_forward(original, *inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [("sd1", (7, 3, 2)), ("sd2", (7, 3, 2)), ("sdxl", (4, 3, 2)), ("sdxl-refiner", (7, 3, 2))],
)
def test_stages_of_the_real_architectures(kind, blocks):
    """How many decoder blocks are given 4, 2 and 1 times the model's channels."""
    from lib_fusion.unet.config import unet_shapes
    from lib_fusion.unet.model import UNet

    with torch.device("meta"):
        unet = UNet(unet_shapes(**REAL[kind]))
    for multiple, number in zip((4, 2, 1), blocks, strict=True):
        with attach_freeu(read_layout(unet).decoder, acting(stages={multiple: STAGES[multiple]})):
            assert hooks_of(unet) == number


def test_neutral_and_switched_off_change_no_bit():
    config = DEEP["sd1"]
    unet, inputs = load_unet(random_weights(config)), random_inputs(config)
    plain = unet(*inputs)
    for freeu in (None, acting(stages={4: Stage(), 2: Stage(width=1.0)}), acting(strength=0.0)):
        with attach_freeu(read_layout(unet).decoder, freeu):
            assert torch.equal(unet(*inputs), plain)


def test_a_unet_named_twice_is_edited_once():
    config = DEEP["sd1"]
    unet, inputs = load_unet(random_weights(config)), random_inputs(config)
    decoder = read_layout(unet).decoder
    with attach_freeu(decoder, acting()):
        once = unet(*inputs)
    with attach_freeu([*decoder, *read_layout(unet).decoder], acting()):
        assert torch.equal(unet(*inputs), once)


def test_a_unet_without_such_stages_is_refused_and_left_alone():
    unet = load_unet(random_weights(SMALL["sd1"]))
    with pytest.raises(SettingError, match=r"factors for 4 x.*features of 2 x or 1 x"):
        attach_freeu(read_layout(unet).decoder, acting(stages={4: STAGES[4]}))
    assert hooks_of(unet) == 0


def test_hooks_leave_after_an_exception_in_any_order_and_only_theirs():
    unet = load_unet(random_weights(DEEP["sd1"]))
    other = unet.output_blocks[0].register_forward_pre_hook(lambda module, args: None)
    inputs = random_inputs(DEEP["sd1"])

    def fail(module: nn.Module, args: tuple) -> None:
        raise RuntimeError("stop")

    first = attach_freeu(read_layout(unet).decoder, acting())
    second = Hooks()
    second.before(unet.output_blocks[5], fail)
    with pytest.raises(RuntimeError, match="stop"), second:
        unet(*inputs)
    assert hooks_of(unet) == 1 + 12
    first.remove()
    first.remove()
    assert hooks_of(unet) == 1
    other.remove()
