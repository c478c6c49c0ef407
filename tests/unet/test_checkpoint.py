"""Checkpoint files: what they are told to be, what is read of them, and how unusable ones are refused."""

import io
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_fusion.errors import CheckpointError
from lib_fusion.unet.checkpoint import DTYPES, UNET_PREFIX, VAE_PREFIX, Checkpoint
from lib_fusion.unet.model import load_unet
from tests.helpers import SMALL, random_inputs, random_weights


@pytest.fixture
def save(tmp_path):
    """Writes tensors into a file in a fresh folder and returns its path."""

    def write(tensors, metadata=None, name="model.safetensors"):
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return write


def whole(architecture="sd1"):
    """A checkpoint with a U-Net and a bit of what else belongs into one."""
    rest = {f"{VAE_PREFIX}decoder.conv_in.weight": torch.ones(2), "cond_stage_model.transformer.x": torch.ones(2)}
    return random_weights(SMALL[architecture], prefix=UNET_PREFIX) | rest


@pytest.mark.parametrize("prefix", [UNET_PREFIX, ""])
@pytest.mark.parametrize("architecture", SMALL)
def test_kind(save, architecture, prefix):
    file = Checkpoint.open(save(random_weights(SMALL[architecture], prefix=prefix)))
    assert file.kind == architecture.removesuffix("-inpainting")


def test_load_unet_reads_its_own_tensors_only(save, monkeypatch):
    sizes = []

    class Recorder(io.FileIO):
        def readinto(self, buffer):
            sizes.append(memoryview(buffer).nbytes)
            return super().readinto(buffer)

    path = save(whole())
    monkeypatch.setattr(Path, "open", lambda path, mode: Recorder(path, mode))
    load_unet(path)
    own = random_weights(SMALL["sd1"]).values()
    assert sorted(sizes) == sorted(value.numel() * value.element_size() for value in own)


def test_a_part_is_in_memory_once_and_one_tensor_more(save):
    """Of what is streamed, nothing is held; of a mapped file all pages that were read would count."""
    part = {f"{UNET_PREFIX}{i}": torch.full((64, 64), float(i)) for i in range(20)}
    file = Checkpoint.open(save({**part, "other": torch.zeros(3)}))
    held = []
    for key, value in file.stream(UNET_PREFIX):
        held.append(weakref.ref(value.untyped_storage()))
        assert torch.equal(value, part[UNET_PREFIX + key])
        del value
        assert sum(ref() is not None for ref in held[:-1]) == 0
    assert len(held) == len(part)


def test_stream_knows_all_dtypes_of_the_format(save):
    numbers = {str(dtype): torch.tensor([[0, 1, 2]]).to(dtype) for dtype in DTYPES.values()}
    numbers["none"], numbers["one"] = torch.zeros(0, 3), torch.tensor(5.0)
    read = dict(Checkpoint.open(save(numbers)).stream(""))
    assert set(read) == set(numbers)
    for key, value in numbers.items():
        assert (read[key].dtype, read[key].shape) == (value.dtype, value.shape)
        assert torch.equal(read[key].float(), value.float())


@pytest.mark.parametrize("architecture", SMALL)
def test_load_unet_gives_the_files_weights(save, architecture):
    inputs = random_inputs(SMALL[architecture])
    from_file = load_unet(save(whole(architecture)))
    assert torch.equal(from_file(*inputs), load_unet(random_weights(SMALL[architecture]))(*inputs))


def test_a_file_in_half_precision_is_loaded_in_any_precision(save):
    weights = {name: value.half() for name, value in random_weights(SMALL["sd1"]).items()}
    path = save(weights)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        loaded = load_unet(path, dtype=dtype).state_dict()
        assert all(torch.equal(loaded[name], value.to(dtype)) for name, value in weights.items())


def test_read_takes_a_part_and_casts_floats(save):
    path = save({"a.x": torch.tensor([1.5, 2.5]), "a.ids": torch.tensor([7]), "b.x": torch.ones(1)})
    part = Checkpoint.open(path).read("a.", torch.float16)
    assert {name: (value.dtype, value.tolist()) for name, value in part.items()} == {
        "x": (torch.float16, [1.5, 2.5]),
        "ids": (torch.int64, [7]),
    }


def test_what_was_read_does_not_depend_on_the_file(save):
    path = save({"x": torch.ones(1000)})
    file = Checkpoint.open(path)
    value = file.read("")["x"]
    value.zero_()
    assert file.read("")["x"].sum() == 1000
    path.write_bytes(bytes(path.stat().st_size))
    assert value.sum() == 0


@pytest.mark.parametrize("sign", ["v", "v_prediction", "V"])
def test_v_prediction_by_metadata(save, sign):
    path = save(whole(), {"modelspec.prediction_type": sign})
    assert (Checkpoint.open(path).prediction, load_unet(path).prediction) == ("v", "v")


def test_v_prediction_by_key(save):
    tensors = whole() | {"v_pred": torch.empty(0)}
    assert (load_unet(save(tensors)).prediction, load_unet(tensors).prediction) == ("v", "v")


@pytest.mark.parametrize(
    "line",
    ["parameterization: v", '    parameterization: "v"', "  parameterization: 'v' # 768",
     "  target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling"],
)  # fmt: skip
def test_v_prediction_by_config_beside_the_file(save, line):
    path = save(whole())
    path.with_suffix(".yaml").write_text(f"model:\n  params:\n{line}\n    timesteps: 1000\n", "utf-8")
    assert load_unet(path).prediction == "v"


@pytest.mark.parametrize(
    "config",
    ["model: {}", "parameterization: eps", "# parameterization: v", "parameterization: vlb", b"\xff\xfe\x00",
     "target: sgm.modules.diffusionmodules.denoiser_scaling.VScalingWithEDMcNoise", "# target: x.VScaling"],
)  # fmt: skip
def test_epsilon_unless_something_says_v(save, config):
    path = save(whole())
    path.with_suffix(".yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
    assert (load_unet(path).prediction, load_unet(whole()).prediction) == ("epsilon", "epsilon")


def test_metadata_prevails_over_the_config(save):
    path = save(whole(), {"modelspec.prediction_type": "epsilon"})
    path.with_suffix(".yaml").write_text("parameterization: v")
    assert load_unet(path).prediction == "epsilon"


def keys(*names):
    return {name: torch.ones(2) for name in names}


FOREIGN = {
    "VAE": (keys("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"), "this looks like a VAE"),
    "VAE with prefix": (keys(f"{VAE_PREFIX}decoder.conv_in.weight"), "this looks like a VAE"),
    "LoRA": (keys("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "this looks like a LoRA"),
    "LoRA of diffusers": (keys("unet.down_blocks.0.attentions.0.proj_in.lora.down.weight"), "this looks like a LoRA"),
    "LoRA of PEFT": (keys("base_model.model.proj.lora_A.weight"), "this looks like a LoRA"),
    "SD3": (keys(f"{UNET_PREFIX}joint_blocks.0.x", f"{VAE_PREFIX}decoder.conv_in.weight"), "a Stable Diffusion 3"),
    "FLUX": (keys("double_blocks.0.img_attn.qkv.weight"), "this looks like a FLUX"),
    "FLUX with prefix": (keys(f"{UNET_PREFIX}double_blocks.0.img_attn.qkv.weight"), "this looks like a FLUX"),
    "ControlNet": (keys("control_model.input_blocks.0.0.weight"), "this looks like a ControlNet"),
    "ControlNet of diffusers": (keys("controlnet_down_blocks.0.weight", "down_blocks.0.x"), "looks like a ControlNet"),
    "diffusers' U-Net": (keys("down_blocks.0.resnets.0.conv1.weight", "mid_block.x"), "a model in diffusers' format"),
    "embedding": (keys("emb_params"), "this looks like a textual inversion embedding"),
    "random tensors": (keys("y", "x", "z", "w"), "4 tensors, such as w, x, y"),
    "no tensors": ({}, "0 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_other_files_are_refused_by_what_they_are(save, what):
    tensors, says = FOREIGN[what]
    path = save(tensors() if callable(tensors) else tensors)
    for use in (load_unet, lambda path: Checkpoint.open(path).kind):
        message = refusal(use, path)
        assert "no Stable Diffusion U-Net in" in message
        assert says in message


def refusal(use, path) -> str:
    """The message of the CheckpointError that ``use`` raises: one line that names the file."""
    with pytest.raises(CheckpointError) as error:
        use(path)
    message = str(error.value)
    assert message.count(str(path)) == 1
    assert "\n" not in message
    return message


def test_unknown_architecture_names_the_tensor_and_is_not_mistaken_for_a_vae(save):
    path = save(whole() | {f"{UNET_PREFIX}middle_block.3.gate": torch.ones(2)})
    message = refusal(load_unet, path)
    assert "unknown U-Net architecture (middle_block.3. holds gate)" in message
    assert "tensors with a U-Net among them" in message


def test_unknown_architecture_is_refused_before_weights_are_read(save, monkeypatch):
    path = save(whole() | {f"{UNET_PREFIX}extra": torch.ones(2)})
    monkeypatch.setattr(Checkpoint, "read", lambda *args: pytest.fail("weights were read"))
    assert "1 tensors unexpected, such as extra" in refusal(load_unet, path)


@pytest.mark.parametrize("part", [0.0, 0.00001, 0.001, 0.5, 0.999])
def test_truncated_file(save, part):
    path = save(whole())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert "truncated or not a safetensors file" in refusal(load_unet, path)


def test_file_truncated_after_it_was_opened(save):
    path = save(whole())
    file = Checkpoint.open(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert "can't be read" in refusal(lambda path: file.read(UNET_PREFIX), path)


def test_not_a_safetensors_file(tmp_path):
    path = tmp_path / "page.safetensors"
    path.write_text("<!DOCTYPE html>\n<html>Not found</html>\n" * 100)
    assert "truncated or not a safetensors file" in refusal(Checkpoint.open, path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model"])
def test_other_suffixes_are_not_even_opened(save, name):
    message = refusal(Checkpoint.open, save(whole(), name=name))
    assert "only .safetensors files are read, this is" in message
    assert (name.removeprefix("model") or "without suffix") in message


def test_missing_file_and_folder(tmp_path):
    assert "no such file" in refusal(load_unet, tmp_path / "gone.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "no such file" in refusal(load_unet, tmp_path / "folder.safetensors")


def test_endings_in_capitals_are_read(save):
    assert Checkpoint.open(save(whole(), name="Model.SAFETENSORS")).kind == "sd1"
