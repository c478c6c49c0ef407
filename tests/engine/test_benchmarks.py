"""The benchmark's controls and its measures: what skipping is compared with, and by what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.measures import FeatureDistance
from benchmarks.peers import PEERS, Course, Peer, Plan, Sada, Zeus, list_peers
from benchmarks.skip_report import compare_with_ours, write_markdown
from lib_fusion.engine.generate import Engine
from lib_fusion.fusion.policies import Skips
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import FusionSettings, GenerationSettings

DEMO = Path(__file__).resolve().parents[2] / "demo"
PROMPTS = ("a fox, flat drawing", "a bus, glossy render")
#: What the official code did around the demo's general model: the first prompt, seed 0, 50 steps, CFG 7. The path, and
#: the final latent's four channels at row 5, column 7.
OFFICIAL = [
    ("ZEUS, 1 of 3 computed", "DPM++ 2M Karras", "###########.#..#..#..#..#..#..#..#..#..#..#..#####",
     [2.3056, -2.5715, -0.3100, 0.5167]),
    ("ZEUS, 1 of 2 computed", "DPM++ 2M Karras", "############.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#####",
     [2.2891, -2.5659, -0.3130, 0.5146]),
    ("ZEUS", "DPM++ 2M Karras", "###########.#..#..#..#..##...#...#...#...#...#####",
     [2.3130, -2.4695, -0.3824, 0.4803]),
    ("SADA", "DPM++ 2M Karras", "###########..##..##..##..#...#...#...#...#...#..##",
     [2.2840, -2.4684, -0.4221, 0.4426]),
    ("SADA, no Lagrange", "DPM++ 2M Karras", "###########..##..##..##..###########....#....#..##",
     [2.3152, -2.4951, -0.4083, 0.4637]),
    ("ZEUS, 1 of 3 computed", "Euler", "###########.#..#..#..#..#..#..#..#..#..#..#..#####",
     [2.3814, -2.6037, -0.3414, 0.5500]),
    ("ZEUS, 1 of 2 computed", "Euler", "############.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#####",
     [2.3674, -2.6065, -0.3351, 0.5561]),
    ("ZEUS", "Euler", "###########.#..#..#..#..##...#...#...#...#...#####", [2.4013, -2.5877, -0.3460, 0.5229]),
    ("SADA", "Euler", "###########..##..##..##..#...#...#...#...#...#..##", [2.3549, -2.5537, -0.3748, 0.5175]),
    ("SADA, no Lagrange", "Euler", "###########..##..##..##..##..##.##..##..##....#.##",
     [2.3826, -2.4905, -0.4516, 0.4624]),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(DEMO / "general.safetensors")


def draw(engine: Engine, make, sampler: str, steps: int = 50, prompts=PROMPTS):
    """(latents, session) under a peer's policies; None for ``make``: nothing is skipped."""
    session = FusionSession(FusionSettings(skipping="Paper" if make else "Off"))
    course = Course.of(sampler, steps)
    if make:
        session.skips = Skips(session.settings, make=lambda _model, _picture: make(course))
    generation = GenerationSettings(prompts, width=128, height=128, steps=steps, sampler=sampler, cfg_scale=7)
    with torch.no_grad():
        return engine.denoise([(p, i) for i, p in enumerate(prompts)], generation, session), session


@pytest.mark.parametrize(("name", "sampler", "path", "values"), OFFICIAL)
def test_peers_do_what_their_official_code_did(engine, name, sampler, path, values):
    latents, session = draw(engine, PEERS[name], sampler, prompts=PROMPTS[:1])
    assert session.skips.paths == {0: [path]}
    torch.testing.assert_close(latents[0, :, 5, 7], torch.tensor(values), rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", ["DDIM", "Euler Karras", "DPM++ 2M", "Euler a"])
def test_peers_without_a_skip_are_the_unskipped_run(engine, sampler):
    nowhere = Plan(first=99, end=99, lagrange_from=None, most=4)
    off, _ = draw(engine, None, sampler, steps=12)
    for make in (lambda course: Sada(course, nowhere), lambda course: Zeus(course, nowhere, 2, (1,))):
        assert torch.equal(draw(engine, make, sampler, steps=12)[0], off)


@pytest.mark.parametrize("name", PEERS)
def test_peers_watch_one_picture_at_a_time(engine, name):
    both, together = draw(engine, PEERS[name], "DDIM", steps=30)
    alone, session = draw(engine, PEERS[name], "DDIM", steps=30, prompts=PROMPTS[:1])
    assert together.skips.paths[0][0] == session.skips.paths[0][0]
    torch.testing.assert_close(both[0], alone[0], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "DPM++ 2M Karras"])
def test_lagrange_is_exact_for_a_cubic_denoised_prediction(sampler):
    """Along steps in which the denoised prediction is a cubic of the step's number, its noise is met wherever it runs.

    Euler's holds it divided by alpha, as the official code does.
    """
    course = Course.of(sampler, 50)
    peer = PEERS["ZEUS"](course)
    assert isinstance(peer, Peer)
    met = 0
    for step in range(50):
        denoised = torch.full((1, 2, 2), 1 + 0.1 * step - 0.003 * step**2 + 2e-5 * step**3, dtype=torch.float64)
        if course.is_sigma_scaled:
            denoised *= course.alpha(step)
        latent = torch.full((1, 2, 2), 3.0, dtype=torch.float64)
        noise = (latent - denoised) / course.sigmas[step]
        if step:
            peer.watch(latent if course.is_sigma_scaled else latent * course.alpha(step))
        if peer.may_skip(0.0):
            forecast = peer.forecast(0.0, latent)[0]
            if step > 33:  # by then all four points, 21 to 33, are computed ones
                torch.testing.assert_close(forecast, noise, rtol=1e-7, atol=1e-7)
                met += 1
                continue
        peer.observe(0.0, noise[None], torch.ones(1, 1, 1, 1, dtype=torch.float64), latent)
    assert met >= 8


def test_peers_of_few_steps_are_those_that_differ():
    assert set(list_peers(50)) == set(list_peers(30)) == set(PEERS)
    assert set(PEERS) - set(list_peers(20)) == {"ZEUS", "SADA"}


def test_feature_distance():
    pytest.importorskip("efficientnet_lite_pytorch", reason="a measure of the benchmark")
    generator = np.random.default_rng(0)
    pictures = generator.integers(60, 200, (2, 64, 64, 3), dtype=np.uint8)
    noise = generator.normal(0, 1, pictures.shape)
    distance = FeatureDistance()
    assert distance(pictures, pictures) == pytest.approx([0, 0])
    near, far = (distance(pictures, (pictures + size * noise).round().astype(np.uint8)) for size in (2, 8))
    assert (near > 0).all()
    assert (near < far).all()
    assert distance(pictures, pictures[::-1].copy()) == pytest.approx(distance(pictures[::-1].copy(), pictures)[::-1])
    features = distance.features(pictures)
    assert [x.shape[-1] for x in features] == [32, 16, 8, 4, 2]
    for x in features:
        torch.testing.assert_close(x.norm(dim=1), torch.ones_like(x[:, 0]), rtol=1e-4, atol=1e-4)


def line(method: str, rows: float, mean: float, worst: float, distance: float, steps: int = 50) -> dict:
    return {"models": "general", "sampler": "DDIM", "steps": steps, "guidance": 7.0, "method": method, "rows": rows,
            "psnr_mean": mean, "psnr_worst": worst, "distance_mean": distance, "pictures": 8}  # fmt: skip


def test_others_are_compared_with_ours_at_as_many_rows(tmp_path):
    ours = [
        line("Faithful", 0.5, 60, 50, 0.001),
        line("Fast", 0.3, 50, 44, 0.003),
        line("Balanced", 0.4, 58, 46, 0.002),
    ]
    others = [line("ZEUS", 0.45, 55, 49, 0.004), line("paper 0.01", 0.8, 50, 40, 0.002), line("SADA", 0.2, 30, 10, 0.1)]
    others[1]["pictures"] = 4
    elsewhere = line("SADA", 0.9, 30, 10, 0.1, steps=30)
    compare_with_ours([*ours, *others, elsewhere])
    keys = ("ours_over", "ours_over_worst", "ours_distance")
    assert [others[0][key] for key in keys] == pytest.approx([59 - 55, 48 - 49, 0.0015 / 0.004], abs=0.01)
    assert [others[1][key] for key in keys] == [10, 10, 0.5]  # Faithful needs no more
    for untold in (others[2], elsewhere, *ours):
        assert [untold[key] for key in keys] == ["", "", ""]
    write_markdown([*ours, *others, elsewhere], tmp_path / "skip.md")
    text = (tmp_path / "skip.md").read_text().splitlines()
    assert text[0].startswith("| sampler, steps, CFG | pictures | Faithful | Balanced | Fast | ZEUS | SADA")
    assert text[2].startswith("| DDIM, 50, 7 | 8 | 0.50: 60.0 (50), 1.0 | 0.40: 58.0 (46), 2.0 |")
    assert text[2].endswith("| 0.80: 50.0 (40), 2.0 [4] |")
    assert len(text) == 3  # a cell without ours is left out
