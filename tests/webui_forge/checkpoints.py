"""Tiny checkpoints of the kinds that the demo has not: SDXL, SDXL that predicts v, and SD1 for inpainting."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lib_fusion.unet.checkpoint import UNET_PREFIX
from tests.helpers import SMALL, Weights, random_weights

#: The width of the demo's texts, and of each encoder of the tiny SDXL.
WIDTH = 64
SDXL = SMALL["sdxl"] | {"transformer_depth": (0, 1, 1), "context_dim": 2 * WIDTH, "adm_in_channels": WIDTH + 6 * 256}
FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
TEXT = "cond_stage_model.transformer."


def write(demo: Path, models: Path) -> None:
    """tiny_xl, tiny_xl_b, tiny_xl_v, tiny_inpaint, its copy, other_text and general_copy, from ``general``.

    And beside their folder a ControlNet.

    Those of SDXL have its VAE, and its text encoder in place of both of theirs.
    """
    general = load_file(demo / "general.safetensors")
    write_control(general, models.with_name("ControlNet"))
    vae = {key: value for key, value in general.items() if key.startswith("first_stage_model.")}
    text = {key.removeprefix(TEXT): value for key, value in general.items() if key.startswith(TEXT)}
    encoders = {FIRST + key: value for key, value in text.items()} | open_clip(text)
    for name, seed in (("tiny_xl", 1), ("tiny_xl_b", 2), ("tiny_xl_v", 3)):
        told = {"v_pred": torch.zeros(0)} if name.endswith("v") else {}
        unet = {key: value.half() for key, value in random_weights(SDXL, seed, UNET_PREFIX).items()}
        save_file({**unet, **vae, **encoders, **told}, models / f"{name}.safetensors")
    generator = torch.Generator().manual_seed(6)
    other = {TEXT + key: value + 0.02 * torch.randn(value.shape, generator=generator).to(value)
             for key, value in text.items() if value.is_floating_point()}  # fmt: skip
    save_file(general | other, models / "other_text.safetensors")
    for name, weights in (("general", general), ("tiny_inpaint", general | inpainting(general))):
        if name != "general":
            save_file(weights, models / f"{name}.safetensors")
        save_file(weights, models / f"{name}_copy.safetensors", {"title": "the same weights in another file"})


def write_control(general: Weights, folder: Path) -> None:
    """A ControlNet in the format of the original ones, which changes a picture a lot: the encoder and random layers."""
    copied = ("time_embed.", "input_blocks.", "middle_block.")
    unet = {key.removeprefix(UNET_PREFIX): value for key, value in general.items() if key.startswith(UNET_PREFIX)}
    made = {key: value.clone() for key, value in unet.items() if key.startswith(copied)}
    width = len(made["input_blocks.0.0.weight"])  # of all blocks
    widths = (3, 16, 16, 32, 32, 96, 96, 256, width)
    shapes = {f"input_hint_block.{2 * i}": (out, into, 3, 3) for i, (into, out) in enumerate(pairwise(widths))}
    blocks = {key.split(".")[1] for key in made if key.startswith("input_blocks.")}
    shapes |= {f"zero_convs.{block}.0": (width, width, 1, 1) for block in blocks}
    shapes["middle_block_out.0"] = (width, width, 1, 1)
    generator = torch.Generator().manual_seed(10)
    for name, shape in sorted(shapes.items()):
        std = 0.5 / (shape[1] * shape[2] * shape[3]) ** 0.5
        made[f"{name}.weight"] = (torch.randn(shape, generator=generator) * std).half()
        made[f"{name}.bias"] = (torch.randn(shape[0], generator=generator) * 0.1).half()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"control_model.{key}": value for key, value in made.items()}, folder / "tiny_control.safetensors")


def inpainting(general: Weights) -> Weights:
    """The first convolution for five more channels, the mask and the masked picture's latent."""
    key = f"{UNET_PREFIX}input_blocks.0.0.weight"
    more = 0.05 * torch.randn(len(general[key]), 5, 3, 3, generator=torch.Generator().manual_seed(4))
    return {key: torch.cat([general[key], more.to(general[key])], dim=1)}


def open_clip(text: Weights) -> Weights:
    """A text encoder's tensors under the names of OpenCLIP, as SDXL's second one has them; its projection is random."""
    names = {"embeddings.token_embedding.weight": "token_embedding.weight",
             "embeddings.position_embedding.weight": "positional_embedding",
             "final_layer_norm.": "ln_final."}  # fmt: skip
    parts = {"layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
             "self_attn.out_proj.": "attn.out_proj."}  # fmt: skip
    found: Weights = {}
    for key, value in text.items():
        name = key.removeprefix("text_model.")
        if name.startswith("encoder.layers."):
            number, _, part = name.removeprefix("encoder.layers.").partition(".")
            own = next((part.replace(old, new) for old, new in parts.items() if part.startswith(old)), None)
            if own:
                found[f"{SECOND}transformer.resblocks.{number}.{own}"] = value.clone()
        else:
            own = next((name.replace(old, new) for old, new in names.items() if name.startswith(old)), None)
            if own:
                found[SECOND + own] = value.clone()
    layers = {key.split(".")[3] for key in text if key.startswith("text_model.encoder.layers.")}
    for number in layers:
        for kind in ("weight", "bias"):
            own = [text[f"text_model.encoder.layers.{number}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{SECOND}transformer.resblocks.{number}.attn.in_proj_{kind}"] = torch.cat(own)
    generator = torch.Generator().manual_seed(5)
    found[f"{SECOND}text_projection"] = torch.randn(WIDTH, WIDTH, generator=generator) * WIDTH**-0.5
    return found
