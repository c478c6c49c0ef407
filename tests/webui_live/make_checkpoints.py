"""Writes tiny checkpoints with random weights, run by the host's Python: ``make_checkpoints.py DATA_DIR WEBUI_DIR``.

tiny_a, tiny_b, tiny_c: SD1 with one VAE; tiny_copy: tiny_a's weights in another file; tiny_v: predicts v;
tiny_2, tiny_2_v: SD2 with tiny_a's VAE, without the tensors that nothing uses; tiny_inpaint: nine channels; tiny_xl,
tiny_xl_b, tiny_xl_v: SDXL with one VAE; tiny_unet: a U-Net without a text encoder. tiny_ti, wide_ti: textual inversions
for SD1 and SD2. In models/Lora: tiny_lora for SD1's U-Net and text encoder, lora_xl for SDXL's and both text encoders,
one of each kind for SD1's U-Net (lora_KIND) and SDXL's (xl_KIND), lora_bundled with a textual inversion; to be refused:
lora_wrong, lora_nothing. With a third argument ``extensions`` only: tiny_a, tiny_copy, tiny_b; tiny_2x: SD1 with
features of 640 and 320 channels, where sd-webui-freeu acts; tiny_control: a ControlNet for tiny_a; tiny_lora.
"""

from __future__ import annotations

import copy
import json
import sys
from itertools import pairwise
from pathlib import Path

DATA, WEBUI = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
sys.path[:0] = [str(WEBUI / "repositories" / name) for name in ("stable-diffusion-stability-ai", "generative-models")]

import open_clip  # noqa: E402
import torch  # noqa: E402
from ldm.util import instantiate_from_config  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402
from transformers.models.clip.tokenization_clip import bytes_to_unicode  # noqa: E402

MODELS = DATA / "models/Stable-diffusion"
CLIP = DATA / "tiny-clip"
OPEN_CLIP = DATA / "tiny-openclip"
WIDTH = 32
#: Of SD2's texts, which no SD1 model takes.
WIDTH_2 = 48


def make_clip() -> None:
    """A tokenizer of single bytes and a text encoder's config. Weights serve only to build the models from."""
    CLIP.mkdir(parents=True, exist_ok=True)
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (CLIP / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    (CLIP / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    files = str(CLIP / "vocab.json"), str(CLIP / "merges.txt")
    CLIPTokenizer(*files, model_max_length=77).save_pretrained(CLIP)
    end = len(words) - 1
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=WIDTH, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(CLIP)


def make_open_clip() -> None:
    """SDXL's second encoder and SD2's, small; the host learns their names from a one-file extension."""
    OPEN_CLIP.mkdir(parents=True, exist_ok=True)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    for name, width in (("tiny-openclip", WIDTH), ("tiny-openclip-2", WIDTH_2)):
        text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": 2, "layers": 3}
        config = {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}
        (OPEN_CLIP / f"{name}.json").write_text(json.dumps(config), "utf-8")
    open_clip.add_model_config(str(OPEN_CLIP))
    scripts = DATA / "extensions/tiny-openclip/scripts"
    scripts.mkdir(parents=True, exist_ok=True)
    # In the host, and in any process that has the folder on its PYTHONPATH.
    for path in (scripts / "register.py", OPEN_CLIP / "sitecustomize.py"):
        path.write_text(f"import open_clip\nopen_clip.add_model_config({str(OPEN_CLIP)!r})\n", "utf-8")


VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
       "ch_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip


def sd1_config(**params: object) -> dict:
    unet = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 2,
            "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "num_heads": 2, "context_dim": WIDTH,
            "use_spatial_transformer": True, "transformer_depth": 1, "use_checkpoint": False,
            "legacy": False}  # fmt: skip
    loss = {"target": "torch.nn.Identity"}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        "linear_start": 0.00085, "linear_end": 0.0120, "num_timesteps_cond": 1, "log_every_t": 200, "timesteps": 1000,
        "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": 64, "channels": 4, "use_ema": False,
        "cond_stage_trainable": False, "conditioning_key": "crossattn", "monitor": "x", "scale_factor": 0.18215,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {
            "embed_dim": 4, "monitor": "x", "ddconfig": VAE, "lossconfig": loss}},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {
            "version": str(CLIP), "device": "cpu"}}} | params}}  # fmt: skip


def sd2_config(**params: object) -> dict:
    config = sd1_config(**params)
    unet = config["model"]["params"]["unet_config"]["params"]
    del unet["num_heads"]
    unet |= {"num_head_channels": 16, "use_linear_in_transformer": True, "context_dim": WIDTH_2}
    config["model"]["params"]["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"arch": "tiny-openclip-2", "version": "", "freeze": True, "layer": "penultimate"}}  # fmt: skip
    return config


def inpainting_config() -> dict:
    config = sd1_config(conditioning_key="hybrid", finetune_keys=None)
    config["model"]["target"] = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    config["model"]["params"]["unet_config"]["params"]["in_channels"] = 9
    return config


def sdxl_config() -> dict:
    module = "sgm.modules.diffusionmodules."
    encoders = "sgm.modules.encoders.modules."

    def number(key: str) -> dict:
        return {"is_trainable": False, "input_key": key, "params": {"outdim": 256},
                "target": encoders + "ConcatTimestepEmbedderND"}  # fmt: skip

    denoiser = {"num_idx": 1000, "weighting_config": {"target": module + "denoiser_weighting.EpsWeighting"},
                "scaling_config": {"target": module + "denoiser_scaling.EpsScaling"},
                "discretization_config": {"target": module + "discretizer.LegacyDDPMDiscretization"}}  # fmt: skip
    unet = {"adm_in_channels": WIDTH + 6 * 256, "num_classes": "sequential", "use_checkpoint": False, "in_channels": 4,
            "out_channels": 4, "model_channels": 32, "attention_resolutions": [4, 2], "num_res_blocks": 2,
            "channel_mult": [1, 2, 4], "num_head_channels": 16, "use_spatial_transformer": True, "legacy": False,
            "use_linear_in_transformer": True, "transformer_depth": [1, 1, 2], "context_dim": 2 * WIDTH,
            "spatial_transformer_attn_type": "softmax"}  # fmt: skip
    first = {"is_trainable": False, "input_key": "txt", "target": encoders + "FrozenCLIPEmbedder",
             "params": {"version": str(CLIP), "device": "cpu", "layer": "hidden", "layer_idx": 2}}  # fmt: skip
    second = {"is_trainable": False, "input_key": "txt", "target": encoders + "FrozenOpenCLIPEmbedder2",
              "params": {"arch": "tiny-openclip", "version": "", "device": "cpu", "freeze": True,
                         "layer": "penultimate", "always_return_pooled": True, "legacy": False}}  # fmt: skip
    sizes = [number(f"{what}_as_tuple") for what in ("original_size", "crop_coords_top_left", "target_size")]
    sizes[1]["input_key"] = "crop_coords_top_left"
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": {
        "scale_factor": 0.13025, "disable_first_stage_autocast": True,
        "denoiser_config": {"target": module + "denoiser.DiscreteDenoiser", "params": denoiser},
        "network_config": {"target": module + "openaimodel.UNetModel", "params": unet},
        "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {
            "emb_models": [first, second, sizes[0], sizes[1], sizes[2]]}},
        "first_stage_config": {"target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper", "params": {
            "embed_dim": 4, "monitor": "x", "ddconfig": VAE | {"attn_type": "vanilla"},
            "lossconfig": {"target": "torch.nn.Identity"}}}}}}  # fmt: skip


VELOCITY = "sgm.modules.diffusionmodules.denoiser_scaling.VScaling"


def build(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """A model's tensors; layers that begin as zeros are filled, so that every block changes the picture."""
    torch.manual_seed(seed)
    model = instantiate_from_config(OmegaConf.create(config).model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and not parameter.any():
                parameter.normal_(0, 0.05 if parameter.dim() > 1 else 0.01)
    return {key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}


def vary(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Another model of the same architecture and VAE."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for key, value in weights.items():
        changes = value.is_floating_point() and value.dim() > 1 and not key.startswith("first_stage_model.")
        noise = torch.randn(value.shape, generator=generator) * value.float().std() if changes else 0
        result[key] = value + 0.5 * noise if changes else value
    return result


def write(name: str, weights: dict[str, torch.Tensor], config: dict, metadata: dict | None = None) -> None:
    save_file(weights, MODELS / f"{name}.safetensors", metadata)
    OmegaConf.save(OmegaConf.create(copy.deepcopy(config)), MODELS / f"{name}.yaml")


def save_lora(name: str, tensors: dict[str, torch.Tensor]) -> None:
    folder = DATA / "models/Lora"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")


def write_lora(name: str, weights: dict[str, torch.Tensor]) -> None:
    """A LoRA on the attention of U-Net and text encoder."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for key, value in weights.items():
        path = key.removesuffix(".weight")
        if path.startswith("model.diffusion_model.") and path.endswith((".attn1.to_q", ".attn2.to_k")):
            layer = "lora_unet_" + path.removeprefix("model.diffusion_model.").replace(".", "_")
        elif path.startswith("cond_stage_model.transformer.") and path.endswith((".q_proj", ".v_proj")):
            layer = "lora_te_" + path.removeprefix("cond_stage_model.transformer.").replace(".", "_")
        else:
            continue
        tensors[f"{layer}.lora_down.weight"] = torch.randn(4, value.shape[1], generator=generator)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(value.shape[0], 4, generator=generator) * 0.3
        tensors[f"{layer}.alpha"] = torch.tensor(4.0)
    save_lora(name, tensors)


def make_lora_kinds(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of one LoRA of every kind that the host knows, on some layers of a U-Net, by the kinds' names."""
    generator = torch.Generator().manual_seed(9)

    def noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    def attention(out: int, into: int, weight: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        down, up, alpha = noise(3, into), noise(out, 3, scale=0.3), torch.tensor(3.0)
        low_rank = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
        return {
            "lora": low_rank,
            "dora": {**low_rank, "dora_scale": 1.3 * weight.float().norm(dim=0, keepdim=True)},
            "loha": {"hada_w1_a": noise(out, 2, scale=0.5), "hada_w1_b": noise(2, into),
                     "hada_w2_a": noise(out, 2, scale=0.5), "hada_w2_b": noise(2, into), "alpha": torch.tensor(2.0)},
            "lokr": {"lokr_w1": noise(4, 4, scale=0.2), "lokr_w2": noise(out // 4, into // 4)},
            "full": {"diff": noise(out, into, scale=0.2)},
            "ia3": {"weight": noise(out, scale=0.5), "on_input": torch.tensor(False)},
            "glora": {"a1.weight": noise(2, into, scale=0.3), "a2.weight": noise(into, 2, scale=0.3),
                      "b1.weight": noise(2, into, scale=0.3), "b2.weight": noise(out, 2, scale=0.3),
                      "alpha": torch.tensor(2.0)},
            "oft": {"oft_blocks": noise(4, out // 4, out // 4, scale=0.3), "alpha": torch.tensor(1.0)},
        }  # fmt: skip

    def convolution(out: int, into: tuple[int, ...]) -> dict[str, dict[str, torch.Tensor]]:
        down, up = noise(3, *into, scale=0.3), noise(out, 3, 1, 1, scale=0.2)
        return {"locon": {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(3.0)}}

    def norm(size: int) -> dict[str, dict[str, torch.Tensor]]:
        return {"norm": {"w_norm": noise(size, scale=0.5), "b_norm": noise(size, scale=0.5)}}

    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for key, weight in weights.items():
        if not key.startswith("model.diffusion_model.") or not key.endswith(".weight"):
            continue
        path = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
        found: dict[str, dict[str, torch.Tensor]] = {}
        if path.endswith((".attn1.to_q", ".attn2.to_v")):
            found = attention(*weight.shape, weight)
        elif path.endswith((".in_layers.2", ".op")):
            found = convolution(weight.shape[0], weight.shape[1:])
        elif path.endswith((".norm1", ".in_layers.0")):
            found = norm(len(weight))
        for kind, tensors in found.items():
            layer = "lora_unet_" + path.replace(".", "_")
            kinds.setdefault(kind, {}).update({f"{layer}.{name}": value for name, value in tensors.items()})
    return kinds


def write_lora_kinds(prefix: str, weights: dict[str, torch.Tensor]) -> None:
    for kind, tensors in make_lora_kinds(weights).items():
        save_lora(f"{prefix}_{kind}", tensors)


def write_odd_loras(weights: dict[str, torch.Tensor]) -> None:
    """One that brings a textual inversion with it; one with layers of other shapes, one for no layer of the U-Net."""
    tensors = make_lora_kinds(weights)["lora"]
    save_lora("lora_bundled", tensors | {"bundle_emb.tinyword.string_to_param.*": torch.ones(2, WIDTH)})
    save_lora("lora_wrong", {k: torch.cat([v, v]) if k.endswith("up.weight") else v for k, v in tensors.items()})
    save_lora("lora_nothing", {"lora_unet_down_blocks_9_nothing.lora_up.weight": torch.ones(2, 2)})


def write_lora_xl(name: str, weights: dict[str, torch.Tensor]) -> None:
    """A LoRA of SDXL's U-Net and both its text encoders; the second's attention is one layer for q, k and v."""
    generator = torch.Generator().manual_seed(12)
    tensors = {}

    def add(layer: str, out: int, into: int) -> None:
        tensors[f"{layer}.lora_down.weight"] = torch.randn(4, into, generator=generator)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.3
        tensors[f"{layer}.alpha"] = torch.tensor(4.0)

    unet, first = "model.diffusion_model.", "conditioner.embedders.0.transformer."
    for key, value in weights.items():
        path = key.removesuffix(".weight")
        if path.startswith(unet) and path.endswith((".attn1.to_q", ".attn2.to_k")):
            add("lora_unet_" + path.removeprefix(unet).replace(".", "_"), *value.shape)
        if path.startswith(first) and path.endswith((".q_proj", ".v_proj")):
            add("lora_te1_" + path.removeprefix(first).replace(".", "_"), *value.shape)
    for i in range(2):
        layer = f"lora_te2_text_model_encoder_layers_{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"{layer}_self_attn_{part}", WIDTH, WIDTH)
        add(f"{layer}_mlp_fc1", 4 * WIDTH, WIDTH)
    save_lora(name, tensors)


def write_embedding(name: str, width: int) -> None:
    """A textual inversion of three vectors."""
    folder = DATA / "embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    save_file({"emb_params": vectors}, folder / f"{name}.safetensors")


def write_control(name: str, weights: dict[str, torch.Tensor]) -> None:
    """A ControlNet in the format of the original ones, for a U-Net; it changes a picture a lot."""
    prefix = "model.diffusion_model."
    copied = ("time_embed.", "input_blocks.", "middle_block.")
    made = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    made = {key: value for key, value in made.items() if key.startswith(copied)}
    skips = [made[f"input_blocks.{i}.0.{layer}"].shape[0] for i in range(12)
             for layer in ("weight", "out_layers.3.weight", "op.weight") if f"input_blocks.{i}.0.{layer}" in made]
    widths = (3, 16, 16, 32, 32, 96, 96, 256, skips[0])
    convs = {f"input_hint_block.{2 * i}": (out, into, 3, 3) for i, (into, out) in enumerate(pairwise(widths))}
    convs |= {f"zero_convs.{i}.0": (width, width, 1, 1) for i, width in enumerate(skips)}
    convs["middle_block_out.0"] = (skips[-1], skips[-1], 1, 1)
    generator = torch.Generator().manual_seed(10)
    for key, shape in convs.items():
        std = 0.5 / (shape[1] * shape[2] * shape[3]) ** 0.5
        made[f"{key}.weight"] = torch.randn(shape, generator=generator) * std
        made[f"{key}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    folder = DATA / "models/ControlNet"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"control_model.{key}": value for key, value in made.items()}, folder / f"{name}.safetensors")


def make_for_extensions(config: dict, first: dict[str, torch.Tensor]) -> None:
    write_control("tiny_control", first)
    write_lora("tiny_lora", first)
    wide = copy.deepcopy(config)
    unet = wide["model"]["params"]["unet_config"]["params"]
    unet |= {"model_channels": 320, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": []}
    weights = build(wide, 11)
    weights |= {key: value for key, value in first.items() if key.startswith("first_stage_model.")}
    write("tiny_2x", {key: v.half() if v.is_floating_point() else v for key, v in weights.items()}, wide)


def main() -> None:
    torch.set_num_threads(1)
    MODELS.mkdir(parents=True, exist_ok=True)
    make_clip()
    make_open_clip()
    config = sd1_config()
    first = build(config, 1)
    second = vary(first, 2)
    write("tiny_a", first, config)
    write("tiny_copy", first, config, {"title": "the same weights in another file"})
    write("tiny_b", second, config)
    if sys.argv[3:] == ["extensions"]:
        make_for_extensions(config, first)
        return
    write_lora("tiny_lora", first)
    write_lora_kinds("lora", first)
    write_odd_loras(first)
    write_embedding("tiny_ti", WIDTH)
    write_embedding("wide_ti", WIDTH_2)
    write("tiny_c", vary(first, 6), config)
    write("tiny_v", first, sd1_config(parameterization="v"))
    write("tiny_v_copy", first, sd1_config(parameterization="v"), {"title": "the same weights in another file"})
    write("tiny_v_b", second, sd1_config(parameterization="v"))
    write("tiny_unet", {k: v for k, v in second.items() if k.startswith("model.diffusion_model.")}, config)
    two = build(sd2_config(), 8)
    two |= {key: value for key, value in first.items() if key.startswith("first_stage_model.")}
    idle = ("model.text_projection", "model.logit_scale", "model.transformer.resblocks.2.")
    two = {key: value for key, value in two.items() if not key.startswith(tuple(f"cond_stage_model.{i}" for i in idle))}
    write("tiny_2", two, sd2_config())
    write("tiny_2_v", vary(two, 9), sd2_config(parameterization="v"))
    nine = inpainting_config()
    inpainting = build(nine, 3)
    write("tiny_inpaint", inpainting, nine)
    write("tiny_inpaint_copy", inpainting, nine, {"title": "the same weights in another file"})
    sdxl = sdxl_config()
    large = build(sdxl, 4)
    write("tiny_xl", large, sdxl)
    write_lora_xl("lora_xl", large)
    write_lora_kinds("xl", large)
    write("tiny_xl_copy", large, sdxl, {"title": "the same weights in another file"})
    write("tiny_xl_b", vary(large, 5), sdxl)
    sdxl["model"]["params"]["denoiser_config"]["params"]["scaling_config"]["target"] = VELOCITY
    write("tiny_xl_v", vary(large, 5), sdxl)
    for name in ("pytorch_model.bin", "model.safetensors"):
        (CLIP / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
