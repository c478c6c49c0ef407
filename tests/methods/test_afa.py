"""SABW aggregators: sizes, initialisation, exact identities, and diffusers' layers on the same weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_fusion.fusion.lockstep import Lockstep, point_names, sizes_for
from lib_fusion.methods.afa import Aggregator, AggregatorSizes, one_hot, uniform
from lib_fusion.unet.config import unet_shapes
from lib_fusion.unet.model import UNet, load_unet
from tests.helpers import REAL, SMALL, random_inputs, random_weights, relative_error


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere, also where zero is the initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3))
    return module


def inputs(batch: int, models: int, channels: int, height: int, width: int, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in
                 ((batch, models, channels, height, width), (batch, 24), (batch, 5, 12)))  # fmt: skip


def small(models: int = 3, channels: int = 6, hidden: int = 32, layers: int = 2, heads: int = 4) -> Aggregator:
    return Aggregator(channels, models, context_dim=12, time_dim=24, hidden=hidden, layers=layers, heads=heads)


#: (architecture, N, layers): millions of parameters, by arithmetic from the layers of the official code.
COUNTS = {("sd1", 2, 1): 30.08, ("sd1", 2, 2): 42.43, ("sd1", 3, 1): 32.79, ("sd1", 3, 2): 45.13, ("sd1", 6, 2): 53.25,
          ("sdxl", 2, 2): 44.03, ("sdxl", 3, 2): 45.75}  # fmt: skip


@pytest.mark.parametrize(("architecture", "models", "layers"), COUNTS)
def test_parameter_counts(architecture, models, layers):
    with torch.device("meta"):
        unet = UNet(unet_shapes(**REAL[architecture]))
        aggregators = sizes_for(unet, models, layers=layers).make()
    millions = sum(p.numel() for p in aggregators.parameters()) / 1e6
    assert f"{millions:.2f}" == f"{COUNTS[architecture, models, layers]:.2f}"


def test_the_points_of_sd1_and_sdxl():
    with torch.device("meta"):
        sd1, sdxl = (UNet(unet_shapes(**REAL[name])) for name in ("sd1", "sdxl"))
    sizes = sizes_for(sd1, 3)
    assert sizes.channels == (320,) * 4 + (640,) * 3 + (1280,) * 12 + (640,) * 3 + (320,) * 2 + (4,)
    assert sum(sizes.channels) == 21124
    names = point_names(sd1)
    assert len(names) == 25
    assert [names[i] for i in (12, 13, 23, 24)] == ["middle_block", "output_blocks.0", "output_blocks.10", "out"]
    assert len(point_names(sdxl)) == 19


def test_untrained_is_the_plain_mean():
    features, time, text = inputs(2, 3, 6, 5, 7)
    aggregate, maps = small()(features, time, text)
    torch.testing.assert_close(maps, torch.full_like(maps, 1 / 3))
    torch.testing.assert_close(aggregate, features.mean(dim=1))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_whatever_the_weights_copies_give_themselves_and_maps_sum_to_one(models, height, width, seed):
    aggregator = randomize(small(models), seed)
    features, time, text = inputs(2, models, 6, height, width, seed)
    aggregate, maps = aggregator(features, time, text)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones_like(maps[:, 0]))
    expected = torch.stack([(maps[:, i, None] * features[:, i]) for i in range(models)]).sum(0)
    torch.testing.assert_close(aggregate, expected)
    same, _ = aggregator(features[:, :1].expand_as(features), time, text)
    assert relative_error(same, features[:, 0]) < 1e-5


def test_every_input_matters():
    aggregator = randomize(small())
    told = inputs(1, 3, 6, 5, 5)
    other = inputs(1, 3, 6, 5, 5, seed=1)
    maps = aggregator(*told)[1]
    for i in range(3):
        changed = [*told]
        changed[i] = other[i]
        assert (aggregator(*changed)[1] - maps).abs().max() > 1e-3


def test_equals_diffusers_layers():
    """The official code puts it together from diffusers' ResnetBlock2D and Transformer2DModel."""
    resnet = pytest.importorskip("diffusers.models.resnet", reason="needs diffusers")
    from diffusers import Transformer2DModel

    aggregator = randomize(small(hidden=128))
    block = resnet.ResnetBlock2D(in_channels=128, out_channels=128, temb_channels=24)
    block.load_state_dict(aggregator.res_block.state_dict())
    transformer = Transformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=128, num_layers=2, cross_attention_dim=12
    )
    transformer.load_state_dict(aggregator.transformer.state_dict())
    features, time, text = inputs(2, 3, 6, 5, 7)
    z = aggregator.conv_in(features.reshape(2, 18, 5, 7))
    z = transformer(block(z, time), text).sample
    expected = aggregator.conv_out(z).softmax(dim=1)
    assert relative_error(aggregator(features, time, text)[1], expected) < 1e-5


def test_narrow_aggregators_are_possible():
    features, time, text = inputs(1, 2, 6, 4, 4)
    for hidden in (8, 12, 48):
        aggregate, _ = small(2, hidden=hidden, heads=2)(features, time, text)
        assert aggregate.shape == (1, 6, 4, 4)


def test_controls():
    features, time, text = inputs(2, 3, 6, 5, 7)
    torch.testing.assert_close(uniform(3)(features, time, text)[0], features.mean(dim=1))
    for i in range(3):
        aggregate, maps = one_hot(3, i)(features, time, text)
        assert torch.equal(aggregate, features[:, i])
        assert torch.equal(maps[:, i], torch.ones_like(maps[:, i]))


def test_sizes_are_what_is_made():
    sizes = AggregatorSizes(2, (8, 16, 4), context_dim=12, time_dim=24, hidden=32, layers=1, heads=4)
    made = sizes.make()
    assert [a.conv_in.in_channels for a in made] == [16, 32, 8]


def test_the_lockstep_takes_the_timesteps_by_position_or_by_name():
    unet = load_unet(random_weights(SMALL["sd1"]))
    x, timesteps, context, _ = random_inputs(SMALL["sd1"])
    aggregators = randomize(sizes_for(unet, 2, hidden=16, layers=1, heads=2).make())
    lockstep = Lockstep(unet, [unet], aggregators)
    with lockstep.attach(), lockstep.running([context.flip(1)], context), torch.no_grad():
        expected = unet(x, timesteps, context)
        assert torch.equal(unet(x, timesteps=timesteps, context=context), expected)
        assert not torch.equal(unet(x, timesteps=timesteps - 400, context=context), expected)


def test_the_published_sizes_are_the_default():
    aggregator = Aggregator(4, 2, context_dim=12, time_dim=24)
    assert aggregator.conv_in.weight.shape == (128, 8, 1, 1)
    assert len(aggregator.transformer.transformer_blocks) == 2
    sizes = AggregatorSizes(2, (4,), context_dim=12, time_dim=24)
    assert (sizes.hidden, sizes.layers, sizes.heads) == (128, 2, 8)
