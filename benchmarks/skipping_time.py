"""How much of the saving in U-Net rows is a saving in time: ``python -m benchmarks.skipping_time``.

An SD1.5-sized U-Net with random weights, on the CPU, in small pictures: the share of a step that is not the U-Net is
larger there than anywhere else. Processor time, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from lib_fusion.engine.demo_sheet import FOLDER
from lib_fusion.engine.generate import Engine
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import FusionSettings, GenerationSettings
from lib_fusion.unet.config import SD15, unet_shapes
from lib_fusion.unet.model import load_unet

#: A tolerance that skips every other step, whatever a random network predicts.
EVERY_OTHER = FusionSettings(skipping="Forecast", skip_tolerance=1e9)


def random_engine() -> Engine:
    """The demo's engine with a random U-Net of SD1.5's size in it."""
    engine = Engine(FOLDER / "general.safetensors")
    generator = torch.Generator().manual_seed(0)
    shapes = unet_shapes(**SD15)
    weights = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    text = lambda texts: torch.zeros(len(texts), 77, SD15["context_dim"])  # noqa: E731
    engine.models[0] = replace(engine.models[0], unet=load_unet(weights), text=text)
    return engine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=128, help="pixels (default 128)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = random_engine()
    generation = GenerationSettings(("x",), width=args.size, height=args.size, steps=args.steps, sampler="Euler Karras")
    seconds, rows = {"off": [], "on": []}, {}
    for _ in range(args.rounds):
        for name, settings in (("off", FusionSettings()), ("on", EVERY_OTHER)):
            session, began = FusionSession(settings), time.process_time()
            engine.denoise([("x", 0)], generation, session)
            seconds[name].append(time.process_time() - began)
            rows[name] = session.rows[0]
    saved_rows = 1 - rows["on"] / rows["off"]
    saved_time = 1 - min(seconds["on"]) / min(seconds["off"])
    print(f"rows {rows['off']} -> {rows['on']}, seconds {min(seconds['off']):.1f} -> {min(seconds['on']):.1f}: "
          f"{saved_time:.3f} of the time for {saved_rows:.3f} of the rows, a ratio of {saved_time / saved_rows:.3f}")


if __name__ == "__main__":
    main()
