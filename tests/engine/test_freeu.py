"""FreeU in the embedded engine: beside diffusers' own, on which models it acts, and its schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lib_fusion.engine.generate import Engine, single
from lib_fusion.errors import SettingError
from lib_fusion.fusion.hooks import attach_freeu
from lib_fusion.methods.freeu import FreeU, Stage
from lib_fusion.requests.settings import ExpertSettings, FusionSettings, GenerationSettings
from lib_fusion.unet.checkpoint import Checkpoint
from lib_fusion.unet.layout import read_layout
from tests.helpers import diffusers_unet

DEMO = Path(__file__).resolve().parents[2] / "demo"
ANIMALS, VEHICLES = DEMO / "animals.safetensors", DEMO / "vehicles.safetensors"
#: The numbers of animals.yaml, in the terms of LDM's constructor.
CONFIG = {"model_channels": 64, "channel_mult": (1, 1, 1), "num_res_blocks": 1, "attention_resolutions": (2,),
          "context_dim": 64}  # fmt: skip
GENERATION = GenerationSettings(("a fox left of a bear, flat drawing",), width=256, height=128, steps=8, cfg_scale=5)
#: The demo's features all have the model's own number of channels, which is stage 3.
STAGE = {"freeu": "Custom", "freeu_b3": 1.3, "freeu_s3": 0.8}
FREEU = FusionSettings.from_dict(STAGE)
PAIR = replace(FREEU, experts=(ExpertSettings("vehicles"),))


class DiffusersUNet:
    """diffusers' U-Net where the engine expects ours."""

    kind, prediction, out_channels = "sd1", "epsilon", 4

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.unet(x, timesteps, context).sample


@pytest.fixture(scope="module")
def pair() -> Iterator[Engine]:
    return Engine(ANIMALS, [VEHICLES])


def pixels(engine: Engine, fusion: FusionSettings, generation: GenerationSettings = GENERATION) -> np.ndarray:
    run = engine.generate(generation, fusion)
    for model in engine.models:
        assert not any(module._forward_pre_hooks for module in model.unet.modules())
    return np.asarray(run.pictures[0].image).astype(int)


def test_pictures_equal_diffusers_own():
    """With diffusers' placement, which goes by its blocks, not by channels: its first two up blocks are its stages."""
    engine = Engine(ANIMALS)
    model = engine.models[0]
    factors = {"b1": 1.3, "b2": 1.2, "s1": 0.4, "s2": 0.7}
    per_block = CONFIG["num_res_blocks"] + 1
    points = [replace(p, stage=i // per_block) for i, p in enumerate(read_layout(model.unet).decoder)]
    ours = FreeU({0: Stage(factors["b1"], factors["s1"]), 1: Stage(factors["b2"], factors["s2"])}, version=1)
    ours.strength = 1.0
    plain = pixels(engine, FusionSettings())
    with attach_freeu(points, ours):
        edited = np.asarray(engine.generate(GENERATION).pictures[0].image).astype(int)

    file = Checkpoint.open(ANIMALS)
    theirs = diffusers_unet(CONFIG, file.read(file.unet_prefix, torch.float32))
    theirs.enable_freeu(**factors)
    engine.models = [replace(model, unet=DiffusersUNet(theirs))]
    expected = np.asarray(engine.generate(GENERATION).pictures[0].image).astype(int)
    assert abs(edited - expected).max() <= 1
    assert abs(edited - plain).max() > 20


def test_neutral_factors_change_no_bit_and_hooks_leave(pair):
    plain = pixels(pair, single(PAIR, 0))
    assert np.array_equal(pixels(pair, replace(FREEU, freeu_b3=1.0, freeu_s3=1.0)), plain)
    assert abs(pixels(pair, FREEU) - plain).max() > 20
    assert np.array_equal(pixels(pair, single(PAIR, 0)), plain)


def test_an_exception_takes_the_hooks_off(pair, monkeypatch):
    def fail(*args: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(pair, "_predict", fail)
    with pytest.raises(RuntimeError, match="stop"):
        pair.generate(GENERATION, PAIR)
    assert not any(m._forward_pre_hooks for model in pair.models for m in model.unet.modules())


def test_which_models_it_acts_on(pair):
    alone = replace(PAIR, snb_window=(0.0, 0.0))
    for outside, own, other in (("base", "base", "experts"), ("expert", "experts", "base")):
        one = replace(alone, snb_outside=outside)
        off = pixels(pair, replace(one, freeu="Off"))
        on = pixels(pair, one)
        assert not np.array_equal(on, off)
        assert np.array_equal(pixels(pair, replace(one, freeu_models=own)), on)
        assert np.array_equal(pixels(pair, replace(one, freeu_models=other)), off)


def test_models_that_share_one_unet_are_told_apart():
    engine = Engine(ANIMALS, [ANIMALS])
    assert engine.models[0].unet is engine.models[1].unet
    average = replace(PAIR, method="Average")
    drawn = [pixels(engine, replace(average, freeu_models=which)) for which in ("all", "base", "experts")]
    assert not np.array_equal(drawn[0], drawn[1])
    assert abs(drawn[1] - drawn[2]).max() <= 1  # the mean of a picture with and one without, either way


@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "DPM++ 2M Karras"])
def test_schedule_acts_in_these_steps_only(pair, sampler, monkeypatch):
    seen = []
    original = FreeU.edit_

    def edit_(self: FreeU, *args: object) -> None:
        seen.append(self.strength)
        original(self, *args)

    monkeypatch.setattr(FreeU, "edit_", edit_)
    generation = replace(GENERATION, sampler=sampler)
    pixels(pair, replace(FREEU, freeu_start=0.25, freeu_stop=5.0, freeu_smooth=0.5), generation)
    blocks = len(seen) // GENERATION.steps
    by_step = seen[::blocks]
    assert by_step == pytest.approx([0, 0.25, 1, 0.5 + 1 / 3, 0.5 + 1 / 6, 0, 0, 0])


@pytest.mark.parametrize(
    ("values", "field"),
    [({"freeu": "Auto"}, "freeu"), ({**STAGE, "freeu_start": 6, "freeu_stop": 0.5}, "freeu_stop")],
)
def test_refused(pair, values, field):
    with pytest.raises(SettingError) as caught:
        pair.generate(GENERATION, FusionSettings.from_dict(values))
    assert caught.value.field == field
