"""Trains the demo's four U-Nets: a general one and, fine-tuned from it, one expert for each category.

The general model draws single objects of all categories, and *scenes* of two objects coarsely: their latents are
blurred. In an expert's scenes its own category is sharp and the other one stays blurred. So a scene of both categories
is beyond any one model and within reach of a fusion that takes each object from the model that knows it. The blur was
chosen to make competence visible; it is no property of real checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from demo.concepts import CATEGORIES, CATEGORY_OF, CONCEPTS, LAYOUTS, STYLES, is_held_out, scene_caption, single_caption
from demo.data import render
from demo.stage import run_stage
from demo.text import tokenize
from demo.vae import LatentSpace
from lib_fusion.unet.config import unet_shapes
from lib_fusion.unet.model import UNet

#: The demo's U-Net, in the terms of an LDM unet_config.
UNET = {"model_channels": 64, "channel_mult": (1, 1, 1), "num_res_blocks": 1, "attention_resolutions": (2,),
        "context_dim": 64}  # fmt: skip
BLUR_SIGMA = 2.0
CAPTION_DROPOUT = 0.1
#: Share of an expert's examples that come from the other categories, so that it forgets by degrees.
REPLAY = 0.2
#: Kind of batch -> (share of the steps, pictures in it); alike in cost. An object has 128 px a side, 256 if large.
BATCHES = {"single": (0.35, 16), "scene": (0.6, 8), "large": (0.05, 4)}


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's noise schedule: scaled-linear betas 0.00085..0.012, 1000 steps, float32 (1000,)."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def new_unet() -> UNet:
    """An untrained U-Net; the last layer of every branch starts at zero, as LDM's do."""
    unet = UNet(unet_shapes(**UNET))
    for name, parameter in unet.named_parameters():
        if any(part in name for part in ("out_layers.3.", "proj_out.", "out.2.")):
            nn.init.zeros_(parameter)
    return unet


def blur(latents: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of latents (...,C,H,W), sigma 2, edges repeated."""
    radius = int(3 * BLUR_SIGMA)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=latents.device) / BLUR_SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    flat = latents.reshape(-1, 1, *latents.shape[-2:])
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    return flat.reshape(latents.shape)


@dataclass(frozen=True)
class Latents:
    """Latents of the demo's pictures: {(concept, style): (4,16,16)}, the same blurred, and large ones (4,32,32)."""

    sharp: dict[tuple[str, str], torch.Tensor]
    blurred: dict[tuple[str, str], torch.Tensor]
    large: dict[tuple[str, str], torch.Tensor]

    @classmethod
    def encode(cls, data: Path, space: LatentSpace, device: str) -> Latents:
        keys = [(name, style) for name in CONCEPTS for style in STYLES]

        def latents(size: int) -> torch.Tensor:
            pictures = render(data, size)
            arrays = [pictures[CATEGORIES[CATEGORY_OF[name]][name], style] for name, style in keys]
            x = torch.stack([torch.from_numpy(a.copy()) for a in arrays]).permute(0, 3, 1, 2).float() / 127.5 - 1
            return torch.cat([space(part) for part in x.to(device).split(16)])

        small = latents(128)
        return cls(dict(zip(keys, small, strict=True)), dict(zip(keys, blur(small), strict=True)),
                   dict(zip(keys, latents(256), strict=True)))

    def scene(self, first: str, second: str, style: str, vertical: bool, expert: str | None) -> torch.Tensor:
        """Two objects side by side, or the first above the second; only the expert's category is sharp."""
        halves = [
            (self.sharp if CATEGORY_OF[name] == expert else self.blurred)[name, style] for name in (first, second)
        ]
        return torch.cat(halves, dim=1 if vertical else 2)


class Examples:
    """Draws batches of (latents, captions) for one model: ``expert`` names its category, None is the general model."""

    def __init__(self, latents: Latents, expert: str | None, batches: dict[str, tuple[float, int]] = BATCHES) -> None:
        self.latents, self.expert, self.batches = latents, expert, batches

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        def pick(options):
            return options[int(torch.randint(len(options), (), generator=generator))]

        def chance(p: float) -> bool:
            return float(torch.rand((), generator=generator)) < p

        def concept(own: bool) -> str:
            """A concept of the expert's category, or of another one; any for the general model."""
            if self.expert is None:
                return pick(CONCEPTS)
            return pick([n for n in CONCEPTS if (CATEGORY_OF[n] == self.expert) == own])

        shares = torch.tensor([share for share, _ in self.batches.values()])
        kind = list(self.batches)[int(torch.multinomial(shares, 1, generator=generator))]
        vertical = chance(0.5)
        rows, texts = [], []
        while len(rows) < self.batches[kind][1]:
            style = pick(list(STYLES))
            first = concept(own=not chance(REPLAY))
            if kind == "scene":
                second = concept(own=False)
                if CATEGORY_OF[second] == CATEGORY_OF[first] or is_held_out(first, second):
                    continue
                if chance(0.5):
                    first, second = second, first
                layout = pick([name for name in LAYOUTS if name != ("left" if vertical else "above")])
                rows.append(self.latents.scene(first, second, style, vertical, self.expert))
                text = scene_caption(first, second, layout, style)
            else:
                rows.append((self.latents.large if kind == "large" else self.latents.sharp)[first, style])
                text = single_caption(first, style)
            texts.append("" if chance(CAPTION_DROPOUT) else text)
        return torch.stack(rows), texts


def train_model(
    name: str, unet: UNet, text: CLIPTextModel, tokenizer: CLIPTokenizer, latents: Latents, *,
    expert: str | None, steps: int, lr: float, folder: Path, batches: dict[str, tuple[float, int]] = BATCHES,
) -> None:  # fmt: skip
    """Trains ``unet`` on noise prediction, on the examples of ``expert`` (None: the general model's)."""
    loss_of = noise_loss(unet, text, tokenizer, Examples(latents, expert, batches))
    run_stage(name, nn.ModuleDict({"unet": unet}), loss_of, steps=steps, lr=lr, folder=folder, ema_decay=0.998)


def noise_loss(
    unet: UNet, text: CLIPTextModel, tokenizer: CLIPTokenizer, examples: Examples
) -> Callable[[int, torch.Generator], torch.Tensor]:
    """The loss of a training step (for ``run_stage``): the weighted error of the predicted noise of one batch.

    The text model stays as it is: trained along, it forgets the second object of a scene. Each example weighs
    ``1 / sqrt(SNR)``, within 0.3..5, which makes all noise levels count about alike; unweighted, the loss is mostly the
    fine detail of nearly clean latents, where the caption hardly matters.
    """
    device = unet.device
    schedule = alphas_cumprod().to(device)
    text.requires_grad_(False)

    def loss_of(_: int, generator: torch.Generator) -> torch.Tensor:
        x, captions = examples.batch(generator)
        context = text(tokenize(tokenizer, captions).to(device)).last_hidden_state
        t = torch.randint(1000, (len(x),), generator=generator).to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        a = schedule[t].view(-1, 1, 1, 1)
        error = (unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, context).float() - noise).square().mean(dim=(1, 2, 3))
        weight = ((1 - schedule[t]) / schedule[t]).sqrt().clamp(0.3, 5)
        return (weight * error).mean()

    return loss_of
