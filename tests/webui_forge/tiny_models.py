"""A host extension of the tests alone: lets a WebUI with Forge's backend load the demo's tiny checkpoints.

The backend tells a checkpoint by its U-Net's numbers (``huggingface_guess.model_list``), and builds the other parts
from a folder in the layout of diffusers. Both are extended at run time: a subclass of SD15 and of SDXL with the numbers
of ``demo/general.yaml`` and of ``checkpoints.py``, and a folder for each.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import backend
from backend.diffusion_engine.sd15 import StableDiffusion
from backend.diffusion_engine.sdxl import StableDiffusionXL

try:
    from huggingface_guess import model_list  # Forge and ersatzForge: beside their own packages
except ImportError:
    from modules_forge.packages.huggingface_guess import model_list  # Forge Neo

HUGGINGFACE = Path(backend.__path__[0]) / "huggingface"
EXTENSION = Path(__file__).resolve().parents[1]
CLIP = EXTENSION.parent / "sd-webui-denoiser-fusion/demo/clip"
# fmt: off
VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [32, 32, 32, 64], "in_channels": 3,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "latent_channels": 4, "layers_per_block": 1,
       "norm_num_groups": 32, "out_channels": 3, "sample_size": 128, "up_block_types": ["UpDecoderBlock2D"] * 4}
# fmt: on


def write_parts(name: str, source: str, pipeline: dict, scaling: float) -> str:
    """The folder of one kind of checkpoint; ``source``: that of the real kind, whose scheduler is taken over."""
    folder = EXTENSION / name
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("scheduler", "unet"):
        shutil.copytree(HUGGINGFACE / source / part, folder / part)
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text(json.dumps(VAE | {"scaling_factor": scaling}))
    for encoder in (part for part in pipeline if part.startswith("text_encoder")):
        tokenizer = folder / encoder.replace("text_encoder", "tokenizer")
        shutil.copytree(CLIP, tokenizer, ignore=shutil.ignore_patterns("config.json"))
        shutil.copytree(CLIP, folder / encoder, ignore=lambda _, files: [f for f in files if f != "config.json"])
    (folder / "model_index.json").write_text(json.dumps(pipeline))
    return str(folder)  # joined to the backend's own folder, an absolute path stands for itself


def pipeline(name: str, scheduler: str, *encoders: str) -> dict:
    index = {"_class_name": name, "_diffusers_version": "0.6.0", "scheduler": ["diffusers", scheduler],
             "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}  # fmt: skip
    for number, encoder in enumerate(encoders):
        end = f"_{number + 1}" if number else ""
        index |= {f"text_encoder{end}": ["transformers", encoder], f"tokenizer{end}": ["transformers", "CLIPTokenizer"]}
    return index


class TinySD1(model_list.SD15):
    huggingface_repo = write_parts("tiny-sd1", "runwayml/stable-diffusion-v1-5", pipeline(
        "StableDiffusionPipeline", "PNDMScheduler", "CLIPTextModel"), 0.18215)  # fmt: skip
    unet_config = {**model_list.SD15.unet_config, "model_channels": 64, "context_dim": 64}


class TinySDXL(model_list.SDXL):
    huggingface_repo = write_parts("tiny-sdxl", "stabilityai/stable-diffusion-xl-base-1.0", pipeline(
        "StableDiffusionXLPipeline", "EulerDiscreteScheduler", "CLIPTextModel", "CLIPTextModelWithProjection"),
        0.13025)  # fmt: skip
    unet_config = {**model_list.SDXL.unet_config, "model_channels": 64, "context_dim": 128, "adm_in_channels": 1600,
                   "transformer_depth": [0, 0, 1, 1, 1, 1]}  # fmt: skip


for engine, kind in ((StableDiffusion, TinySD1), (StableDiffusionXL, TinySDXL)):
    known = [found for found in model_list.models if found.__name__ != kind.__name__]  # this runs at each UI reload
    model_list.models[:] = [kind, *known]
    guesses = [found for found in engine.matched_guesses if found.__name__ != kind.__name__]
    engine.matched_guesses = [*guesses, kind]
