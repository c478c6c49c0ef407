"""The memory in docs/measurements/costs.md is what a device counts: benchmarks/memory.py against stand-in and torch."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks import memory
from lib_fusion.requests.settings import PLACES
from lib_fusion.unet.config import unet_shapes
from tests.helpers import REAL, SMALL

DOCS = Path(__file__).parents[1] / "docs/measurements/costs.md"


def in_fp8(module: nn.Module) -> nn.Module:
    """As the host stores it (its setting "FP8 weight")."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(torch.float8_e4m3fn)
    return module


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("fp8", [False, True])
def test_weights_take_what_the_device_counts(cuda, kind, fp8):
    unet = memory.empty_unet(SMALL[kind])
    before = cuda.memory()[0]
    unet = (in_fp8(unet) if fp8 else unet).to_empty(device="cuda")
    assert cuda.memory()[0] - before == memory.unet_bytes(unet_shapes(**SMALL[kind]), fp8)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_step_takes_what_the_device_counts(cuda, kind):
    expected = memory.step_bytes(memory.empty_unet(SMALL[kind]), 256)
    unet = memory.empty_unet(SMALL[kind]).to_empty(device="cuda")
    for value in unet.parameters():
        nn.init.zeros_(value)
    cuda.reset_peak()
    before = cuda.memory()[0]
    with mock.patch.object(F, "scaled_dot_product_attention", memory.attend):
        memory.step_bytes(unet, 256)
    assert cuda.memory()[1] - before == pytest.approx(expected, rel=0.05)


def test_text_encoders_have_the_numbers_of_their_classes():
    with torch.device("meta"):
        small = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
        large = CLIPTextModelWithProjection(CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            projection_dim=1280))  # fmt: skip
    assert memory.text_bytes((memory.CLIP_L,), fp8=False) == 2 * sum(p.numel() for p in small.parameters())
    assert memory.text_bytes((memory.BIG_G,), fp8=False) == 2 * sum(p.numel() for p in large.parameters())
    assert memory.text_bytes((memory.CLIP_L,), fp8=True) == memory.bytes_of(in_fp8(small.half()))


def test_the_largest_block_is_a_block():
    for fp8 in (False, True):
        unet = memory.empty_unet(REAL["sdxl"])
        unet = in_fp8(unet) if fp8 else unet
        blocks = [b for child in unet.children() for b in (child if isinstance(child, nn.ModuleList) else [child])]
        found = memory.largest_block(unet_shapes(**REAL["sdxl"]), fp8)
        assert found == max(memory.bytes_of(block) for block in blocks)


def test_needs_add_up():
    needs = memory.Needs(unet=100, block=10, text=20, vae=5, step=7, decode=50)
    assert [needs.sampling(2, place) for place in PLACES] == [125 + 240 + 7, 125 + 200 + 7, 125 + 10 + 7]
    assert [needs.sampling(2, place, medvram=True) for place in PLACES] == [307, 307, 117]
    assert {needs.sampling(0, place) for place in PLACES} == {132}
    assert (needs.decoding(), needs.decoding(medvram=True)) == (175, 55)


def test_the_documentation_has_the_tables_of_today():
    text = DOCS.read_text("utf-8")
    for table in "\n".join(memory.report()).split("\n\n"):
        assert table in text
