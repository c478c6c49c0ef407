"""SDXL, on small U-Nets with random weights: pooled text is cached, and reaches every U-Net with the pictures' size."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_fusion.cli import main
from lib_fusion.errors import FusionError
from lib_fusion.fusion.aggregator_files import load_aggregators
from lib_fusion.training.cache import EMPTY, FORMAT, Cache, Text, encoder_identity, write_cache
from lib_fusion.training.ensemble import Ensemble, alphas_cumprod, load_models
from lib_fusion.training.evaluate import MEAN_FEATURES, TRAINED, evaluate
from lib_fusion.training.train import Batches, train
from lib_fusion.unet.checkpoint import SDXL_TEXT_PREFIX, TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, Checkpoint
from lib_fusion.unet.vector import SIZES_DIM, sdxl_vector
from tests.helpers import SMALL, random_weights
from tests.training.conftest import QUICK, write_pictures
from tests.training.test_train import losses

POOLED, CONTEXT = 16, SMALL["sdxl"]["context_dim"]
CONFIG = SMALL["sdxl"] | {"adm_in_channels": POOLED + SIZES_DIM}
NAMES = ("dog", "fox", "cow", "bus")


def save_model(path: Path, seed: int, config: dict = CONFIG, text_prefix: str = SDXL_TEXT_PREFIX) -> Path:
    """A checkpoint with stand-ins for VAE and text encoder. One of an odd seed predicts far too much."""
    weights = random_weights(config, seed, UNET_PREFIX)
    weights[f"{UNET_PREFIX}out.2.weight"] *= 30 if seed % 2 else 1
    weights |= {f"{VAE_PREFIX}x": torch.ones(2), f"{text_prefix}embedders.0.x": torch.full((2,), float(seed))}
    save_file(weights, path)
    return path


def drawn(text: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


class Encoders:
    """Stands where the WebUI's encoders do: states and pooled text are noise that a caption and a model seed."""

    def __init__(self, paths: list[Path], has_pooled: bool = True) -> None:
        self.files = [Checkpoint.open(path) for path in paths]
        self.identity = encoder_identity(paths, self.files[0])
        self.has_pooled = has_pooled

    def encode_picture(self, picture: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(picture[None], 8)[0]
        return torch.cat([small, small[:1]])

    def encode_texts(self, texts: list[str]) -> list[Text]:
        return [
            Text(
                torch.stack([drawn(f"{text}/{m}", 5, CONTEXT) for text in texts]),
                torch.stack([drawn(f"pooled {text}", POOLED) for text in texts]) if self.has_pooled else None,
            )
            for m in range(len(self.files))
        ]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def cached(tmp_path_factory, models) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    write_cache(write_pictures(folder / "pictures", NAMES), folder / "cache", Encoders(models), 64, 3)
    return folder / "cache"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models, cached) -> Path:
    out = tmp_path_factory.mktemp("run") / "finished.safetensors"
    train(cached, models, out, QUICK)
    return out


def test_vector():
    """The formula written out: cosines, then sines, of each number at 128 frequencies from 1 down to 1/10000."""
    pooled = torch.randn(2, 3)
    found = sdxl_vector(pooled, 768, 1344)
    expected = []
    for number in (768, 1344, 0, 0, 768, 1344):
        angles = [number * 10000 ** (-i / 128) for i in range(128)]
        expected += [*map(math.cos, angles), *map(math.sin, angles)]
    assert found.shape == (2, 3 + SIZES_DIM)
    assert torch.equal(found[:, :3], pooled)
    for row in found:
        torch.testing.assert_close(row[3:], torch.tensor(expected), atol=2e-4, rtol=0)
    assert sdxl_vector(pooled.half(), 64, 64).dtype == torch.float16


def test_pooled_text_is_cached(models, cached):
    cache, encoders = Cache(cached), Encoders(models)
    expected = encoders.encode_texts([entry.caption for entry in cache.entries])
    for i, entry in enumerate(cache.entries):
        for text, whole in zip(cache.read(entry)[1], expected, strict=True):
            assert torch.equal(text.states, whole.states[i].half().float())
            assert torch.equal(text.pooled, whole.pooled[i].half().float())
    for text, whole in zip(cache.empty, encoders.encode_texts([""]), strict=True):
        assert torch.equal(text.pooled, whole.pooled[0].half().float())
    keys = set(load_file(cached / "shard-00000.safetensors"))
    assert "2.pooled.0" in keys
    assert "2.pooled.1" not in keys  # the same as model 0's


def test_caches_of_before_are_read(tmp_path):
    """Without pooled text, and with every model's states of the empty caption."""
    index = {"format": FORMAT, "source": "x", "resolution": 64, "models": ["a", "b"], "texts": ["1", "1"], "vae": "2"}
    (tmp_path / "index.json").write_text(json.dumps(index))
    states = torch.randn(5, 3).half()
    save_file({"text.0": states, "text.1": states + 1}, tmp_path / EMPTY)
    item = {"name": "x", "caption": "y", "subset": "all", "repeats": 1, "size": [2, 2]}
    tensors = {"0.latent": torch.zeros(4, 2, 2).half(), "0.text.0": states}
    save_file(tensors, tmp_path / "shard-00000.safetensors", {"items": json.dumps([item])})
    cache = Cache(tmp_path)
    assert torch.equal(cache.empty[1].states, (states + 1).float())
    for text in cache.read(cache.entries[0])[1]:
        assert torch.equal(text.states, states.float())
        assert text.pooled is None


def test_an_empty_caption_changes_the_pooled_text_and_not_the_size(models, cached):
    """What the U-Nets are given in the end, of pictures that are not square."""
    cache = Cache(cached)
    unets = load_models(models, cache, torch.float32, torch.device("cpu"))
    told: dict[str, list[torch.Tensor]] = {}
    for i, unet in enumerate(unets):
        hook = lambda _, args, i=i: told.setdefault(str(i), []).append(args[0])  # noqa: E731
        unet.label_emb.register_forward_pre_hook(hook)
    from lib_fusion.methods.afa import uniform

    ensemble = Ensemble(unets, uniform(2))
    for dropout in (0.0, 1.0):
        latents, texts, _, t = Batches(cache, replace(QUICK, caption_dropout=dropout)).draw(0, slice(0, 4))
        ensemble(latents[:, :, :6, :], t, texts)
    sizes = sdxl_vector(torch.zeros(1, POOLED), 48, 64)[0, POOLED:]
    for m in ("0", "1"):
        full, *_, empty = told[m]
        assert full.shape == empty.shape == (4, POOLED + SIZES_DIM)
        for vector in (*full, *empty):
            assert torch.equal(vector[POOLED:], sizes)
        assert all(torch.equal(vector[:POOLED], cache.empty[int(m)].pooled) for vector in empty)
        assert not any(torch.equal(vector[:POOLED], cache.empty[int(m)].pooled) for vector in full)


def test_learns_and_is_evaluated(tmp_path, models, cached):
    out = tmp_path / "x.safetensors"
    card = train(cached, models, out, replace(QUICK, steps=20, learning_rate=1e-2))
    assert (card.architecture, load_aggregators(out)[0].sizes.context_dim) == ("sdxl", CONTEXT)
    result = evaluate(cached, models, out, (400,))
    assert result.mean(TRAINED) < 0.9 * result.mean(MEAN_FEATURES)
    assert evaluate(cached, models, out, (400,), captions=False).mean(TRAINED) != result.mean(TRAINED)
    half = evaluate(cached, models, out, (400,), precision="bfloat16")
    assert half.mean(TRAINED) == pytest.approx(result.mean(TRAINED), rel=0.02)

    cache = Cache(cached)
    unets = load_models(models, cache, torch.float32, torch.device("cpu"))
    for m, name in enumerate(("only one", "only two")):
        total = 0.0
        for entry in cache.entries:
            latent, texts = cache.read(entry)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{entry.name}/400".encode()))
            noise, a = torch.randn(latent.shape, generator=generator), alphas_cumprod()[400]
            x = (a.sqrt() * latent + (1 - a).sqrt() * noise)[None]
            y = sdxl_vector(texts[m].pooled[None], 64, 64)
            output = unets[m](x, torch.tensor([400]), texts[m].states[None], y)[0]
            total += (output - noise).square().mean().item()
        assert result.mean(name) == pytest.approx(total / len(cache.entries), rel=1e-4)


def test_resumes_exactly(tmp_path, models, cached, finished):
    out = tmp_path / "x.safetensors"

    def tell(text: str) -> None:
        if text.startswith("step 3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cached, models, out, QUICK, tell=tell)
    train(cached, models, out, QUICK)
    assert losses(out) == losses(finished)
    a, b = load_file(out), load_file(finished)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_checkpointing_and_half_precision(tmp_path, models, cached, finished):
    train(cached, models, tmp_path / "again.safetensors", replace(QUICK, checkpointing=True))
    expected = torch.tensor(losses(finished))
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "again.safetensors")), expected, rtol=1e-4, atol=1e-6)
    train(cached, models, tmp_path / "half.safetensors", replace(QUICK, precision="bfloat16", checkpointing=True))
    assert losses(tmp_path / "half.safetensors")[0] == pytest.approx(losses(finished)[0], rel=0.05)


def test_models_of_several_kinds_are_refused(tmp_path, models, cached):
    other = save_model(tmp_path / "old.safetensors", 2, SMALL["sd1"], TEXT_PREFIX)
    says = r"^the models are of several kinds \(one sdxl, old sd1\); allowed: models of one kind$"
    with pytest.raises(FusionError, match=says):
        Encoders([models[0], other])
    with pytest.raises(FusionError, match=says):
        train(cached, [models[0], other], tmp_path / "x.safetensors", QUICK)


def test_other_text_encoders_are_refused(tmp_path, models, cached):
    other = save_model(tmp_path / "other.safetensors", 3)
    with pytest.raises(FusionError, match="the cache was made with the text encoders of one, two, not with those of"):
        train(cached, [models[0], other], tmp_path / "x.safetensors", QUICK)


def test_a_cache_without_pooled_text_is_refused(tmp_path, models):
    write_cache(write_pictures(tmp_path / "pictures", NAMES[:1]), tmp_path / "cache", Encoders(models, False), 64)
    told = f"its U-Net takes a vector of {POOLED + SIZES_DIM} numbers, the cache's pooled text gives 0"
    with pytest.raises(FusionError, match=told):
        train(tmp_path / "cache", models, tmp_path / "x.safetensors", QUICK)


def test_the_command_line_encodes_sd1_only(tmp_path, models, capsys):
    pictures = write_pictures(tmp_path / "pictures", NAMES[:1])
    argv = ["cache", "--source", str(pictures), "--cache", str(tmp_path / "cache")]
    assert main([*argv, *(part for path in models for part in ("--model", str(path)))]) == 2
    assert "the embedded engine runs SD1 checkpoints, this is sdxl" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
