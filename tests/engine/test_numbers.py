"""Values that are no numbers: told with the model's name, and never drawn. Half precision: sums in single."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from lib_fusion.engine.generate import Engine
from lib_fusion.errors import FusionError
from lib_fusion.fusion.lockstep import Lockstep, mean_context
from lib_fusion.fusion.session import AGGREGATOR, FusionSession
from lib_fusion.methods.skipping import LastNoise
from lib_fusion.requests.settings import FusionSettings, GenerationSettings
from tests.engine.test_generate import ANIMALS, ONE, VEHICLES
from tests.fusion.test_lockstep import models, told, trained
from tests.methods.test_afa import inputs, small
from tests.methods.test_skipping import decide

GENERATION = GenerationSettings(("a fox",), width=64, height=64, steps=3)
UNIFORM = replace(ONE, method="AFA", afa_maps="uniform")


@contextmanager
def spoiled(parameter: nn.Parameter, value: float) -> Iterator[None]:
    """One weight is no number."""
    flat = parameter.data.view(-1)
    kept = flat[-1].clone()
    flat[-1] = value
    try:
        yield
    finally:
        flat[-1] = kept


@pytest.fixture(scope="module")
def pair() -> Engine:
    return Engine(ANIMALS, [VEHICLES])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("fusion", [ONE, replace(ONE, method="Average"), UNIFORM], ids=["SNB", "Average", "AFA"])
def test_the_model_that_predicts_no_number_is_named(pair: Engine, fusion: FusionSettings, value: float) -> None:
    for model, named in ((0, r"the base \(animals\)"), (1, r"expert 1 \(expert\)")):
        block = pair.models[model].unet.middle_block[0]
        with (
            spoiled(block.out_layers[3].bias, value),
            pytest.raises(FusionError, match=f"^{named} has predicted infinite values or NaN"),
        ):
            pair.generate(GENERATION, fusion)
    assert pair.generate(GENERATION, fusion).pictures


@pytest.mark.parametrize("broken", [0, 1, 2, AGGREGATOR])
def test_in_lockstep_the_first_to_break_is_named(broken: int) -> None:
    """Though from there on everything that all models are given is broken."""
    unets = models("sd1", 3)
    aggregators = trained(unets[0], 3)
    base_inputs, contexts, vectors = told("sd1", 3)
    lockstep = Lockstep(unets[0], unets[1:], aggregators)
    blocks = [unet.output_blocks[1][0].out_layers[3] for unet in unets]
    weight = aggregators[5].conv_in.bias if broken == AGGREGATOR else blocks[broken].bias
    running = lockstep.running(contexts, mean_context([base_inputs[2], *contexts]), vectors)
    with lockstep.attach(), running, torch.no_grad():
        unets[0](*base_inputs)
        whole = lockstep.totals
        with spoiled(weight, float("nan")):
            unets[0](*base_inputs)
    experts = [{"checkpoint": "first"}, {"checkpoint": "second"}]
    session = FusionSession(FusionSettings.from_dict({"experts": experts, "method": "AFA", "afa_aggregator": "mine"}))
    for totals in whole:
        session.watch((0, 1, 2, AGGREGATOR), totals)
    session.check_finite()
    for totals in lockstep.totals:
        session.watch((0, 1, 2, AGGREGATOR), totals)
    name = {0: "the base", 1: r"expert 1 \(first\)", 2: r"expert 2 \(second\)", AGGREGATOR: "the aggregator mine"}
    with pytest.raises(FusionError, match=f"^{name[broken]} has predicted"):
        session.check_finite()
    session.check_finite()  # told once


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_maps_of_half_precision_are_those_of_single(dtype: torch.dtype) -> None:
    aggregator = small().to(dtype)
    nn.init.normal_(aggregator.conv_out.weight, std=3)
    seen = []
    aggregator.conv_out.register_forward_hook(lambda _, __, output: seen.append(output))
    features, time, context = (value.to(dtype) for value in inputs(2, 3, 6, 5, 7))
    aggregate, maps = aggregator(features, time, context)
    assert aggregate.dtype == maps.dtype == dtype
    assert torch.equal(maps, seen[0].float().softmax(dim=1).to(dtype))


def test_decisions_of_half_precision_latents_are_those_of_single() -> None:
    generator = torch.Generator().manual_seed(0)
    path = [torch.randn(4, 8, 8, generator=generator)]
    for i in range(60):
        path.append(path[-1] * 0.97 + 0.002 * i * torch.randn(4, 8, 8, generator=generator))
    halves = [latent.half() for latent in path]
    assert decide(LastNoise(0.05), halves) == decide(LastNoise(0.05), [x.float() for x in halves])
