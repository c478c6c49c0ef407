"""A step on a device, in every dtype: the CPU's result, no wait for the device, and no dtype that it should not see."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from lib_fusion.fusion.hooks import attach_freeu
from lib_fusion.fusion.level import Level
from lib_fusion.fusion.lockstep import Lockstep, mean_context
from lib_fusion.fusion.records import AfaWatch, Keep, Records
from lib_fusion.fusion.rows import Rows, put, take
from lib_fusion.fusion.session import FusionSession
from lib_fusion.fusion.step import Step
from lib_fusion.methods.freeu import FreeU, Stage
from lib_fusion.unet.layout import read_layout
from tests.fusion.test_lockstep import models, told, trained
from tests.fusion.test_step import SIZE, Models, session

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
HALF = {"place": "0,0,0.5,1"}
WAYS: dict[str, dict[str, Any]] = {
    "SNB": {},
    "SNB of three": {"experts": 2},
    "SNB, code's saliency": {"snb_saliency": "code"},
    "held": {"snb_hold": 900},
    "held, used late": {"snb_hold": 900, "snb_from": 700},
    "divergence": {"snb_saliency": "divergence"},
    "divergence of three": {"snb_saliency": "divergence", "experts": 2, "snb_hold": 900},
    "Average": {"method": "Average"},
    "half the weight": {"own": {"weight": 0.5}},
    "an expert's window": {"own": {"window": [1000, 600]}, "experts": 2},
    "a place": {"own": HALF},
    "a soft place": {"own": HALF, "place_strength": 0.5, "experts": 2},
    "guidance ends": {"guidance": "always", "guidance_until": 700, "guidance_after": 1},
}
LEVELS = [Level(t, 0.001 + (1 - t / 1000) ** 2 * 0.99, i) for i, t in enumerate(range(981, 0, -140))]


def run_step(s: FusionSession, level: Level, rows: Rows, splits: list[int], outputs: Models) -> torch.Tensor:
    """The rows (R,C,H,W) of one step whose U-Net calls have so many rows each."""
    x = torch.zeros_like(outputs.outputs[0])
    latents = None if s.skips is None else list(x[: rows.num_pictures])
    step, start = Step(s, level, rows, latents), 0
    for n in splits:
        step.run(range(start, start + n), x[start : start + n], outputs)
        start += n
    step.observe()
    fused = step.fuse()
    return step.output() if fused is None else fused


def noises(rows: Rows, count: int, device: str, dtype: torch.dtype) -> list[Models]:
    """Models for each level, with other outputs at each."""
    generator = torch.Generator().manual_seed(1)
    made = [{i: torch.randn(rows.num_all, 4, *SIZE, generator=generator) for i in range(count)} for _ in LEVELS]
    return [Models({i: value.to(device, dtype) for i, value in values.items()}) for values in made]


class SlicingModels(Models):
    """As a host takes its rows: without a list on the device."""

    def __call__(self, models: Any, rows: Any, _box: Any = None) -> torch.Tensor:
        self.calls.append((tuple(models), list(rows)))
        return take(self.outputs[models[0]], list(rows)).clone()


def run_pass(values: dict, device: str, dtype: torch.dtype, weights: list, splits: list[int], cuda: ModuleType):
    """The fused rows of each step, and what was recorded in the steps after the third."""
    s = session(**values)
    s.begin([level.timestep for level in LEVELS] + [0.0])
    rows = Rows(weights)
    results, steps = [], noises(rows, s.num_models, device, dtype)
    for level, outputs in zip(LEVELS[:3], steps):
        results.append(run_step(s, level, rows, splits, SlicingModels(outputs.outputs)))
    with cuda.recording() as found:
        for level, outputs in zip(LEVELS[3:], steps[3:]):
            results.append(run_step(s, level, rows, splits, SlicingModels(outputs.outputs)))
    with cuda.recording() as end:
        s.check_finite()
    assert end.num_waits <= 1
    return results, found


@dtypes
@pytest.mark.parametrize("name", WAYS)
def test_a_step_waits_for_nothing_and_is_the_cpus(cuda: ModuleType, name: str, dtype: torch.dtype) -> None:
    """With two pictures whose prompts have two parts, and the halves in calls of their own."""
    weights, splits = [[1.0, 0.5], [1.0, 0.5]], [4, 2]
    results, found = run_pass(WAYS[name], "cuda", dtype, weights, splits, cuda)
    reads_mask = name == "held, used late"  # which models are in the held mask, once a pass, here after the third step
    assert found.num_waits == reads_mask
    assert found.of("wide", "mixed") == []
    expected, _ = run_pass(WAYS[name], "cpu", dtype, weights, splits, cuda)
    for value, wanted in zip(results, expected):
        assert value.device.type == "cuda"
        assert torch.equal(value.cpu(), wanted)


@dtypes
@pytest.mark.parametrize("pictures", [1, 4])
@pytest.mark.parametrize("skipping", ["Forecast", "Paper"])
def test_skipping_waits_once_a_step_whatever_the_batch(
    cuda: ModuleType, skipping: str, pictures: int, dtype: torch.dtype
) -> None:
    """Its decisions of all models and pictures and the check for NaN are read together."""
    values = {"skipping": skipping, "skip_tolerance": 0.9, "skip_threshold": 0.9, "skip_max": 2}
    weights, splits = [[1.0]] * pictures, [2 * pictures]
    results, found = run_pass(values, "cuda", dtype, weights, splits, cuda)
    assert 0 < found.num_waits <= len(LEVELS) - 3
    assert found.of("wide", "mixed") == []
    expected, _ = run_pass(values, "cpu", dtype, weights, splits, cuda)
    for value, wanted in zip(results, expected):
        assert torch.equal(value.cpu(), wanted)


def test_the_record_of_masks_is_read_at_the_end(cuda: ModuleType) -> None:
    s = session(snb_hold=900)
    rows = Rows.plain(2)
    for level, outputs in zip(LEVELS, noises(rows, 2, "cuda", torch.float32)):
        run_step(s, level, rows, [4], SlicingModels(outputs.outputs))
    masks = s.records.of(1).masks
    assert len(masks) == len(LEVELS)
    assert all(mask.device.type == "cpu" and mask.dtype == torch.int64 for _, mask in masks)


@dtypes
def test_lockstep_waits_for_nothing_also_with_previews(cuda: ModuleType, dtype: torch.dtype) -> None:
    unets = [unet.to("cuda", dtype) for unet in models("sdxl", 2)]
    aggregators = trained(unets[0], 2).to("cuda", dtype)
    inputs, contexts, vectors = told("sdxl", 2)
    inputs = [value.cuda() for value in inputs]
    contexts, vectors = ([value.to("cuda", dtype) for value in values] for values in (contexts, vectors))
    records = Records()
    lockstep = Lockstep(unets[0], unets[1:], aggregators)
    watch = AfaWatch(records, Keep.read(["weights", "maps"]), [str(i) for i in range(len(aggregators))])
    lockstep.on_maps = watch.take
    s = session(method="AFA", afa_maps="uniform")
    s.lockstep = lockstep
    with lockstep.attach(), torch.no_grad(), cuda.recording() as found:
        watch.begin(900, [0, 1, 1])
        with lockstep.running(contexts, mean_context([inputs[2].to(dtype), *contexts]), vectors):
            output = unets[0](*inputs)
        s.watch_lockstep((0, 1))
    assert output.isfinite().all()
    assert found.waits() == []
    assert found.of("wide", "mixed") == []
    assert records.of(1).weights[0][1].device.type == "cpu"
    assert records.of(0).maps[0][1]


@dtypes
@pytest.mark.parametrize("version", [1, 2])
def test_freeu_waits_for_nothing_once_its_waves_are_made(cuda: ModuleType, version: int, dtype: torch.dtype) -> None:
    unet = models("sd1", 1)[0].to("cuda", dtype)
    x, t, context, _ = (None if value is None else value.cuda() for value in told("sd1", 1)[0])
    freeu = FreeU({4: Stage(1.3, 0.9), 2: Stage(1.4, 0.2, cutoff=0.5), 1: Stage(0.8, 1.1, 0.7, 0.6)}, version)
    freeu.strength = 1.0
    with attach_freeu(read_layout(unet).decoder, freeu), torch.no_grad():
        unet(x, t, context)
        with cuda.recording() as found:
            output = unet(x, t, context)
    assert output.isfinite().all()
    assert freeu.has_acted
    assert found.waits() == []
    assert found.of("wide") == []


@pytest.mark.parametrize("rows", [[0], [2, 3], [0, 2, 3, 7], [3, 1, 2], [5, 5, 5], [], [7, 0]], ids=str)
def test_rows_are_taken_and_put_as_by_a_list(rows: list[int]) -> None:
    values = torch.randn(8, 2, 3)
    assert torch.equal(take(values, rows), values[rows])
    target, new = values.clone(), torch.randn(len(rows), 2, 3)
    put(target, rows, new)
    expected = values.clone()
    for row, value in zip(rows, new):
        expected[row] = value
    assert torch.equal(target, expected)
