"""The U-Net computes what the published implementations compute on the same weights."""

import pytest
import torch

from lib_fusion.errors import CheckpointError
from lib_fusion.unet.config import unet_shapes
from lib_fusion.unet.model import UNet, load_unet
from tests.helpers import (
    REAL,
    SMALL,
    diffusers_unet,
    ldm_forward,
    ldm_unet,
    random_inputs,
    random_weights,
    relative_error,
)

architectures = pytest.mark.parametrize("architecture", SMALL)


@architectures
def test_no_test_weight_is_trivial(architecture):
    for name, value in random_weights(SMALL[architecture]).items():
        assert not ((value == 0) | (value == 1)).any(), name


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (9, 11), (7, 16)], ids="{0[0]}x{0[1]}".format)
@architectures
def test_equals_ldm(architecture, size):
    """LDM's own class, at even sizes and, as the WebUI host amends it, at odd ones."""
    weights = random_weights(SMALL[architecture])
    inputs = random_inputs(SMALL[architecture], *size)
    expected = ldm_forward(ldm_unet(SMALL[architecture], weights), *inputs)
    assert relative_error(load_unet(weights)(*inputs), expected) < 1e-5


@architectures
def test_equals_diffusers(architecture):
    """diffusers' U-Net behind diffusers' own conversion (at sizes that it up-samples in the same way)."""
    weights = random_weights(SMALL[architecture])
    latents, timesteps, context, y = random_inputs(SMALL[architecture], 16, 8)
    reference = diffusers_unet(SMALL[architecture], weights)
    added = {}
    if y is not None:  # diffusers embeds SDXL's six sizes itself
        text, sizes = y[:, :24], torch.rand(len(y), 6) * 1000
        y = torch.cat([text, reference.add_time_proj(sizes.flatten()).reshape(len(y), -1)], dim=1)
        added = {"added_cond_kwargs": {"text_embeds": text, "time_ids": sizes}}
    expected = reference(latents, timesteps, encoder_hidden_states=context, **added).sample
    assert relative_error(load_unet(weights)(latents, timesteps, context, y), expected) < 1e-5


@pytest.mark.parametrize("architecture", ["sd1", "sd2"])
def test_real_shapes_are_ldms(architecture):
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in ldm_unet(REAL[architecture]).state_dict().items()}
    assert unet_shapes(**REAL[architecture]) == expected


@architectures
def test_small_shapes_are_ldms(architecture):
    expected = {name: tuple(value.shape) for name, value in ldm_unet(SMALL[architecture]).state_dict().items()}
    assert unet_shapes(**SMALL[architecture]) == expected


@architectures
def test_state_dict_keeps_the_checkpoints_names(architecture):
    weights = random_weights(SMALL[architecture])
    loaded = load_unet(weights).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("architecture", REAL)
def test_real_architectures_are_recognised(architecture):
    with torch.device("meta"):
        unet = UNet(unet_shapes(**REAL[architecture]))
    config = REAL[architecture]
    assert unet.kind == architecture
    assert (unet.model_channels, unet.context_dim) == (config["model_channels"], config["context_dim"])
    assert (unet.in_channels, unet.out_channels, unet.label_dim) == (4, 4, config.get("adm_in_channels", 0))


@architectures
def test_small_architectures_are_recognised(architecture):
    assert load_unet(random_weights(SMALL[architecture])).kind == architecture.removesuffix("-inpainting")


def test_prefix_of_a_whole_checkpoint_is_found():
    weights = random_weights(SMALL["sd1"])
    whole = random_weights(SMALL["sd1"], prefix="model.diffusion_model.") | {"first_stage_model.x": torch.ones(1)}
    inputs = random_inputs(SMALL["sd1"])
    assert torch.equal(load_unet(whole)(*inputs), load_unet(weights)(*inputs))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
@architectures
def test_half_precision_is_near_single(architecture, dtype, tolerance):
    weights = random_weights(SMALL[architecture])
    inputs = random_inputs(SMALL[architecture])
    unet = load_unet(weights, dtype=dtype)
    result = unet(*inputs)
    assert unet.dtype == dtype
    assert result.dtype == torch.float32, "the result has the dtype of the latents"
    assert relative_error(result, load_unet(weights)(*inputs)) < tolerance  # false for NaN


@architectures
def test_memory_format_does_not_matter(architecture):
    """To 1e-4: torch's GroupNorm is less exact in channels-last, where it subtracts squares of means."""
    weights = random_weights(SMALL[architecture])
    inputs = random_inputs(SMALL[architecture])
    expected = load_unet(weights)(*inputs)
    for weight_format in (torch.channels_last, torch.contiguous_format):
        unet = load_unet(weights).to(memory_format=weight_format)
        assert relative_error(unet(*inputs), expected) < 1e-4
        assert relative_error(unet(inputs[0].to(memory_format=torch.channels_last), *inputs[1:]), expected) < 1e-4


def test_rows_are_independent():
    inputs = random_inputs(SMALL["sdxl"], batch=3)
    unet = load_unet(random_weights(SMALL["sdxl"]))
    alone = torch.cat([unet(*(value[i : i + 1] for value in inputs)) for i in range(3)])
    assert relative_error(unet(*inputs), alone) < 1e-5


def test_loaded_for_inference():
    unet = load_unet(random_weights(SMALL["sd1"]))
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert not unet(*random_inputs(SMALL["sd1"])).requires_grad


def test_can_be_trained_when_asked():
    unet = load_unet(random_weights(SMALL["sdxl"])).train().requires_grad_(True)
    unet(*random_inputs(SMALL["sdxl"])).square().mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("architecture", "y"), [("sd1", torch.ones(3, 4)), ("sdxl", None)])
def test_vector_is_given_where_it_is_due(architecture, y):
    unet = load_unet(random_weights(SMALL[architecture]))
    with pytest.raises(ValueError, match=r"y is (required|not taken) by this sd"):
        unet(*random_inputs(SMALL[architecture])[:3], y)


def _sd1(without="-", **extra):
    """SD1's weights less those whose names start with ``without``; keyword a__b is the shape of tensor a.b."""
    weights = {name: v for name, v in random_weights(SMALL["sd1"]).items() if not name.startswith(without)}
    return weights | {name.replace("__", "."): torch.ones(shape) for name, shape in extra.items()}


def _scale_shift():
    """As in LDM with ``use_scale_shift_norm``: the embedding gives a scale and a shift."""
    return {name: torch.cat([v, v]) if "emb_layers" in name else v for name, v in _sd1().items()}


def _attention_block():
    """As in LDM without spatial transformers: queries, keys and values in one convolution."""
    return _sd1("middle_block.1.", middle_block__1__norm__weight=64, middle_block__1__qkv__weight=(192, 64, 1))


def _only_attention_blocks():
    return {
        name: v for name, v in _attention_block().items() if "transformer_blocks" not in name and "proj" not in name
    }


def _unclip():
    return random_weights(SMALL["sd2"]) | {"label_emb.0.0.weight": torch.ones(256, 96)}


UNKNOWN = {
    "no middle block": (lambda: _sd1("middle_block"), "nothing is named 'middle_block.'"),
    "no time embedding": (lambda: _sd1("time_embed"), "nothing is named 'time_embed.0.weight'"),
    "a missing bias": (lambda: _sd1("out.0.bias"), "1 tensors missing, such as out.0.bias"),
    "a missing skip": (lambda: _sd1("input_blocks.4.0.skip"), "2 tensors missing, such as input_blocks.4.0.skip"),
    "an extra tensor": (lambda: _sd1(extra__weight=2), "1 tensors unexpected, such as extra.weight"),
    "an extra layer": (lambda: _sd1(input_blocks__1__2__gate=2), "input_blocks.1.2. holds gate"),
    "scale-shift norm": (_scale_shift, "wrong shape, such as input_blocks.1.0.emb_layers.1.bias (64,) for (32,)"),
    "attention without text": (_attention_block, "middle_block.1. holds norm, qkv"),
    "no spatial transformers": (_only_attention_blocks, "without spatial transformers"),
    "unCLIP": (_unclip, "a U-Net of unCLIP"),
    "uneven channels": (lambda: _sd1(out__2__weight=(4, 33, 3, 3)), "33"),
    "flat kernels": (lambda: _sd1(middle_block__0__in_layers__2__weight=64), "unknown U-Net architecture"),
    "nothing": (dict, "no Stable Diffusion U-Net in the given state dict: 0 tensors"),
    "random tensors": (lambda: {"b": torch.ones(1), "a": torch.ones(1)}, "2 tensors, such as a, b"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_architecture_is_refused(case):
    make, says = UNKNOWN[case]
    with pytest.raises(CheckpointError) as error:
        load_unet(make())
    message = str(error.value)
    assert says in message
    assert "the given state dict" in message
    assert "\n" not in message
    assert len(message) < 300
