"""Trains the demo's checkpoints from the emoji packages: ``python -m demo.train``.

Resumable: every stage keeps its state in ``--state`` and a finished one is not repeated. With one core each: the VAE 25
minutes, the common start 20, each of the four models 40; ``--only common`` first, then ``--only animals`` and the
others side by side, keep all cores busy. With a GPU use ``--longer 5``.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch

from demo.concepts import CATEGORIES
from demo.experts import Latents, new_unet, train_model
from demo.export import export
from demo.images import write_images
from demo.text import new_text_tower, train_text, write_clip_folder
from demo.vae import load_pictures, new_vae, train_latent_space, train_vae

HERE = Path(__file__).resolve().parent
JOINT_STEPS, DECODER_STEPS, ENCODER_STEPS = 1800, 1800, 1200
TEXT_STEPS = 600
COMMON_STEPS, COMMON_LR = 4200, 1.5e-3
MODEL_STEPS, MODEL_LR = 8000, 1.2e-3


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data-cache", help="where the pictures are kept")
    parser.add_argument("--state", type=Path, default=HERE / "state", help="where the stages are kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where the checkpoints are written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--longer", type=float, default=1.0, help="multiplies the U-Nets' steps")
    parser.add_argument("--only", choices=("vae", "common", "general", *CATEGORIES),
                        help="only up to this stage; export later")
    args = parser.parse_args()
    began = time.monotonic()
    args.state.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    training, _, _ = load_pictures(args.data)
    space = train_latent_space(training.to(args.device), args.state, new_vae().to(args.device), JOINT_STEPS)
    vae = None
    if args.only in (None, "vae"):
        torch.manual_seed(0)
        vae = train_vae(args.data, args.state, joint_steps=JOINT_STEPS, decoder_steps=DECODER_STEPS,
                        encoder_steps=ENCODER_STEPS, device=args.device)
    if args.only == "vae":
        return
    latents = Latents.encode(args.data, space, args.device)
    del training
    torch.manual_seed(0)
    write_clip_folder(args.out / "clip")
    tokenizer, text = new_text_tower(args.out / "clip")
    text = text.to(args.device)
    train_text(tokenizer, text, steps=TEXT_STEPS, folder=args.state)
    # What all four models start from.
    common = new_unet().to(args.device)
    train_model("common", common, text, tokenizer, latents, expert=None,
                steps=int(COMMON_STEPS * args.longer), lr=COMMON_LR, folder=args.state)
    if args.only == "common":
        return
    unets = {}
    for name in ("general", *CATEGORIES):
        if args.only in (None, name):
            unets[name] = copy.deepcopy(common)
            train_model(name, unets[name], text, tokenizer, latents, expert=None if name == "general" else name,
                        steps=int(MODEL_STEPS * args.longer), lr=MODEL_LR, folder=args.state)
    if args.only is None:
        for name, unet in unets.items():
            print(export(name, unet, vae, text, args.out))
        write_images(args.data, args.out / "images")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
