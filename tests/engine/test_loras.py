"""LoRAs in the engine: merged models, what they share, the command line, and aggregators trained with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lib_fusion.cli import main
from lib_fusion.engine.generate import Engine, single
from lib_fusion.errors import CheckpointError, FusionError
from lib_fusion.fusion.aggregator_files import identify_model, read_card
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import ExpertSettings, FusionSettings, GenerationSettings
from tests.helpers import PLAIN

DEMO = Path(__file__).resolve().parents[2] / "demo"
GENERAL, ANIMALS = (DEMO / f"{name}.safetensors" for name in ("general", "animals"))
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."
#: Layers of the demo's checkpoints, by kohya's names.
LAYERS = {
    "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k": "input_blocks.3.1.transformer_blocks.0.attn2.to_k",
    "lora_unet_output_blocks_3_0_in_layers_2": "output_blocks.3.0.in_layers.2",
    "lora_te_text_model_encoder_layers_1_mlp_fc1": "text_model.encoder.layers.1.mlp.fc1",
}
PROMPT = "a fox left of a tractor, flat drawing"
GENERATION = GenerationSettings((PROMPT,), width=128, height=64, steps=3, cfg_scale=5)
ONE = FusionSettings(experts=(ExpertSettings("expert"),), **PLAIN)
SIZE = ["--width", "128", "--height", "64", "--steps", "3", "--cfg-scale", "5"]


def full_name(layer: str) -> str:
    return (TEXT if layer.startswith("text_model") else UNET) + layer + ".weight"


def save_lora(path: Path, seed: int, only: str = "") -> Path:
    """Random factors large enough to change any picture; ``only``: of the layers whose names hold this."""
    weights, g = load_file(GENERAL), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in LAYERS.items():
        if only in name:
            out, *rest = weights[full_name(layer)].shape
            tensors[f"{name}.lora_up.weight"] = 0.3 * torch.randn(out, 4, *(1 for _ in rest[1:]), generator=g)
            tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(4, *rest, generator=g)
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Two LoRAs of the general model, and checkpoints with them merged by hand."""
    folder = tmp_path_factory.mktemp("loras")
    found = {name: save_lora(folder / f"{name}.safetensors", seed) for seed, name in enumerate(("a", "b"))}
    shutil.copytree(DEMO / "clip", folder / "clip")
    for name, weights in {"with a": {"a": 1.0}, "with b": {"b": 0.5}, "with both": {"a": 1.0, "b": 0.5}}.items():
        merged = {key: value.float() for key, value in load_file(GENERAL).items()}
        for lora, weight in weights.items():
            tensors = load_file(found[lora])
            for layer, key in LAYERS.items():
                up, down = tensors[f"{layer}.lora_up.weight"], tensors[f"{layer}.lora_down.weight"]
                merged[full_name(key)] += weight * 2 / 4 * torch.einsum("or,r...->o...", up.flatten(1), down)
        save_file(merged, folder / f"{name}.safetensors")
        shutil.copy(GENERAL.with_suffix(".yaml"), folder / f"{name}.yaml")
        found[name] = folder / f"{name}.safetensors"
    return found


def latents(engine: Engine, fusion: FusionSettings | None = None) -> torch.Tensor:
    return engine.denoise([(PROMPT, 0)], GENERATION, FusionSession(fusion or FusionSettings()))


def assert_same_picture(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_model_with_loras_draws_as_the_merged_checkpoint(files):
    """U-Net and text encoder; as base, as expert alone, and fused; the base is not changed by its expert's LoRA."""
    a, b = f"{GENERAL}+{files['a']}", f"{GENERAL}+{files['b']}:0.5"
    ours, merged = Engine(a, [b]), Engine(files["with a"], [files["with b"]])
    plain = latents(Engine(GENERAL))
    for settings in (single(ONE, 0), single(ONE, 1), ONE):
        assert_same_picture(latents(ours, settings), latents(merged, settings))
        assert (latents(ours, settings) - plain).abs().mean() > 0.01
    assert_same_picture(latents(Engine(f"{a}+{files['b']}:0.5")), latents(Engine(files["with both"])))
    assert torch.equal(latents(Engine(GENERAL, [a])), plain)


def test_only_the_changed_layers_take_memory(files):
    """Base and two LoRA experts of the same checkpoint share all other weights, in whatever order they are given."""
    specs = [GENERAL, f"{GENERAL}+{files['a']}", f"{GENERAL}+{files['b']}", f"{GENERAL}+{files['a']}"]
    for base, *experts in (specs, specs[::-1]):
        models = Engine(base, experts).models
        assert models[0 if base is GENERAL else 3].file.loras == ()
        assert len({id(model) for model in models}) == 3
        for part, changed in (("unet", 2), ("text", 1)):
            owned = [getattr(model, part) for model in models]
            parameters = [dict((m.model if part == "text" else m).named_parameters()) for m in owned]
            for other in parameters[1:]:
                if other is not parameters[0]:
                    different = {name for name, value in other.items() if value is not parameters[0][name]}
                    assert len(different) in (0, changed)


def run(tmp_path: Path, capsys, *more: str) -> tuple[Image.Image, str]:
    out = str(tmp_path / "out")
    assert main(["generate", "--base", str(GENERAL), "--prompt", PROMPT, "--json", "--out", out, *SIZE, *more]) == 0
    with Image.open(json.loads(capsys.readouterr().out)["files"][0]) as image:
        return image.copy(), image.info["parameters"]


def test_command_line(tmp_path, capsys, files):
    """A on the base and B on an expert; stacked; and the infotext has them as the WebUI reads them."""
    a, b = str(files["a"]), f"{files['b']}:0.5"
    generation = replace(GENERATION, prompts=(PROMPT,))
    plain = FusionSettings.from_dict({"experts": [{"checkpoint": "same as base"}]})
    flags = ("--lora", a, "--expert", "same as base", "--expert-lora", b)
    image, text = run(tmp_path, capsys, *flags)
    ours = Engine(f"{GENERAL}+{a}", [f"{GENERAL}+{b}"]).generate(generation, plain).pictures[0].image
    assert image.tobytes() == ours.tobytes()
    assert text.splitlines()[0] == f"{PROMPT}<lora:a:1>"
    assert "Model: general" in text
    assert "Fusion expert 1 checkpoint: same as base" in text
    assert 'Fusion expert 1 prompt: "<lora:b:0.5>"' in text
    stacked, text = run(tmp_path, capsys, "--lora", a, "--lora", b)
    assert text.splitlines()[0] == f"{PROMPT}<lora:a:1><lora:b:0.5>"
    both = Engine(f"{GENERAL}+{a}+{b}").generate(generation).pictures[0].image
    assert stacked.tobytes() == both.tobytes()
    # the expert flags go by order, and the base's own LoRAs do not act on "same as base"
    flags = ("--lora", a, "--expert", "same as base", "--expert-lora", "", "--expert", str(GENERAL), "--expert-lora",
             f"{a}+{b}", "--snb-window", "0:0", "--snb-outside", "expert",
             "--guidance", "off")  # fmt: skip
    assert run(tmp_path, capsys, *flags)[0].tobytes() == run(tmp_path, capsys)[0].tobytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora", "nowhere.safetensors"], ["nowhere.safetensors", "no such file"]),
        (["--lora", "nowhere.pt"], ["lora", ".safetensors"]),
        (["--lora", "{a}:much"], ["lora", "much", "a number"]),
        (["--lora", "{checkpoint}"], ["animals.safetensors", "no tensor of a LoRA"]),
        (["--expert-lora", "{a}"], ["expert-lora", "one for each --expert (0)"]),
        (["--expert", "{a}"], ["a LoRA"]),
        (["--expert", "same as base", "--expert-lora", "{a}", "--expert-lora", "{a}"], ["one for each --expert (1)"]),
    ],
    ids=str,
)
def test_bad_input_is_one_line(tmp_path, capsys, files, flags, words):
    flags = [flag.format(a=files["a"], checkpoint=ANIMALS) for flag in flags]
    argv = ["generate", "--base", str(GENERAL), "--prompt", PROMPT, "--out", str(tmp_path / "out"), *SIZE, *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


def test_a_models_identity_is_of_checkpoint_and_loras(files, tmp_path):
    """Other LoRAs and weights are other models; another order, and what does not change the U-Net, are not."""
    text = save_lora(tmp_path / "text.safetensors", 5, only="lora_te")
    copy = shutil.copy(files["a"], tmp_path / "copy.safetensors")
    a, b = files["a"], files["b"]

    def hash_of(more: str) -> str:
        return identify_model(f"{GENERAL}{more}").unet

    plain = identify_model(GENERAL).unet
    different = [hash_of(f"+{a}"), hash_of(f"+{b}"), hash_of(f"+{a}:0.5"), hash_of(f"+{a}+{b}"), plain]
    assert len({*different}) == len(different)
    assert hash_of(f"+{text}") == hash_of(f"+{a}:0") == plain
    assert hash_of(f"+{copy}") == hash_of(f"+{a}")
    assert hash_of(f"+{b}+{a}") == hash_of(f"+{a}+{b}")
    found = identify_model(f"{GENERAL}+{a}:0.5+{b}")
    assert (found.name, found.loras, found.title) == ("general", ("a:0.5", "b:1"), "general + a:0.5 + b:1")
    (tmp_path / "copy.safetensors").write_bytes(Path(b).read_bytes())  # another file under the same name
    assert hash_of(f"+{copy}") == hash_of(f"+{b}")


def test_aggregators_are_trained_for_loras_and_for_no_others(files, tmp_path, capsys):
    """cache, train, evaluate and generate with CHECKPOINT+LORA; a cache knows the text encoders' LoRAs, too."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("dog", "bus", "fox", "car"):
        shutil.copy(DEMO / "images" / f"{name}-flat.webp", pictures)
        (pictures / f"{name}-flat.txt").write_text(f"a {name}, flat drawing")
    a, b = f"{GENERAL}+{files['a']}", f"{GENERAL}+{files['b']}"
    cache, out = tmp_path / "cache", tmp_path / "x.safetensors"
    common = ["--cache", str(cache), "--model", a, "--model", b]
    assert main(["cache", "--source", str(pictures), "--resolution", "64", *common]) == 0
    sizes = ["--hidden", "8", "--layers", "1", "--heads", "2", "--batch-size", "2"]
    assert main(["train", "--out", str(out), "--steps", "2", *sizes, *common]) == 0
    assert [model.title for model in read_card(out).models] == ["general + a:1", "general + b:1"]
    report = tmp_path / "report"
    assert main(["evaluate", "--aggregator", str(out), "--out", str(report), "--timesteps", "500", *common]) == 0
    afa = replace(ONE, method="AFA", afa_aggregator=str(out))
    Engine(a, [b]).check_settings(afa)
    with pytest.raises(FusionError, match=r"general \+ b:0.5"):
        Engine(a, [f"{b}:0.5"]).check_settings(afa)
    capsys.readouterr()
    others = ["--cache", str(cache), "--model", a, "--model", str(GENERAL)]
    assert main(["train", "--out", str(out), "--steps", "2", *others]) == 2
    assert "made with the text encoders of general + a:1, general + b:1" in capsys.readouterr().err


def test_a_lora_of_another_model_is_refused_before_anything_loads(tmp_path, monkeypatch):
    tensors = {"lora_unet_input_blocks_99_0_proj.lora_up.weight": torch.zeros(2, 2),
               "lora_unet_input_blocks_99_0_proj.lora_down.weight": torch.zeros(2, 2)}  # fmt: skip
    save_file(tensors, tmp_path / "other.safetensors")
    monkeypatch.setattr("lib_fusion.engine.generate.load_model", pytest.fail)
    with pytest.raises(CheckpointError, match="does not have"):
        Engine(GENERAL, [f"{GENERAL}+{tmp_path / 'other.safetensors'}"])
