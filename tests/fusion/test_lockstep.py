"""U-Nets in lockstep: the hooks compute what an explicit lockstep forward computes, and copies of one model are it."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib_fusion.errors import FusionError
from lib_fusion.fusion.lockstep import Lockstep, mean_context, sizes_for
from lib_fusion.methods.afa import FixedAggregator, one_hot, uniform
from lib_fusion.methods.layers import timestep_embedding
from lib_fusion.unet.model import load_unet
from tests.helpers import SMALL, ldm_forward, ldm_unet, random_inputs, random_weights, relative_error
from tests.methods.test_afa import randomize

ARCHITECTURES = ("sd1", "sd2", "sdxl")
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def models(architecture: str, count: int, same: bool = False) -> list[nn.Module]:
    return [load_unet(random_weights(SMALL[architecture], 0 if same else i)) for i in range(count)]


def trained(unet: nn.Module, count: int) -> nn.ModuleList:
    return randomize(sizes_for(unet, count, hidden=16, layers=1, heads=2).make()).requires_grad_(False)


def told(architecture: str, count: int) -> tuple[tuple, list[torch.Tensor], list[torch.Tensor | None]]:
    """The base's inputs, and each expert's own text states and vector."""
    inputs = random_inputs(SMALL[architecture])
    others = [random_inputs(SMALL[architecture], seed=5 + i) for i in range(count - 1)]
    return inputs, [other[2] for other in others], [other[3] for other in others]


def run(unets, aggregators, inputs, contexts, vectors, forward=None, **options) -> torch.Tensor:
    lockstep = Lockstep(unets[0], unets[1:], aggregators, **options)
    running = lockstep.running(contexts, mean_context([inputs[2], *contexts]), vectors)
    with lockstep.attach(), running, torch.no_grad():
        return (forward or unets[0])(*inputs)


def explicit(unets, aggregators, inputs, contexts, vectors) -> torch.Tensor:
    """AFA's forward written out: layer by layer, every model on the same aggregated input."""
    x, t, context, y = inputs
    contexts, vectors = [context, *contexts], [y, *vectors]
    embeddings = []
    for unet, vector in zip(unets, vectors):
        embedding = unet.time_embed(timestep_embedding(t, unet.model_channels))
        embeddings.append(embedding if vector is None else embedding + unet.label_emb(vector))
    mean_time, mean_text = torch.stack(embeddings).mean(0), torch.stack(contexts).mean(0)
    points = iter(aggregators)

    def aggregate(outputs):
        return next(points)(torch.stack(outputs, dim=1), mean_time, mean_text)[0]

    def step(blocks, h):
        return [block(h, e, c) for block, e, c in zip(blocks, embeddings, contexts)]

    h, skips = x, []
    for blocks in zip(*(unet.input_blocks for unet in unets)):
        h = aggregate(step(blocks, h))
        skips.append(h)
    h = aggregate(step([unet.middle_block for unet in unets], h))
    for i, blocks in enumerate(zip(*(unet.output_blocks for unet in unets))):
        skip = skips.pop()
        if h.shape[-2:] != skip.shape[-2:]:
            h = F.interpolate(h, skip.shape[-2:])
        outputs = step(blocks, torch.cat([h, skip], dim=1))
        if i < len(unets[0].output_blocks) - 1:
            h = aggregate(outputs)
    return aggregate([unet.out(h) for unet, h in zip(unets, outputs)])


@pytest.mark.parametrize("count", [2, 3])
@architectures
def test_equals_an_explicit_lockstep_forward(architecture, count):
    unets = models(architecture, count)
    aggregators = trained(unets[0], count)
    arguments = told(architecture, count)
    with torch.no_grad():
        expected = explicit(unets, aggregators, *arguments)
    got = run(unets, aggregators, *arguments)
    assert relative_error(got, expected) < 1e-5
    assert (got - unets[0](*arguments[0])).abs().max() > 0.1


@architectures
def test_copies_of_one_model_are_that_model_whatever_the_weights(architecture):
    unets = models(architecture, 3, same=True)
    (x, t, context, y), _, _ = told(architecture, 3)
    alone = unets[0](x, t, context, y)
    for seed in range(3):
        aggregators = randomize(trained(unets[0], 3), seed)
        got = run(unets, aggregators, (x, t, context, y), [context] * 2, [y] * 2)
        assert relative_error(got, alone) < 1e-5


@architectures
def test_an_expert_on_the_bases_own_modules_is_that_expert(architecture):
    """Every part of it, and no other one, is the expert's in its calls: with parameters of its own there meanwhile."""
    unets = models(architecture, 2)
    aggregators, arguments = trained(unets[0], 2), told(architecture, 2)
    expected = run(unets, aggregators, *arguments)
    paths = {module: path for path, module in unets[0].named_modules()}

    @contextmanager
    def wearing(part):
        own, theirs = [dict(m.named_modules()) for m in (part, unets[1].get_submodule(paths[part]))]
        before = {path: dict(module._parameters) for path, module in own.items()}
        for path, module in own.items():
            module._parameters.update(theirs[path]._parameters)
        yield
        for path, module in own.items():
            module._parameters.update(before[path])

    got = run([unets[0], unets[0]], aggregators, *arguments, wearing=[wearing])
    assert torch.equal(got, expected)


@architectures
def test_untrained_aggregators_are_the_uniform_average(architecture):
    unets = models(architecture, 3)
    arguments = told(architecture, 3)
    zero = sizes_for(unets[0], 3, hidden=16, layers=1, heads=2).make().requires_grad_(False)
    assert relative_error(run(unets, zero, *arguments), run(unets, uniform(3), *arguments)) < 1e-5


@architectures
def test_one_hot_is_that_model_bit_for_bit(architecture):
    unets = models(architecture, 3)
    inputs, contexts, vectors = told(architecture, 3)
    for i in range(3):
        own = (*inputs[:2], [inputs[2], *contexts][i], [inputs[3], *vectors][i])
        assert torch.equal(run(unets, one_hot(3, i), inputs, contexts, vectors), unets[i](*own))


@pytest.mark.parametrize("size", [(9, 11), (7, 16)], ids=str)
def test_odd_sizes(size):
    unets = models("sd1", 2)
    inputs = random_inputs(SMALL["sd1"], *size)
    aggregators = trained(unets[0], 2)
    with torch.no_grad():
        expected = explicit(unets, aggregators, inputs, [inputs[2]], [None])
    assert relative_error(run(unets, aggregators, inputs, [inputs[2]], [None]), expected) < 1e-5


@pytest.mark.parametrize("architecture", ["sd1", "sd2"])
def test_hooks_on_ldms_own_class(architecture):
    """The class that the WebUI runs."""
    weights = [random_weights(SMALL[architecture], i) for i in range(2)]
    theirs = [ldm_unet(SMALL[architecture], w) for w in weights]
    ours = [load_unet(w) for w in weights]
    aggregators = trained(ours[0], 2)
    arguments = told(architecture, 2)
    got = run(theirs, aggregators, *arguments, forward=lambda *a: ldm_forward(theirs[0], *a))
    assert relative_error(got, run(ours, aggregators, *arguments)) < 1e-5


def test_what_a_forward_adds_between_blocks_reaches_the_aggregate_once():
    """As ControlNet does: residuals on skips and on the middle's output, by a forward of its own."""
    unets = models("sd1", 2)
    aggregators = trained(unets[0], 2)
    inputs, contexts, vectors = told("sd1", 2)
    generator = torch.Generator().manual_seed(9)

    def controlled(blocks_of, finish):
        x, t, context, _ = inputs
        embedding = unets[0].time_embed(timestep_embedding(t, unets[0].model_channels))
        generator.manual_seed(9)
        h, skips = x, []
        for i in range(12):
            h = blocks_of(f"input_blocks.{i}", h, embedding, context)
            skips.append(h + torch.randn(h.shape, generator=generator))
        h = blocks_of("middle_block", h, embedding, context)
        h = h + torch.randn(h.shape, generator=generator)
        for i in range(12):
            h = blocks_of(f"output_blocks.{i}", torch.cat([h, skips.pop()], dim=1), embedding, context)
        return finish(h)

    base = unets[0]

    def by_hooks(*_):
        return controlled(lambda name, *args: base.get_submodule(name)(*args), base.out)

    base.forward = lambda *args: by_hooks(*args)
    got = run(unets, aggregators, inputs, contexts, vectors)
    del base.forward

    embeddings = [u.time_embed(timestep_embedding(inputs[1], u.model_channels)) for u in unets]
    told_text = [inputs[2], *contexts]
    means = torch.stack(embeddings).mean(0), torch.stack(told_text).mean(0)
    index, kept = 0, []

    def explicit_block(name, h, *_):
        nonlocal index, kept
        outputs = [u.get_submodule(name)(h, e, c) for u, e, c in zip(unets, embeddings, told_text)]
        if name == "output_blocks.11":
            kept = outputs
            return outputs[0]
        index += 1
        return aggregators[index - 1](torch.stack(outputs, 1), *means)[0]

    def finish(_):
        return aggregators[24](torch.stack([u.out(h) for u, h in zip(unets, kept)], 1), *means)[0]

    with torch.no_grad():
        expected = controlled(explicit_block, finish)
    assert relative_error(got, expected) < 1e-5


def test_an_expert_may_be_the_base_itself_with_another_text():
    unet = models("sd1", 1)[0]
    copy = load_unet(random_weights(SMALL["sd1"]))
    aggregators = trained(unet, 2)
    inputs, contexts, _ = told("sd1", 2)
    got = run([unet, unet], aggregators, inputs, contexts, [None])
    assert torch.equal(got, run([unet, copy], aggregators, inputs, contexts, [None]))
    assert not torch.equal(got, unet(*inputs))


def test_texts_of_other_lengths_reach_each_model_as_they_are():
    unets = models("sd1", 2)
    inputs, _, _ = told("sd1", 2)
    longer = torch.randn(3, 14, SMALL["sd1"]["context_dim"])
    lockstep = Lockstep(unets[0], unets[1:], one_hot(2, 1))
    hooks = lockstep.attach()
    with lockstep.running([longer], longer):
        got = unets[0](*inputs)
    hooks.remove()
    assert torch.equal(got, unets[1](*inputs[:2], longer))


def hooks_on(unet: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def test_attached_but_not_running_changes_nothing_and_everything_comes_off():
    unets = models("sd1", 2)
    inputs, _, _ = told("sd1", 2)
    alone = unets[0](*inputs)
    lockstep = Lockstep(unets[0], unets[1:], uniform(2))
    hooks = lockstep.attach()
    assert hooks_on(unets[0]) > 0
    assert torch.equal(unets[0](*inputs), alone)
    with pytest.raises(RuntimeError), lockstep.running([torch.zeros(1, 1, 1)], inputs[2]):
        unets[0](*inputs)
    assert torch.equal(unets[0](*inputs), alone)
    hooks.remove()
    assert hooks_on(unets[0]) == hooks_on(unets[1]) == 0


def test_maps_are_shown():
    unets = models("sd1", 2)
    arguments = told("sd1", 2)
    seen = {}
    run(unets, trained(unets[0], 2), *arguments, on_maps=lambda index, maps: seen.update({index: maps}))
    assert sorted(seen) == list(range(25))
    assert all(maps.shape[:2] == (3, 2) for maps in seen.values())


def test_models_of_other_widths_are_refused():
    sd1 = models("sd1", 1)[0]
    sdxl = models("sdxl", 1)[0]
    with pytest.raises(FusionError, match="other blocks"):
        Lockstep(sd1, [sdxl], uniform(2))
    with pytest.raises(FusionError, match="19 aggregators for a U-Net of 25"):
        Lockstep(sd1, [sd1], trained(sdxl, 2))


def test_gradients_reach_the_aggregators_alone():
    unets = models("sd1", 2)
    aggregators = sizes_for(unets[0], 2, hidden=16, layers=1, heads=2).make()
    randomize(aggregators)
    inputs, contexts, vectors = random_inputs(SMALL["sd1"], 16, 16), [random_inputs(SMALL["sd1"], seed=5)[2]], [None]
    lockstep = Lockstep(unets[0], unets[1:], aggregators)
    hooks = lockstep.attach()
    with lockstep.running(contexts, mean_context([inputs[2], *contexts]), vectors):
        unets[0](*inputs).square().mean().backward()
    hooks.remove()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in aggregators.parameters())
    assert all(p.grad is None for unet in unets for p in unet.parameters())


def test_fixed_weights_have_no_state():
    assert FixedAggregator([0.5, 0.5]).state_dict() == {}


def test_a_forward_that_walks_the_layers_itself_is_refused() -> None:
    """As extensions do that cache features: hooks on blocks never run, and the picture would be the base's."""
    unets = models("sd1", 2)
    inputs, contexts, vectors = told("sd1", 2)
    hooked = {id(block) for part in ("input_blocks", "output_blocks") for block in getattr(unets[0], part)}

    def walk(x, timesteps, context, y=None):
        """The blocks' layers one by one, the last projection as a module."""
        calls = {}
        for module in unets[0].modules():
            if id(module) in hooked or module is unets[0].middle_block:
                calls[module] = (module._forward_hooks, module._forward_pre_hooks)
                module._forward_hooks, module._forward_pre_hooks = {}, {}
        try:
            return unets[0](x, timesteps, context, y)
        finally:
            for module, (after, before) in calls.items():
                module._forward_hooks, module._forward_pre_hooks = after, before

    with pytest.raises(FusionError, match="AFA could not act: another extension"):
        run(unets, trained(unets[0], 2), inputs, contexts, vectors, forward=walk)


def test_rows_that_are_not_the_prompts_are_refused() -> None:
    """As extensions do that cut a picture into tiles inside the model's call: their prompts are not known."""
    unets = models("sd1", 2)
    inputs, contexts, vectors = told("sd1", 2)

    def tiled(x, timesteps, context, y=None):
        return unets[0](x.repeat(2, 1, 1, 1), timesteps.repeat(2), context.repeat(2, 1, 1))

    with pytest.raises(FusionError, match=r"AFA could not act: .* such as tiles .6 in a call for 3.; switch that or"):
        run(unets, trained(unets[0], 2), inputs, contexts, vectors, forward=tiled)
