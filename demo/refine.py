"""Trains a shipped checkpoint further, from its own file: ``python -m demo.refine animals --steps 3000``. Resumable."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from demo.assess import HERE, load_engine, reference_latents
from demo.experts import train_model
from demo.export import export
from demo.scenes import MODELS
from lib_fusion.engine.loader import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.refine", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--scenes", type=float, default=0.75, help="share of the steps that train on scenes, 0..0.95")
    parser.add_argument("--round", default="1", help="names this stage: another round is another name")
    parser.add_argument("--data", type=Path, default=HERE / "data-cache", help="where the pictures are kept")
    parser.add_argument("--state", type=Path, default=HERE / "state", help="where the stage is kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where the checkpoint is written")
    args = parser.parse_args()
    quiet_libraries()
    args.state.mkdir(parents=True, exist_ok=True)
    engine = load_engine(args.model)
    model = engine.models[0]
    unet = model.unet.requires_grad_(True).train()
    train_model(
        f"{args.model}-refine-{args.round}", unet, model.text.model, model.text.tokenizer,
        reference_latents(engine, args.data), expert=None if args.model == "general" else args.model,
        steps=args.steps, lr=args.lr, folder=args.state,
        batches={"single": (0.95 - args.scenes, 16), "scene": (args.scenes, 8), "large": (0.05, 4)},
    )  # fmt: skip
    print(export(args.model, unet, engine.vae, model.text.model, args.out))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
