"""Loads an SD1 checkpoint: our U-Net, transformers' text encoder, diffusers' VAE; sizes come from its tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from lib_fusion.errors import CheckpointError
from lib_fusion.unet.checkpoint import TEXT_PREFIX, VAE_PREFIX, Checkpoint
from lib_fusion.unet.lora import Lora, with_loras
from lib_fusion.unet.model import UNet, load_unet
from lib_fusion.unet.model_file import ModelFile

#: The CLIP folder that SD1 checkpoints use; taken from the local cache or the model hub.
SD1_CLIP = "openai/clip-vit-large-patch14"
#: Width of one attention head of CLIP's text models, where no config.json says otherwise.
CLIP_HEAD_CHANNELS = 64
VAE_SCALE = 0.18215
TEXT_MODEL = "transformer."
TEXT_INNER = "text_model."


@dataclass
class TextEncoder:
    """A checkpoint's tokenizer and text model."""

    tokenizer: CLIPTokenizer
    model: CLIPTextModel

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Text states (B,77,D) of the texts, cut at 77 tokens, padded with the end token."""
        length = self.model.config.max_position_embeddings
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return self.model(tokens.input_ids.to(self.model.device)).last_hidden_state


@dataclass
class DiffusionModel:
    """One loaded model. ``vae`` is None for experts: the base's decodes."""

    file: ModelFile
    unet: UNet
    text: TextEncoder
    vae: AutoencoderKL | None


def check_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint's header and refuses what the engine can't run; raises CheckpointError."""
    file = Checkpoint.open(path)
    if file.kind != "sd1":
        raise CheckpointError(f"{path}: the embedded engine runs SD1 checkpoints, this is {file.kind}")
    if not any(key.startswith(TEXT_PREFIX + TEXT_MODEL) for key in file.shapes):
        raise CheckpointError(f"{path}: no text encoder ({TEXT_PREFIX}{TEXT_MODEL}*) in it")
    if not any(key.startswith(VAE_PREFIX) for key in file.shapes):
        raise CheckpointError(f"{path}: no VAE ({VAE_PREFIX}*) in it")
    return file


def load_model(
    file: Checkpoint, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", with_vae: bool = True
) -> DiffusionModel:
    """Loads U-Net and text encoder (and VAE, always float32) of a checked checkpoint."""
    return DiffusionModel(
        file=ModelFile(file.path),
        unet=load_unet(file.path, dtype=dtype, device=device),
        text=load_text(file, dtype, device),
        vae=load_vae(file, device) if with_vae else None,
    )


def add_loras(model: DiffusionModel, loras: Sequence[Lora]) -> DiffusionModel:
    """The model with LoRAs merged in. It shares all weights with ``model`` but those of the layers that they change."""
    if not loras:
        return model
    return replace(
        model, file=replace(model.file, loras=tuple(lora.file for lora in loras)),
        unet=with_loras(model.unet, [(lora.unet, lora.file.weight) for lora in loras]),
        text=add_text_loras(model.text, loras),
    )  # fmt: skip


def add_text_loras(text: TextEncoder, loras: Sequence[Lora]) -> TextEncoder:
    """The text encoder with the LoRAs' changes of it merged in."""
    # transformers 5 dropped the inner prefix that files, and older releases, have
    dropped = "" if hasattr(text.model, TEXT_INNER.strip(".")) else TEXT_INNER
    changes = [({key.removeprefix(dropped): change for key, change in lora.text.items()}, lora.file.weight)
               for lora in loras]  # fmt: skip
    return replace(text, model=with_loras(text.model, changes))


def clip_folder(path: Path) -> Path | str:
    """The CLIP folder that the checkpoint's .yaml names as ``version``, else SD1's.

    A relative folder is looked for from the working directory, then, by its last part, in the checkpoint's folder.
    """
    config = path.with_suffix(".yaml")
    text = config.read_text("utf-8") if config.is_file() else ""
    named = re.search(r"^\s*version:\s*(\S+)\s*$", text, re.MULTILINE)
    if named is None:
        return SD1_CLIP
    folder = Path(named[1].strip("\"'"))
    for candidate in (folder, path.parent / folder.name):
        if (candidate / "vocab.json").is_file():
            return candidate
    return str(folder)


def load_text(file: Checkpoint, dtype: torch.dtype, device: str | torch.device) -> TextEncoder:
    """The text encoder of a checked checkpoint."""
    tensors = file.read(TEXT_PREFIX + TEXT_MODEL, dtype)
    tensors = {k.removeprefix(TEXT_INNER): value for k, value in tensors.items() if not k.endswith("position_ids")}
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    folder = clip_folder(file.path)
    heads = width // CLIP_HEAD_CHANNELS
    if isinstance(folder, Path) and (folder / "config.json").is_file():
        heads = CLIPTextConfig.from_pretrained(folder).num_attention_heads
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.path}: its tokenizer {folder} is neither here nor on the model hub") from error
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("encoder.layers.")),
        num_attention_heads=heads,
        max_position_embeddings=tensors["embeddings.position_embedding.weight"].shape[0],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    # transformers 5 dropped the inner prefix that files, and older releases, have
    inner = TEXT_INNER if any(key.startswith(TEXT_INNER) for key in model.state_dict()) else ""
    missing, unexpected = model.load_state_dict({inner + key: value for key, value in tensors.items()}, strict=False)
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing or unexpected:
        raise CheckpointError(f"{file.path}: unknown text encoder ({', '.join([*missing, *unexpected][:3])})")
    return TextEncoder(tokenizer, model.to(device, dtype).eval().requires_grad_(False))


def load_vae(file: Checkpoint, device: str | torch.device) -> AutoencoderKL:
    """The VAE of a checked checkpoint, always float32."""
    tensors = {VAE_PREFIX + key: value for key, value in file.read(VAE_PREFIX, torch.float32).items()}

    def width(level: int) -> int:
        return tensors[f"{VAE_PREFIX}encoder.down.{level}.block.0.conv2.weight"].shape[0]

    levels = 1 + max(int(key.split(".")[3]) for key in tensors if key.startswith(f"{VAE_PREFIX}encoder.down."))
    blocks = len({key.split(".")[5] for key in tensors if key.startswith(f"{VAE_PREFIX}encoder.down.0.block.")})
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [width(level) for level in range(levels)],
        "layers_per_block": blocks,
        "latent_channels": tensors[f"{VAE_PREFIX}post_quant_conv.weight"].shape[0],
    }
    vae = AutoencoderKL(**config)
    vae.load_state_dict(convert_ldm_vae_checkpoint(tensors, config))
    return vae.to(device).eval().requires_grad_(False)


def quiet_libraries() -> None:
    """Keeps transformers' notices about defaults out of a person's terminal."""
    logging.set_verbosity_error()
