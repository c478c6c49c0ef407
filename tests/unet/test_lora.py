"""LoRA files: layers' names in every naming, merged weights by an independent formula, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file

from lib_fusion.errors import CheckpointError, SettingError
from lib_fusion.unet.checkpoint import UNET_PREFIX, Checkpoint
from lib_fusion.unet.config import unet_shapes
from lib_fusion.unet.lora import Lora, unet_names, with_loras
from lib_fusion.unet.model import load_unet
from lib_fusion.unet.model_file import LoraFile, ModelFile, split_files
from tests.helpers import REAL, SMALL, random_weights

DEMO = Path(__file__).resolve().parents[2] / "demo"
GENERAL = Checkpoint.open(DEMO / "general.safetensors")
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
#: LDM's name of a layer -> diffusers' name of it in SD1: one of each sort.
LAYERS = {
    "input_blocks.0.0": "conv_in", "time_embed.2": "time_embedding.linear_2", "out.2": "conv_out",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0":
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "input_blocks.5.1.transformer_blocks.0.attn2.to_k": "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k",
    "input_blocks.5.1.proj_in": "down_blocks.1.attentions.1.proj_in",
    "input_blocks.7.0.in_layers.2": "down_blocks.2.resnets.0.conv1",
    "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
    "middle_block.1.transformer_blocks.0.ff.net.0.proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.4.0.skip_connection": "up_blocks.1.resnets.1.conv_shortcut",
    "output_blocks.11.1.transformer_blocks.0.attn1.to_q": "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Checkpoint:
    """A file with a small U-Net of SD1's blocks and one layer of its text encoder."""
    path = tmp_path_factory.mktemp("model") / "sd1.safetensors"
    weights = random_weights(SMALL["sd1"], prefix=UNET_PREFIX)
    save_file(weights | {f"cond_stage_model.transformer.{TEXT}.weight": torch.randn(6, 6)}, path)
    return Checkpoint.open(path)


def factors(shape: tuple[int, ...], rank: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``up`` (out,rank,..) and ``down`` (rank,in,..) of a layer."""
    g = torch.Generator().manual_seed(seed)
    ones = [1] * (len(shape) - 2)
    return torch.randn(shape[0], rank, *ones, generator=g), torch.randn(rank, *shape[1:], generator=g)


def drawn(model: Checkpoint) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    shapes = model.unet_shapes
    return {name: factors(shapes[f"{name}.weight"], seed=i) for i, name in enumerate(LAYERS)}


def kohya(layers: dict, name_of, alpha: float | None = 1.5, text: bool = True) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (up, down) in layers.items():
        layer = "lora_unet_" + name_of(name).replace(".", "_")
        tensors |= {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
        tensors |= {f"{layer}.alpha": torch.tensor(alpha)} if alpha is not None else {}
    if text:
        up, down = factors((6, 6), seed=99)
        layer = "lora_te_" + TEXT.replace(".", "_")
        tensors |= {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
        tensors |= {f"{layer}.alpha": torch.tensor(alpha)} if alpha is not None else {}
    return tensors


def dotted(layers: dict, up_end: str, down_end: str, text_ends: tuple[str, str]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (up, down) in layers.items():
        tensors |= {f"unet.{LAYERS[name]}{up_end}": up, f"unet.{LAYERS[name]}{down_end}": down}
    up, down = factors((6, 6), seed=99)
    return tensors | {f"text_encoder.{TEXT}{text_ends[0]}": up, f"text_encoder.{TEXT}{text_ends[1]}": down}


def read(tensors: dict[str, torch.Tensor], model: Checkpoint, path: Path, weight: float = 1.0, metadata=None) -> Lora:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return Lora.read(LoraFile(path, weight), model)


def peft_ends(layers: dict) -> dict[str, torch.Tensor]:
    return dotted(layers, ".lora_B.weight", ".lora_A.weight", (".lora_B.weight", ".lora_A.weight"))


@pytest.mark.parametrize("kind", REAL)
def test_names_are_those_of_diffusers_own_converter(kind):
    """Every layer with a weight, norms too, by the names that diffusers gives the tensors of the same U-Net."""
    config = REAL[kind]
    shapes = unet_shapes(**config)
    theirs = convert_ldm_unet_checkpoint(
        {UNET_PREFIX + key: key for key in shapes},
        {"layers_per_block": config["num_res_blocks"], "class_embed_type": None,
         "addition_embed_type": "text_time" if kind.startswith("sdxl") else None},
    )  # fmt: skip
    theirs = {k.removesuffix(".weight").replace(".", "_"): v for k, v in theirs.items() if k.endswith(".weight")}
    ours = unet_names(shapes)
    assert {name: ours.get(name) for name in theirs} == {k: v.removesuffix(".weight") for k, v in theirs.items()}
    assert len(theirs) == sum(key.endswith(".weight") for key in shapes)


@pytest.mark.parametrize("naming", ["kohya after LDM", "kohya after diffusers", "PEFT", "diffusers", "PEFT's own file"])
def test_merged_weights_in_every_naming(model, tmp_path, naming):
    """W + weight * alpha / rank * up @ down, convolutions too; all other parameters are the base's own tensors."""
    layers = drawn(model)
    alpha = 1.5 if naming.startswith("kohya") else 3.0  # the rank, where the file has no alpha
    tensors = {
        "kohya after LDM": kohya(layers, str),
        "kohya after diffusers": kohya(layers, LAYERS.__getitem__),
        "PEFT": peft_ends(layers),
        "diffusers": dotted(layers, ".lora.up.weight", ".lora.down.weight",
                            (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")),
        "PEFT's own file": {key.replace("unet.", "base_model.model."): value for key, value in peft_ends(layers).items()
                            if key.startswith("unet.")},
    }[naming]  # fmt: skip
    if naming == "diffusers":  # the attention processors of its first releases
        old = (r"(attn\d)\.(to_\w+?)(\.0)?\.lora\.", r"\1.processor.\2_lora.")
        tensors = {re.sub(*old, key): value for key, value in tensors.items()}
        assert any(".processor.to_out_lora.up" in key for key in tensors)
    lora = read(tensors, model, tmp_path / "lora.safetensors", weight=0.7)
    unet = load_unet(model.path)
    merged = with_loras(unet, [(lora.unet, lora.file.weight)])
    before = dict(unet.named_parameters())
    for name, value in merged.named_parameters():
        layer = name.removesuffix(".weight")
        if layer not in LAYERS or not name.endswith(".weight"):
            assert value is before[name]
            continue
        up, down = layers[layer]
        product = torch.einsum("or,r...->o...", up.flatten(1).double(), down.double())
        expected = before[name].double() + 0.7 * alpha / 3 * product
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert set(lora.text) == (set() if naming == "PEFT's own file" else {TEXT})


def test_a_file_and_what_diffusers_makes_of_it_are_the_same(model, tmp_path):
    """diffusers' reader of kohya's files agrees on which tensors belong to which layers."""
    layers = {name: pair for name, pair in drawn(model).items() if name != "out.2"}  # conv_out: they replace "out.2"
    ours = read(kohya(layers, LAYERS.__getitem__, alpha=None), model, tmp_path / "kohya.safetensors")
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(kohya(layers, LAYERS.__getitem__, alpha=None))
    again = read(theirs, model, tmp_path / "diffusers.safetensors")
    assert ours.unet.keys() == again.unet.keys() == layers.keys()
    assert ours.text.keys() == again.text.keys() == {TEXT}
    for name in layers:
        assert torch.equal(ours.unet[name].delta(), again.unet[name].delta())


def test_pefts_alpha(model, tmp_path):
    """In the file as diffusers writes it, or in the configuration in the same folder as PEFT does."""
    layers = drawn(model)
    said = {"unet.lora_alpha": 12, "unet.r": 3, "text_encoder.lora_alpha": 6, "text_encoder.r": 3}
    metadata = {"lora_adapter_metadata": json.dumps(said)}
    lora = read(peft_ends(layers), model, tmp_path / "a.safetensors", metadata=metadata)
    assert [{f.scale for f in part.values()} for part in (lora.unet, lora.text)] == [{4.0}, {2.0}]
    own = {k.replace("unet.", "base_model.model."): v for k, v in peft_ends(layers).items() if k.startswith("unet.")}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 3}')
    lora = read(own, model, tmp_path / "adapter_model.safetensors")
    assert {f.scale for f in lora.unet.values()} == {2.0}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 3, "use_rslora": true}')
    with pytest.raises(CheckpointError, match="use_rslora"):
        read(own, model, tmp_path / "adapter_model.safetensors")


def test_several_loras_add_up_and_none_changes_nothing(model, tmp_path):
    layers = drawn(model)
    lora = read(kohya(layers, str), model, tmp_path / "lora.safetensors")
    unet = load_unet(model.path)
    assert with_loras(unet, []) is unet
    assert with_loras(unet, [(lora.unet, 0.0)]) is unet
    twice = with_loras(unet, [(lora.unet, 0.25), (lora.unet, 0.75)])
    once = with_loras(unet, [(lora.unet, 1.0)])
    for (name, a), b in zip(twice.named_parameters(), once.parameters()):
        torch.testing.assert_close(a, b, msg=name)
    half = with_loras(load_unet(model.path, dtype=torch.bfloat16), [(lora.unet, 1.0)])
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("end", "kind"),
    [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("oft_blocks", "OFT"), ("lora_mid.weight", "Tucker"),
     ("dora_scale", "DoRA"), ("lora_magnitude_vector", "DoRA"), ("on_input", "IA3"), ("w_norm", "trained norms"),
     ("diff", "full weights"), ("diff_b", "full weights"), ("a1.weight", "GLoRA"), ("lora_B.bias", "biases")],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(model, tmp_path, end, kind):
    tensors = kohya(drawn(model), str) | {f"lora_unet_out_2.{end}": torch.ones(1)}
    with pytest.raises(CheckpointError, match=kind):
        read(tensors, model, tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"bundle_emb.word.clip_l": torch.ones(1)}, "textual inversion"),
        (lambda t: t | {"lora_te2_text_model.alpha": torch.tensor(1.0)}, "text encoder of SDXL"),
        (lambda t: t | {"lora_unet_output_blocks_99_0.alpha": torch.tensor(1.0)}, "does not have"),
        (lambda t: {k: v for k, v in t.items() if "lora_up" not in k}, "lacks"),
        (lambda t: {k: v[:, :-1] if "to_q.lora_down" in k or "conv1.lora_down" in k or "in_layers_2.lora_down" in k
                    else v for k, v in t.items()}, "changes a weight"),
        (lambda t: {k: v[:, :-1] if "lora_up" in k else v for k, v in t.items()}, "do not fit each other"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "not finite"),
        (lambda t: {}, "no LoRA"),
        (lambda t: load_file(DEMO / "vehicles.safetensors"), "U-Net"),
    ],
    ids=["embedding", "sdxl", "layer", "factor", "shape", "ranks", "nan", "empty", "checkpoint"],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(model, tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words) as error:
        read(change(kohya(drawn(model), str)), model, tmp_path / "lora.safetensors")
    assert "lora.safetensors" in str(error.value)


def test_models_as_text(tmp_path):
    parsed = ModelFile.of("a/base.safetensors+x.safetensors:0.8+y+z.safetensors")
    loras = (LoraFile(Path("x.safetensors"), 0.8), LoraFile(Path("y+z.safetensors")))
    assert parsed == ModelFile(Path("a/base.safetensors"), loras)
    assert parsed.name == "base + x:0.8 + y+z:1"
    odd = tmp_path / "a.safetensors+b.safetensors"
    odd.touch()
    assert ModelFile.of(str(odd)) == ModelFile(odd)
    assert ModelFile.of("C:\\models\\a.safetensors") == ModelFile(Path("C:\\models\\a.safetensors"))
    assert split_files("", "lora") == []
    for text in ("a.safetensors:1", "a.safetensors+b.safetensors:much", "a.safetensors+", "a.safetensors+b.pt",
                 "a.safetensors+b.safetensors:nan", "a.safetensors+b.safetensors:1e9"):  # fmt: skip
        with pytest.raises(SettingError, match="model"):
            ModelFile.of(text)
