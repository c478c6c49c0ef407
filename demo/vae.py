"""Trains the demo's VAE: f8, four channels, 0.8M parameters, in the layout of the LDM AutoencoderKL.

A joint LDM encoder and decoder of this size learn slowly, so the latent space is found by a throwaway encoder:
8x8 patch PCA plus a small convolutional correction. It is frozen half way, the decoder finishes on the frozen
latents, and the LDM encoder is then regressed onto them. Whitening and the stock scale factor 0.18215 are folded into
``quant_conv`` and ``post_quant_conv``.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from demo.concepts import CATEGORIES
from demo.data import VAE_HELD_OUT, render
from demo.stage import run_stage

CHANNELS = (32, 32, 32, 64)
SCALE = 0.18215
LATENT_NOISE = 0.05


def new_vae() -> AutoencoderKL:
    """An untrained VAE of the demo's size."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS, layers_per_block=1, latent_channels=4, norm_num_groups=32,
    )


class PatchEncoder(nn.Module):
    """Throwaway encoder: (B,3,H,W) -> (B,4,H/8,W/8); the patch PCA's four components plus a learnt correction."""

    def __init__(self, pictures: torch.Tensor) -> None:
        super().__init__()
        self.pca = nn.Conv2d(3, 4, 8, stride=8)
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(96, 96, 3, padding=1), nn.SiLU(),
            nn.Conv2d(96, 4, 3, padding=1),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
        patches = F.unfold(pictures[:256], 8, stride=8).transpose(1, 2).reshape(-1, 192)
        centre = patches.mean(0)
        _, values, vectors = torch.linalg.svd(patches - centre, full_matrices=False)
        weight = vectors[:4] / (values[:4, None] / len(patches) ** 0.5)
        with torch.no_grad():
            self.pca.weight.copy_(weight.reshape(4, 3, 8, 8))
            self.pca.bias.copy_(-(weight @ centre))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pca(x) + self.net(x)


def load_pictures(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(training, held-out, demo) pictures in -1..1, each (N,3,128,128).

    Held-out concepts are none of the demo's. Training holds all others, the demo's concepts three times.
    """
    pictures = render(folder)
    demo = {code for names in CATEGORIES.values() for code in names.values()}
    others = sorted({code for code, _ in pictures} - demo)
    generator = torch.Generator().manual_seed(1)
    held = {others[i] for i in torch.randperm(len(others), generator=generator)[:VAE_HELD_OUT].tolist()}

    def stack(keep: set[str]) -> torch.Tensor:
        arrays = [torch.from_numpy(value) for (code, _), value in sorted(pictures.items()) if code in keep]
        return torch.stack(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1

    ours = stack(demo)
    return torch.cat([stack(set(others) - held), ours, ours, ours]), stack(held), ours


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + 0.5 L1 of the image gradients: sharp edges without an adversary."""
    d = output.float() - target
    gradients = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    return d.abs().mean() + d.square().mean() + 0.5 * gradients


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Mean PSNR in dB of encode-decode over pictures in -1..1."""
    values = []
    for x in pictures.split(8):
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * ((y - x) / 2).square().mean(dim=(1, 2, 3)).log10())
    return torch.cat(values).mean().item()


class LatentSpace:
    """The throwaway encoder with its whitening: pictures (B,3,H,W) in -1..1 -> unit-variance latents (B,4,H/8,W/8)."""

    def __init__(self, patch: PatchEncoder, training: torch.Tensor) -> None:
        self.patch = patch.requires_grad_(False)
        targets = torch.cat([patch(x) for x in training.split(32)]).float()
        self.centre = targets.mean(dim=(0, 2, 3))
        flat = (targets - self.centre[:, None, None]).permute(1, 0, 2, 3).flatten(1)
        values, vectors = torch.linalg.eigh(flat @ flat.T / flat.shape[1])
        self.whiten = vectors @ torch.diag(values**-0.5) @ vectors.T
        self.colour = vectors @ torch.diag(values**0.5) @ vectors.T

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,bjhw->bihw", self.whiten, self.patch(pictures).float() - self.centre[:, None, None])


def train_latent_space(training: torch.Tensor, folder: Path, vae: AutoencoderKL, steps: int) -> LatentSpace:
    """First stage: the throwaway encoder together with the VAE's decoder (which stays half trained in ``vae``)."""
    patch = PatchEncoder(training).to(training.device)

    def joint(_: int, generator: torch.Generator) -> torch.Tensor:
        x = draw(training, 4, generator)
        z = patch(x).float()
        spread = z.mean(dim=(0, 2, 3)).square().mean() + (z.std(dim=(0, 2, 3)) - 1).square().mean()
        return reconstruction_loss(vae.decoder(with_noise(z, generator)), x) + 0.05 * spread

    run_stage("vae-joint", nn.ModuleDict({"decoder": vae.decoder, "patch": patch}), joint,
              steps=steps, lr=2e-3, folder=folder, ema_decay=0.99)
    return LatentSpace(patch, training)


def draw(pictures: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    return pictures[torch.randint(len(pictures), (count,), generator=generator)]


def with_noise(z: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What a diffusion model hands to the decoder is never exact."""
    return z + LATENT_NOISE * torch.randn(z.shape, generator=generator).to(z.device)


def train_vae(data: Path, folder: Path, *, joint_steps: int = 1800, decoder_steps: int = 1800,
              encoder_steps: int = 1200, device: str = "cpu") -> AutoencoderKL:
    """Trains (or loads what is already trained in ``folder``) and returns the VAE in evaluation mode."""
    training, held_out, ours = (x.to(device) for x in load_pictures(data))
    vae = new_vae().to(device)
    space = train_latent_space(training, folder, vae, joint_steps)

    def decoder_only(_: int, generator: torch.Generator) -> torch.Tensor:
        x = draw(training, 4, generator)
        return reconstruction_loss(vae.decoder(with_noise(space.patch(x).float(), generator)), x)

    run_stage("vae-decoder", nn.ModuleDict({"decoder": vae.decoder}), decoder_only,
              steps=decoder_steps, lr=1.5e-3, folder=folder, ema_decay=0.995)

    # The encoder learns the whitened latents, all four on the same footing; its log-variances are cut off below.
    def encoder(_: int, generator: torch.Generator) -> torch.Tensor:
        x = draw(training, 8, generator)
        d = vae.encoder(x).float()[:, :4] - space(x)
        return d.square().mean() + 0.5 * d.abs().mean()

    run_stage("vae-encoder", nn.ModuleDict({"encoder": vae.encoder}), encoder,
              steps=encoder_steps, lr=2e-3, folder=folder, ema_decay=0.99)

    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.weight[:4, :4] = torch.eye(4)[..., None, None] / SCALE
        vae.quant_conv.bias.copy_(torch.tensor([0.0] * 4 + [-20.0] * 4))
        vae.post_quant_conv.weight.copy_((space.colour * SCALE)[..., None, None])
        vae.post_quant_conv.bias.copy_(space.centre)
    vae = vae.eval().requires_grad_(False)
    print(f"vae: PSNR {psnr(vae, held_out):.2f} dB on held-out concepts, {psnr(vae, ours):.2f} dB on the demo's")
    return vae
