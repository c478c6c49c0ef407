"""Trains a LoRA of the demo's general model on one category: ``python -m demo.train_lora animals``. Resumable.

It starts from the best low-rank approximation (SVD) of what the category's own checkpoint changed, on all linear and
convolutional layers of the U-Net, and learns from that checkpoint's examples: alone and in scenes, its category sharp.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from demo.assess import HERE, load_engine, reference_latents
from demo.concepts import CATEGORIES
from demo.experts import Examples, noise_loss
from demo.stage import run_stage
from lib_fusion.engine.loader import quiet_libraries
from lib_fusion.unet.model import UNet, load_unet

#: A file's name is what the WebUI calls it: ``<lora:demo-animals:1>``.
FILE = "demo-{}.safetensors"
#: What trainers (kohya's) write about a LoRA, for galleries and for telling its kind of model.
METADATA = {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1", "ss_sd_model_name": "general"}


class LowRank(nn.Module):
    """A layer's weight plus ``up @ down``: the parametrization that is trained, float32 also under autocast."""

    def __init__(self, delta: torch.Tensor, rank: int) -> None:
        """``delta`` (out,in) or (out,in,h,w): what to start near; the factors share its singular values evenly."""
        super().__init__()
        u, s, v = torch.linalg.svd(delta.flatten(1).double(), full_matrices=False)
        root = s[:rank].sqrt()
        self.kernel = delta.shape[2:]
        self.up = nn.Parameter((u[:, :rank] * root).float())
        self.down = nn.Parameter((root[:, None] * v[:rank]).float())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight + (self.up @ self.down).view(weight.shape)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The factors under kohya's names; alpha is the rank, so that weight 1 is what was trained."""
        up, down = self.up.detach(), self.down.detach()
        rank = len(down)
        return {
            f"{name}.lora_up.weight": up.view(*up.shape, *(1 for _ in self.kernel)),
            f"{name}.lora_down.weight": down.view(rank, -1, *self.kernel),
            f"{name}.alpha": torch.tensor(float(rank)),
        }


def attach_lora(unet: UNet, like: UNet, rank: int) -> nn.ModuleDict:
    """Parametrizes the weights of all linear and convolutional layers to be near those of ``like``.

    Returns the trained parts, by the layers' names in LoRA files.
    """
    parts = nn.ModuleDict()
    unet.requires_grad_(False)
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            part = LowRank(like.get_submodule(name).weight - layer.weight, rank)
            parts["lora_unet_" + name.replace(".", "_")] = part
            parametrize.register_parametrization(layer, "weight", part)
    return parts


def save_lora(parts: nn.ModuleDict, category: str, rank: int, folder: Path) -> Path:
    """Writes the LoRA (float16) and returns its path."""
    tensors = {key: value for name, part in parts.items() for key, value in part.tensors(name).items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE.format(category)
    metadata = METADATA | {
        "ss_network_dim": str(rank), "ss_network_alpha": str(rank),
        "modelspec.title": f"denoiser fusion demo: LoRA of {category}",
    }  # fmt: skip
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.train_lora", description=__doc__.splitlines()[0])
    parser.add_argument("category", choices=tuple(CATEGORIES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--scenes", type=float, default=0.75, help="share of the steps that train on scenes, 0..0.95")
    parser.add_argument("--data", type=Path, default=HERE / "data-cache", help="where the pictures are kept")
    parser.add_argument("--state", type=Path, default=HERE / "state", help="where the stage is kept")
    parser.add_argument("--out", type=Path, default=HERE / "loras", help="the folder of the file")
    args = parser.parse_args()
    quiet_libraries()
    args.state.mkdir(parents=True, exist_ok=True)
    engine = load_engine("general")
    model = engine.models[0]
    parts = attach_lora(model.unet.train(), load_unet(HERE / f"{args.category}.safetensors"), args.rank)
    batches = {"single": (0.95 - args.scenes, 16), "scene": (args.scenes, 8), "large": (0.05, 4)}
    examples = Examples(reference_latents(engine, args.data), args.category, batches)
    loss_of = noise_loss(model.unet, model.text.model, model.text.tokenizer, examples)
    run_stage(
        f"lora-{args.category}", parts, loss_of, steps=args.steps, lr=args.lr, folder=args.state, weight_decay=0.0,
        ema_decay=0.998,
    )  # fmt: skip
    print(save_lora(parts, args.category, args.rank, args.out))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
