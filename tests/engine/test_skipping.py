"""Skipping in the embedded engine, and the benchmarks that measure it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import skip as bench_skip
from benchmarks import skip_path as bench_path
from benchmarks.measures import psnr, ssim
from lib_fusion.engine.corrections import CorrectedSampler
from lib_fusion.engine.generate import Engine
from lib_fusion.engine.samplers import adds_noise, make_scheduler
from lib_fusion.fusion.level import Level
from lib_fusion.fusion.policies import COMPUTED, SKIPPED, Correction
from lib_fusion.fusion.rows import Rows
from lib_fusion.fusion.session import FusionSession
from lib_fusion.fusion.step import Step
from lib_fusion.requests.settings import (
    GENERATION_PARAMETERS,
    SKIP_PRESETS,
    ExpertSettings,
    FusionSettings,
    GenerationSettings,
)
from tests.helpers import PLAIN, official_skips

DEMO = Path(__file__).resolve().parents[2] / "demo"
SAMPLERS = next(row.choices for row in GENERATION_PARAMETERS if row.key == "sampler")
PROMPTS = ("a fox, flat drawing", "a bus, glossy render", "a pizza, flat drawing")
GENERATION = GenerationSettings(PROMPTS, width=128, height=128, steps=16, cfg_scale=5)
ON = FusionSettings(skipping="Forecast", **PLAIN)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(DEMO / "general.safetensors", [DEMO / "animals.safetensors"])


def draw(engine: Engine, fusion: FusionSettings, generation: GenerationSettings = GENERATION, only=None):
    """(latents, session) of the prompts, or of one of them."""
    jobs = [(prompt, seed) for seed, prompt in enumerate(generation.prompts)]
    session = FusionSession(fusion)
    return engine.denoise(jobs if only is None else [jobs[only]], generation, session), session


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_tolerance_it_is_off_bit_for_bit(engine, sampler):
    generation = replace(GENERATION, sampler=sampler, steps=9)
    off, _ = draw(engine, FusionSettings(), generation)
    paper = FusionSettings(skipping="Paper", skip_threshold=0.0)
    for fusion in (replace(ON, skip_tolerance=0.0), replace(ON, skip_warmup=1000), paper):
        assert torch.equal(draw(engine, fusion, generation)[0], off)


def run_official(engine: Engine, generation: GenerationSettings, threshold: float) -> tuple[str, torch.Tensor]:
    """AdaptiveDiffusion's sampling loop for one picture on diffusers' scheduler: its path and its final latents."""
    scheduler, unet = make_scheduler(generation.sampler, generation.steps), engine.models[0].unet
    context = engine.models[0].text([generation.prompts[0], ""])
    generator = torch.Generator().manual_seed(generation.seed)
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    more = {"generator": generator} if adds_noise(generation.sampler) else {}
    x, seen, path, kept = noise * scheduler.init_noise_sigma, [], "", None
    for t in scheduler.timesteps:
        reuses = bool(seen) and official_skips(seen, threshold, 4)[-1]
        if not reuses:
            inputs = scheduler.scale_model_input(torch.cat([x, x]), t)
            kept = unet(inputs, t.float().expand(2), context)
        cond, uncond = kept.chunk(2)
        x = scheduler.step(uncond + generation.cfg_scale * (cond - uncond), t, x, **more).prev_sample
        seen.append(x)
        path += SKIPPED if reuses else COMPUTED
    return path, x


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_the_papers_policy_is_the_official_one_decision_for_decision(engine, sampler):
    skipped = 0
    for seed, prompt in enumerate(PROMPTS[:2]):
        for steps, threshold in ((16, 0.05), (40, 0.01)):
            generation = replace(GENERATION, prompts=(prompt,), sampler=sampler, steps=steps, seed=seed)
            path, expected = run_official(engine, generation, threshold)
            session = FusionSession(FusionSettings(skipping="Paper", skip_threshold=threshold))
            latents = engine.denoise([(prompt, seed)], generation, session)
            assert session.skips.paths == {0: [path]}
            assert torch.equal(latents, expected)
            skipped += path.count(SKIPPED)
    assert skipped > 15 or adds_noise(sampler)  # whose latents go to and fro


@pytest.mark.parametrize("policy", ["Forecast", "Paper"])
def test_rows_are_those_that_the_unet_is_run_on(engine, policy):
    seen = []
    unet = engine.models[0].unet
    handle = unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        _, session = draw(engine, FusionSettings(skipping=policy, skip_threshold=0.05), replace(GENERATION, steps=24))
    finally:
        handle.remove()
    assert session.rows == [sum(seen)]
    assert session.calls == [len(seen)]
    record = session.skips.record()
    assert sum(seen) == 2 * sum(record["computed"][0])
    assert session.skipped_rows == [2 * sum(record["skipped"][0])]
    assert sum(record["skipped"][0]) > 0
    for path in record["paths"][0]:
        assert len(path) == 24
        assert path.startswith(4 * COMPUTED)
        assert policy == "Paper" or (path.endswith(COMPUTED) and 2 * SKIPPED not in path)
    assert len({*record["paths"][0]}) > 1  # each picture has a path of its own
    json.dumps(record)


def test_a_picture_does_not_depend_on_its_neighbours(engine):
    fusion = replace(ON, experts=(ExpertSettings("animals"),))
    among, together = draw(engine, fusion)
    for i in range(len(PROMPTS)):
        alone, session = draw(engine, fusion, only=i)
        assert {m: p[0] for m, p in session.skips.paths.items()} == {m: p[i] for m, p in together.skips.paths.items()}
        torch.testing.assert_close(alone[0], among[i], rtol=1e-3, atol=2e-3)


def test_each_model_of_a_fusion_has_its_own_path(engine):
    _, session = draw(engine, replace(ON, experts=(ExpertSettings("animals"),)), replace(GENERATION, steps=30))
    paths = session.skips.paths
    assert set(paths) == {0, 1}
    assert paths[0] != paths[1]
    assert all(rows < 30 * 6 for rows in session.rows)


def test_a_model_outside_its_window_is_neither_run_nor_forecast(engine):
    steps = make_scheduler("DDIM", 16).timesteps.tolist()
    fusion = replace(ON, experts=(ExpertSettings("animals"),), snb_window=(1000.0, steps[10]))
    _, session = draw(engine, fusion)
    assert {len(path) for path in session.skips.paths[1]} == {10}
    assert {len(path) for path in session.skips.paths[0]} == {16}


@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if not adds_noise(sampler)])
@pytest.mark.parametrize("runs", [{7: [6]}, {6: [4, 5], 9: [8]}])
def test_correction_is_the_sampler_with_the_right_noises(sampler, runs):
    generator = torch.Generator().manual_seed(0)
    steps, start = 12, torch.randn(2, 4, 3, 3, generator=generator)
    right = [torch.randn(2, 2, 4, 3, 3, generator=generator) for _ in range(steps)]
    changes = {i: torch.randn(2, 4, 3, 3, generator=generator) for found in runs.values() for i in found}

    def level_of(i: int) -> Level:
        return Level(500.0, 0.05 * (i + 1))

    def sample(noises: list[torch.Tensor], corrects: bool) -> torch.Tensor:
        scheduler = make_scheduler(sampler, steps)
        session = FusionSession(replace(ON, skip_max=2), guidance_scale=5.0)
        taken = CorrectedSampler(scheduler, session)
        x = start * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            taken.scheduler.scale_model_input(x, t)
            step = Step(session, level_of(i), Rows.plain(2), None)
            step.run(range(4), x, lambda _models, _rows, _box, i=i: torch.cat([*noises[i].unbind(1)]))
            found = runs.get(i, []) if corrects else []
            x = taken.correct([Correction(0, 1, level_of(j).log_sigma, changes[j]) for j in found], x)
            x = taken.take(step, t, x)
        return x

    used = [noise.clone() for noise in right]
    for i, change in changes.items():
        used[i][1] -= change
    expected, corrected, wrong = sample(right, False), sample(used, True), sample(used, False)
    torch.testing.assert_close(corrected, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(corrected[0], expected[0])
    assert not torch.allclose(wrong[1], expected[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sampler", ["DDIM", "Euler Karras", "DPM++ 2M Karras"])
def test_it_beats_fewer_steps_at_no_more_rows(engine, sampler):
    generation = replace(GENERATION, sampler=sampler, steps=30, cfg_scale=7)
    full, _ = draw(engine, FusionSettings(), generation)
    near, session = draw(engine, ON, generation)
    steps = -(-session.rows[0] // (2 * len(PROMPTS)))  # as many calls, rounded up
    assert steps <= 0.8 * 30
    fewer, _ = draw(engine, FusionSettings(), replace(generation, steps=steps))
    assert (near - full).norm() < 0.7 * (fewer - full).norm()


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M SDE Karras"])
def test_samplers_that_add_noise_skip_and_keep_the_picture(engine, sampler):
    """Each picture has its own noise, so that it depends on nobody; forecast by its noise it would be another one."""
    generation = replace(GENERATION, sampler=sampler, steps=30, cfg_scale=7)
    full, _ = draw(engine, FusionSettings(), generation)
    balanced = replace(ON, **SKIP_PRESETS["Balanced"])
    near, session = draw(engine, balanced, generation)
    assert session.rows[0] < 0.85 * 2 * len(PROMPTS) * 30
    assert (near - full).norm() < 0.05 * full.norm()
    alone, single = draw(engine, balanced, generation, only=1)
    assert single.skips.paths[0][0] == session.skips.paths[0][1]
    torch.testing.assert_close(alone[0], near[1], rtol=1e-3, atol=5e-3)


def test_run_record(engine):
    run = engine.generate(replace(GENERATION, batch_size=2), replace(ON, experts=(ExpertSettings("animals"),)))
    record = json.loads(json.dumps(run.record))["skips"]
    assert set(record) == {"computed", "skipped", "paths", "errors"}
    assert len(record["paths"]["0"]) == len(record["paths"]["1"]) == len(PROMPTS)
    assert run.record["unet_rows"] == [2 * sum(record["computed"][m]) for m in "01"]
    assert "skips" not in engine.generate(replace(GENERATION, prompts=("x",), steps=2)).record


def test_measures():
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    b = a.copy()
    b[1, 0, 0, 0] ^= 128
    assert psnr(a, b) == pytest.approx([10 * np.log10(255**2 * 3072), 10 * np.log10(255**2 * 3072 / 128**2)])
    flat = np.full((1, 32, 32, 3), 100, np.uint8)
    assert ssim(a, a) == pytest.approx([1, 1])
    assert ssim(flat, flat + 50) == pytest.approx([(2 * 100 * 150 + 6.5025) / (100**2 + 150**2 + 6.5025)])


def test_chi_square():
    value, p = bench_path.chi_square({0, 1, 2, 3}, {2, 3, 4, 5}, 10)  # table 4 2 / 2 2
    assert value == pytest.approx(10 * (4 * 2 - 2 * 2) ** 2 / (6 * 4 * 6 * 4))
    assert p == pytest.approx(0.5982, abs=1e-4)
    assert bench_path.chi_square(set(), {1}, 5) == (0.0, 1.0)


def test_the_path_search_finds_the_best_single_step(tmp_path, engine):
    generation = GenerationSettings(PROMPTS[:1], steps=7, width=128, height=128, cfg_scale=5)
    search = bench_path.Search(engine, generation)
    (first, quality), (second, _) = search.greedy(2, linear=False, progress=False)
    each = [search.quality([{i}], linear=False)[0] for i in range(1, 7)]
    assert quality == pytest.approx(max(each))
    assert first == {1 + int(np.argmax(each))}
    assert first < second
    lines = bench_path.bench_path(tmp_path, DEMO / "general.safetensors", replace(generation, steps=12), progress=False)
    assert (tmp_path / "skip-path.png").stat().st_size > 1000
    assert {line["policy"] for line in lines} <= set(bench_path.COMPARED)


def test_the_benchmark_goes_on_where_it_was(tmp_path, monkeypatch):
    pytest.importorskip("DeepCache", reason="a control of the benchmark")
    pytest.importorskip("efficientnet_lite_pytorch", reason="a measure of the benchmark")
    changed = {"STEPS": (8,), "LENGTHS": (6,), "SAMPLERS": ("DDIM",), "NOISY": (), "GUIDANCE": (5.0,), "PAIRS": ()}
    for name, value in changed.items():
        monkeypatch.setattr(bench_skip, name, value)
    lines = bench_skip.bench_skip(tmp_path, 2, progress=False)
    methods = [line["method"] for line in lines]
    assert {"Faithful", "Balanced", "Fast", "paper 0.01", "fewer steps: 6", "DeepCache 2"} <= set(methods)
    assert {"ZEUS, 1 of 3 computed", "SADA, no Lagrange"} <= set(methods)
    assert all(line["pictures"] == 2 for line in lines)
    assert len({tuple(sorted(policy.items())) for policy in bench_skip.POLICIES.values()}) == len(bench_skip.POLICIES)
    cached = next(line for line in lines if line["method"] == "DeepCache 2")
    assert 0.5 < cached["rows"] < 0.75
    monkeypatch.setattr(Engine, "denoise", lambda *_: pytest.fail("run again"))
    assert bench_skip.bench_skip(tmp_path, 2, progress=False) == lines
    with (tmp_path / "skip.csv").open() as file:
        assert [line["method"] for line in csv.DictReader(file)] == methods
    assert (tmp_path / "skip.png").exists()
    assert "Faithful" in (tmp_path / "skip.md").read_text()
