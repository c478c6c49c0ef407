"""Evaluation: the numbers are those of an independent computation, and losing is said plainly."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lib_fusion.cli import main
from lib_fusion.fusion.aggregator_files import Card, identify_model, save_aggregators
from lib_fusion.fusion.lockstep import sizes_for
from lib_fusion.training.cache import Cache
from lib_fusion.training.ensemble import alphas_cumprod, load_models
from lib_fusion.training.evaluate import MEAN_FEATURES, MEAN_PREDICTIONS, ORACLE, TRAINED, _row, evaluate
from tests.training.conftest import MODELS


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, data):
    unets = load_models(MODELS, Cache(data.cache), torch.float32, torch.device("cpu"))
    sizes = sizes_for(unets[0], 2, 8, 1, 2)
    path = tmp_path_factory.mktemp("evaluate") / "untrained.safetensors"
    card = Card("sd1", "epsilon", sizes, tuple(identify_model(m) for m in MODELS))
    save_aggregators(path, card, sizes.make().state_dict())
    return path


@pytest.fixture(scope="module")
def result(data, untrained):
    return evaluate(data.cache, MODELS, untrained, (150, 650))


def test_untrained_is_the_uniform_average(result):
    assert result.mean(TRAINED) == pytest.approx(result.mean(MEAN_FEATURES), rel=1e-4)
    assert result.subsets == {"a": 5, "b": 4}
    assert set(result.loss[TRAINED]["a"]) == {150, 650}
    for weights in result.routing["a"].values():
        assert weights == pytest.approx([0.5, 0.5], abs=1e-3)
    assert len(result.sharpness) == 13


def test_single_models_are_the_models_themselves(result, data):
    import zlib

    cache = Cache(data.cache)
    unets = load_models(MODELS, cache, torch.float32, torch.device("cpu"))
    for m, name in enumerate(("only animals", "only vehicles")):
        total = 0.0
        entries = [entry for entry in cache.entries if entry.subset == "a"]
        for entry in entries:
            latent, texts = cache.read(entry)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{entry.name}/650".encode()))
            noise, a = torch.randn(latent.shape, generator=generator), alphas_cumprod()[650]
            x = (a.sqrt() * latent + (1 - a).sqrt() * noise)[None]
            total += (unets[m](x, torch.tensor([650]), texts[m].states[None])[0] - noise).square().mean().item()
        assert result.loss[name]["a"][650] == pytest.approx(total / len(entries), rel=1e-4)


def test_two_models_of_one_name_are_kept_apart(result, data, untrained, tmp_path):
    same = []
    for folder, path in zip(("a", "b"), MODELS):
        same.append(tmp_path / folder / "model.safetensors")
        same[-1].parent.mkdir()
        shutil.copy(path, same[-1])
    found = evaluate(data.cache, same, untrained, (150, 650))
    assert found.models == ["model (1)", "model (2)"]
    assert found.loss[MEAN_PREDICTIONS] == result.loss[MEAN_PREDICTIONS]
    for name, its in (("model (1)", "animals"), ("model (2)", "vehicles")):
        assert found.loss[f"only {name}"] == result.loss[f"only {its}"]


def test_names_in_tables_are_names_only():
    """No name of a file, a subset or a block is a column, a style or a tag."""
    names = ["a|b", "<img src=x>", "*x*", "_y_", "input_blocks.4", "`z`", "[u](v)", "two\nlines"]
    assert _row([*names, 0.5]) == (r"| a\|b | \<img src=x> | \*x\* | \_y\_ | input_blocks.4 | \`z\` | \[u\](v) "
                                   "| two lines | 0.5000 |")  # fmt: skip


def test_average_and_oracle(result):
    assert result.mean(MEAN_PREDICTIONS) != pytest.approx(result.mean(MEAN_FEATURES), rel=0.01)
    for subset in result.subsets:
        singles = [result.mean(f"only {name}", subset) for name in ("animals", "vehicles")]
        assert result.mean(ORACLE, subset) == min(singles)


def test_verdict(result):
    ahead = result.mean(TRAINED) < min(result.mean("only animals"), result.mean("only vehicles"))
    assert ("does NOT beat" in result.verdict()) != ahead
    for factor, says in ((0.01, "The aggregator beats"), (100, "does NOT beat")):
        changed = evaluate_like(result, factor)
        assert says in changed.verdict()


def test_it_says_where_the_average_is_better(result):
    changed, advice = evaluate_like(result, 1), ": try the window 150:0 with the average outside."
    for ahead, says in (
        ((150, 650), ""),
        ((150,), f" At timestep 650 the average of predictions is better{advice}"),
        ((650,), " At timestep 150 the average of predictions is better."),
        ((), " At timestep 150, 650 the average of predictions is better."),
    ):
        for s in changed.subsets:
            for t in (150, 650):
                changed.loss[TRAINED][s][t] = changed.loss[MEAN_PREDICTIONS][s][t] * (0.5 if t in ahead else 2)
        assert changed.takeover() == says
        assert changed.verdict().endswith(says)


def evaluate_like(result, factor):
    from copy import deepcopy

    changed = deepcopy(result)
    for losses in changed.loss[TRAINED].values():
        losses.update({t: value * factor for t, value in losses.items()})
    return changed


def test_command(tmp_path, data, untrained, capsys):
    argv = ["evaluate", "--cache", str(data.cache), "--model", MODELS[0], "--model", MODELS[1], "--aggregator",
            str(untrained), "--out", str(tmp_path), "--timesteps", "400"]  # fmt: skip
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "| held-out loss | a (5) | b (4) | all |" in printed
    assert json.loads((tmp_path / "evaluation.json").read_text())["models"] == ["animals", "vehicles"]
    assert (tmp_path / "evaluation.png").stat().st_size > 10000
    assert main([*argv[:-1], "1000"]) == 2
    assert main([*argv[:3], "--model", MODELS[1], "--model", MODELS[0], *argv[7:]]) == 2
    assert "in the order animals, vehicles" in capsys.readouterr().err
