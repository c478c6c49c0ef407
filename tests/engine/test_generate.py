"""The embedded engine on the demo's checkpoints: exact identities, samplers, sizes."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib_fusion.engine.generate import Engine, single
from lib_fusion.engine.samplers import make_scheduler, sigmas_of
from lib_fusion.errors import CheckpointError, SettingError
from lib_fusion.fusion.records import Keep
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import GENERATION_PARAMETERS, ExpertSettings, FusionSettings, GenerationSettings
from tests.helpers import PLAIN

DEMO = Path(__file__).resolve().parents[2] / "demo"
ANIMALS, VEHICLES, FOOD = (DEMO / f"{name}.safetensors" for name in ("animals", "vehicles", "food"))
SAMPLERS = next(row.choices for row in GENERATION_PARAMETERS if row.key == "sampler")
PROMPT = "a fox left of a tractor, flat drawing"
GENERATION = GenerationSettings((PROMPT,), width=256, height=128, steps=6, cfg_scale=5)
ONE = FusionSettings(experts=(ExpertSettings("expert"),), **PLAIN)


@pytest.fixture(scope="module")
def pair() -> Engine:
    return Engine(ANIMALS, [VEHICLES])


def latents(engine: Engine, fusion: FusionSettings, generation: GenerationSettings = GENERATION, seeds=(0,)):
    jobs = [(prompt, seed) for prompt in generation.prompts for seed in seeds]
    return engine.denoise(jobs, generation, FusionSession(fusion))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "values", [{}, {"snb_hold": 900}, {"snb_saliency": "code"}, {"snb_window": (700, 300)}], ids=str
)
def test_expert_equal_to_base_gives_the_base_picture(tmp_path, sampler, values):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(ANIMALS, copy)
    shutil.copy(ANIMALS.with_suffix(".yaml"), copy.with_suffix(".yaml"))
    shutil.copytree(DEMO / "clip", tmp_path / "clip")
    generation = replace(GENERATION, sampler=sampler)
    for expert in (ANIMALS, copy):
        engine = Engine(ANIMALS, [expert])
        alone = latents(engine, FusionSettings(), generation)
        assert torch.equal(latents(engine, replace(ONE, **values), generation), alone)


def test_expert_equal_to_base_is_loaded_once():
    engine = Engine(ANIMALS, [ANIMALS, VEHICLES, DEMO / ".." / "demo" / VEHICLES.name])
    assert engine.models[0] is engine.models[1]
    assert engine.models[2] is engine.models[3]
    assert engine.models[1] is not engine.models[2]


@pytest.mark.parametrize(("outside", "path"), [("base", ANIMALS), ("expert", VEHICLES)])
def test_an_empty_window_gives_the_single_models_picture(pair, outside, path):
    fused = latents(pair, replace(ONE, snb_window=(600, 600), snb_outside=outside))
    assert torch.equal(fused, latents(Engine(path), FusionSettings()))


def test_fusing_differs_from_both_models_and_from_the_average(pair):
    average, held = replace(ONE, method="Average"), replace(ONE, snb_hold=900)
    results = [latents(pair, settings) for settings in (single(ONE, 0), single(ONE, 1), average, ONE, held)]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert (a - b).abs().mean() > 0.01


def test_the_window_switches_models(pair):
    """The paper's mode 2: fused while t > v1; before the switch the latents are those of full SNB."""
    steps = make_scheduler("DDIM", GENERATION.steps).timesteps.tolist()
    session = FusionSession(replace(ONE, snb_window=(1000, steps[2])), keep=Keep.read(["masks"]))
    pair.denoise([(PROMPT, 0)], GENERATION, session)
    assert [m.timestep for m in session.records.masks] == steps[:2]
    assert session.calls == [GENERATION.steps, 2]
    assert session.rows == [2 * GENERATION.steps, 4]


def test_an_expert_uses_its_own_prompts(pair):
    told = replace(ONE, snb_window=(0, 0), snb_outside="expert")
    own = replace(told, experts=(ExpertSettings("expert", prompt="a bus, flat drawing", negative_prompt="a car"),))
    direct = replace(GENERATION, prompts=("a bus, flat drawing",), negative_prompt="a car")
    assert torch.equal(latents(pair, own), latents(Engine(VEHICLES), FusionSettings(), direct))


def test_base_text_encoder_reads_the_experts_prompt():
    """The demo's models share a text tower; one that is made deaf shows which tower was asked."""
    engine = Engine(ANIMALS, [VEHICLES])
    with torch.no_grad():
        for parameter in engine.models[1].text.model.parameters():
            parameter.requires_grad_(False).zero_()
    own = latents(engine, single(ONE, 1))
    base = latents(engine, single(replace(ONE, experts=(ExpertSettings("expert", text_encoder="base"),)), 1))
    assert not torch.equal(own, base)
    assert torch.equal(base, latents(Engine(VEHICLES), FusionSettings()))


@pytest.mark.parametrize("size", [(128, 128), (136, 72), (64, 200), (256, 256)])
def test_any_size_divisible_by_eight(pair, size):
    run = pair.generate(replace(GENERATION, width=size[0], height=size[1], steps=2), ONE)
    assert run.pictures[0].image.size == size


def test_a_picture_depends_on_its_own_prompt_and_seed(pair):
    alone = latents(pair, replace(ONE, snb_hold=900), seeds=(7,))
    among = latents(pair, replace(ONE, snb_hold=900), seeds=(3, 7, 5))
    torch.testing.assert_close(among[1:2], alone, rtol=1e-3, atol=1e-3)


def test_the_record_counts_calls_and_rows(pair):
    run = pair.generate(replace(GENERATION, count=3, batch_size=2), ONE)
    assert [picture.seed for picture in run.pictures] == [0, 1, 2]
    assert run.record["unet_calls"] == [12, 12]
    assert run.record["unet_rows"] == [36, 36]
    assert run.record["seconds"] > 0


def test_three_experts_share_the_picture():
    engine = Engine(DEMO / "general.safetensors", [ANIMALS, VEHICLES, FOOD])
    fusion = FusionSettings(experts=tuple(ExpertSettings(name) for name in "abc"), **PLAIN)
    session = FusionSession(fusion, keep=Keep.read(["masks"]))
    engine.denoise([(PROMPT, 0)], GENERATION, session)
    assert session.calls == [GENERATION.steps] * 4
    winners = set(torch.cat([m.winner for m in session.records.masks]).unique().tolist())
    assert winners <= {0, 1, 2, 3}
    assert len(winners) >= 3


def test_v_prediction_is_converted_to_noise(pair, monkeypatch):
    """A model that predicts v, made of one that predicts noise, draws the same picture."""
    engine = Engine(ANIMALS)
    expected = latents(engine, FusionSettings())
    unet = engine.models[0].unet
    alphas = make_scheduler("DDIM", 6).alphas_cumprod
    noise_of = unet.forward

    def v_of(x, timesteps, context, y=None):
        a = alphas[timesteps.long()].view(-1, 1, 1, 1)
        return (noise_of(x, timesteps, context, y) - (1 - a).sqrt() * x) / a.sqrt()

    monkeypatch.setattr(unet, "forward", v_of)
    monkeypatch.setattr(unet, "prediction", "v")
    torch.testing.assert_close(latents(engine, FusionSettings()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_levels_are_the_schedulers_own(sampler):
    """Also where its timesteps are rounded, so that two of them coincide (DPM++ Karras, 50 steps)."""
    scheduler = make_scheduler(sampler, 50)
    sigmas = sigmas_of(scheduler)
    assert len(sigmas) == 51
    assert sigmas[-1] == 0
    assert all(a > b * 1.001 for a, b in itertools.pairwise(sigmas))
    for sigma, t in zip(sigmas, scheduler.timesteps.tolist(), strict=False):
        assert abs(t - timestep_of(sigma, scheduler.alphas_cumprod)) < 0.51  # rounded or not


def timestep_of(sigma: float, alphas: torch.Tensor) -> float:
    """The timestep at which a picture of variance one has noise of this deviation, linear in log sigma."""
    log_sigmas = ((1 - alphas) / alphas).log().numpy() / 2
    return float(np.interp(math.log(sigma), log_sigmas, np.arange(len(alphas))))


@pytest.mark.parametrize(
    ("fusion", "field"),
    [
        (replace(ONE, experts=(ExpertSettings("expert", place="mask"),)), "place"),
        (FusionSettings(snb_outside="expert"), "snb_outside"),
        (FusionSettings(experts=(ExpertSettings("a"), ExpertSettings("b"))), "experts"),
    ],
)
def test_settings_that_these_models_cannot_do(pair, fusion, field):
    with pytest.raises(SettingError, match=field):
        pair.generate(GENERATION, fusion)


def test_missing_expert_is_refused_before_anything_loads(monkeypatch):
    monkeypatch.setattr("lib_fusion.engine.generate.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(CheckpointError, match="no such file"):
        Engine(ANIMALS, [DEMO / "nobody.safetensors"])
