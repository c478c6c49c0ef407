"""Puts trained parts into one file in the SD1 checkpoint format, with the .yaml that the WebUI builds it from."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTextModel

from demo.experts import UNET
from demo.text import WIDTH
from demo.vae import CHANNELS, SCALE
from lib_fusion.unet.checkpoint import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX
from lib_fusion.unet.model import UNet

#: The tokenizer's folder as seen from the WebUI's root, where it is started.
CLIP_FOLDER = "extensions/sd-webui-denoiser-fusion/demo/clip"

YAML = """\
# {title}; goes with {name}.safetensors.
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 16
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: {scale}
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 16
        in_channels: 4
        out_channels: 4
        model_channels: {model_channels}
        attention_resolutions: {attention_resolutions}
        num_res_blocks: {num_res_blocks}
        channel_mult: {channel_mult}
        num_heads: 8
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: {context_dim}
        use_checkpoint: false
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 128
          in_channels: 3
          out_ch: 3
          ch: {vae_channels}
          ch_mult: {vae_mult}
          num_res_blocks: 1
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        version: {clip}
        device: cpu
"""


def ldm_vae_name(name: str, levels: int) -> str:
    """The LDM AutoencoderKL's name of a diffusers AutoencoderKL tensor."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for theirs, ldm in (
        ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
        ("to_out.0", "proj_out"), ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
    ):  # fmt: skip
        name = name.replace(theirs, ldm)
    return name


def ldm_vae(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """The VAE's tensors under LDM's names; its attention's linear layers become 1x1 convolutions."""
    tensors = {}
    for name, value in vae.state_dict().items():
        ldm = ldm_vae_name(name, len(CHANNELS))
        is_attention = "mid.attn_1" in ldm and value.ndim == 2
        tensors[ldm] = value[..., None, None] if is_attention else value
    return tensors


def export(name: str, unet: UNet, vae: AutoencoderKL, text: CLIPTextModel, folder: Path) -> Path:
    """Writes ``folder/name.safetensors`` (float16) and ``folder/name.yaml``; returns the former."""
    tensors = {UNET_PREFIX + key: value for key, value in unet.state_dict().items()}
    tensors |= {VAE_PREFIX + key: value for key, value in ldm_vae(vae).items()}
    for key, value in text.state_dict().items():
        if not key.endswith("position_ids"):
            tensors[f"{TEXT_PREFIX}transformer.text_model.{key.removeprefix('text_model.')}"] = value
    path = folder / f"{name}.safetensors"
    save_file(
        {key: value.detach().cpu().half().contiguous() for key, value in tensors.items()},
        path, metadata={"modelspec.prediction_type": "epsilon", "modelspec.title": f"denoiser fusion demo: {name}"},
    )  # fmt: skip
    config = YAML.format(
        title=f"Tiny SD1-format checkpoint of the denoiser fusion demo: {name}",
        name=name, scale=SCALE, clip=CLIP_FOLDER,
        model_channels=UNET["model_channels"], attention_resolutions=list(UNET["attention_resolutions"]),
        num_res_blocks=UNET["num_res_blocks"], channel_mult=list(UNET["channel_mult"]), context_dim=WIDTH,
        vae_channels=CHANNELS[0], vae_mult=[c // CHANNELS[0] for c in CHANNELS],
    )  # fmt: skip
    path.with_suffix(".yaml").write_text(config, "utf-8")
    return path
