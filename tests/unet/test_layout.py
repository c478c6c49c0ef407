"""The layout that is read off a U-Net's modules is the one its forward pass has."""

import pytest
import torch
from torch import nn

from lib_fusion.errors import FusionError
from lib_fusion.unet.config import unet_shapes
from lib_fusion.unet.layout import read_layout
from lib_fusion.unet.model import UNet, load_unet
from tests.helpers import (
    REAL,
    SMALL,
    diffusers_unet,
    ldm_forward,
    ldm_unet,
    random_inputs,
    random_weights,
)

#: How often each number of channels comes in as ``h``, in the order of the decoder blocks, and its stages.
DECODERS = {
    "sd1": ([1280] * 7 + [640] * 3 + [320] * 2, [4] * 7 + [2] * 3 + [1] * 2),
    "sd2": ([1280] * 7 + [640] * 3 + [320] * 2, [4] * 7 + [2] * 3 + [1] * 2),
    "sdxl": ([1280] * 4 + [640] * 3 + [320] * 2, [4] * 4 + [2] * 3 + [1] * 2),
    "sdxl-refiner": ([1536] * 7 + [768] * 3 + [384] * 2, [4] * 7 + [2] * 3 + [1] * 2),
}
SKIPS = {
    "sd1": [1280] * 5 + [640] * 3 + [320] * 4,
    "sd2": [1280] * 5 + [640] * 3 + [320] * 4,
    "sdxl": [1280] * 2 + [640] * 3 + [320] * 4,
    "sdxl-refiner": [1536] * 5 + [768] * 3 + [384] * 4,
}


def own(config, weights=None):
    if weights:
        return load_unet(weights)
    with torch.device("meta"):
        return UNet(unet_shapes(**config))


def ldm(config, weights=None):
    with torch.device("cpu" if weights else "meta"):
        return ldm_unet(config, weights)


both = pytest.mark.parametrize("build", [own, ldm])


@pytest.mark.parametrize("architecture", REAL)
@both
def test_real_architectures(build, architecture):
    layout = read_layout(build(REAL[architecture]))
    h, stages = DECODERS[architecture]
    assert layout.model_channels == REAL[architecture]["model_channels"]
    assert [point.h_channels for point in layout.decoder] == h
    assert [point.stage for point in layout.decoder] == stages
    assert [point.skip_channels for point in layout.decoder] == SKIPS[architecture]


@pytest.mark.parametrize("architecture", SMALL)
@both
def test_equals_what_a_forward_pass_shows(build, architecture):
    """Every block's channels and running order, and where in a decoder block's input the skip begins."""
    unet = build(SMALL[architecture], random_weights(SMALL[architecture]))
    layout = read_layout(unet)
    outputs = []
    for point in layout.points:

        def record(module, args, output, point=point):
            if point.h_channels:
                h, skip = args[0].split([point.h_channels, point.skip_channels], dim=1)
                assert torch.equal(h, outputs[-1][1]), point.name
                assert torch.equal(skip, stored.pop()), point.name
            outputs.append((point, output.clone()))
            if point.name.startswith("input_blocks"):
                stored.append(outputs[-1][1])

        point.module.register_forward_hook(record)
    stored = []
    forward = unet if build is own else lambda *inputs: ldm_forward(unet, *inputs)
    forward(*random_inputs(SMALL[architecture]))
    assert [point for point, _ in outputs] == list(layout.points), "the points are in running order"
    assert [output.shape[1] for _, output in outputs] == [point.channels for point in layout.points]
    assert stored == []


def test_points_are_named_as_torch_names_them():
    unet = own(SMALL["sdxl"])
    layout = read_layout(unet)
    assert all(unet.get_submodule(point.name) is point.module for point in layout.points)
    assert [point.name for point in layout.points[-2:]] == ["output_blocks.7", "output_blocks.8"]
    assert len(layout.points) == 9 + 1 + 9


def test_the_middle_and_the_encoder_have_no_split():
    layout = read_layout(own(SMALL["sd1"]))
    rest = [point for point in layout.points if point not in layout.decoder]
    assert [point.name for point in rest][-1] == "middle_block"
    assert {(point.h_channels, point.skip_channels, point.stage) for point in rest} == {(0, 0, 0)}


def _without_channels():
    unet = own(SMALL["sd1"])
    unet.output_blocks[2][0] = nn.Conv2d(7, 7, 1)
    return unet


def _with_other_split():
    unet = own(SMALL["sd1"])
    unet.output_blocks[2][0].channels += 1
    return unet


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Linear(2, 2), "Linear is not a Stable Diffusion U-Net"),
        (lambda: diffusers_unet(SMALL["sd1"], random_weights(SMALL["sd1"])), "UNet2DConditionModel is not"),
        (_without_channels, "UNet is not"),
        (_with_other_split, "output_blocks.2 takes 129 channels"),
    ],
)
def test_other_modules_are_refused(make, says):
    with pytest.raises(FusionError, match=says) as error:
        read_layout(make())
    assert "\n" not in str(error.value)
