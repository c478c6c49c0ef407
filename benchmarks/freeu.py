"""What FreeU costs: ``python -m benchmarks.freeu [--pairs N] [--rows R] [--threads T] [--json FILE]``.

Ratios within one run, so that they hold on a busy machine. A pair is a U-Net forward without FreeU and one with it, in
alternating order; told are the median of the pairs' ratios, and the part of a forward that was spent inside FreeU,
which a neighbour's load touches least. SD1.5's sizes have random weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets import unet_2d_blocks
from torch import nn

from lib_fusion.fusion.hooks import attach_freeu
from lib_fusion.methods.freeu import FreeU, LowBand, Stage
from lib_fusion.unet.config import SD15, unet_shapes
from lib_fusion.unet.layout import read_layout
from lib_fusion.unet.model import load_unet

DEMO = Path(__file__).resolve().parents[1] / "demo" / "animals.safetensors"
SD15_STAGES = {4: Stage(1.5, 0.9), 2: Stage(1.6, 0.2)}
#: The demo's features all have the model's own number of channels.
DEMO_STAGES = {1: Stage(1.2, 0.9)}
#: Repetitions of a filter, whose single call is too short to time.
REPEATS = 20


class Clock:
    """Adds up the seconds spent in what it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return call


def measure(forward: Callable[[], object], switch: Callable[[bool], None], clock: Clock, pairs: int) -> dict:
    """The record of ``pairs`` pairs of forwards; ``switch`` turns FreeU on and off, ``clock`` runs inside it."""
    off, on, inside = [], [], []

    def run(active: bool) -> None:
        switch(active)
        clock.seconds = 0.0
        began = time.perf_counter()
        forward()
        seconds = time.perf_counter() - began
        (on if active else off).append(seconds)
        if active:
            inside.append(clock.seconds / (seconds - clock.seconds))

    for active in (False, True):
        run(active)  # once unmeasured
    off.clear(), on.clear(), inside.clear()
    for pair in range(pairs):
        for active in (False, True) if pair % 2 == 0 else (True, False):
            run(active)
    switch(False)
    ratios = [b / a for a, b in zip(off, on, strict=True)]
    return {"off_ms": 1e3 * statistics.median(off), "on_ms": 1e3 * statistics.median(on),
            "ratio": statistics.median(ratios), "ratio_of_minima": min(on) / min(off),
            "inside": 1 + statistics.median(inside)}  # fmt: skip


def bench_ours(unet: nn.Module, stages: dict[int, Stage], inputs: tuple, pairs: int) -> dict[str, dict]:
    decoder = read_layout(unet).decoder
    records = {}
    for version in (1, 2):
        clock, hooks, freeu = Clock(), [], FreeU(stages, version)  # as in a pass: one for all of its steps
        freeu.strength = 1.0
        freeu.edit_ = clock.timed(freeu.edit_)

        def switch(active: bool, hooks: list = hooks, freeu: FreeU = freeu) -> None:
            while hooks:
                hooks.pop().remove()
            if active:
                hooks.append(attach_freeu(decoder, freeu))

        records[f"ours, version {version}"] = measure(lambda: unet(*inputs), switch, clock, pairs)
    return records


def bench_diffusers(unet: UNet2DConditionModel, inputs: tuple, pairs: int) -> dict:
    clock = Clock()

    def switch(active: bool) -> None:
        if active:
            unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        else:
            unet.disable_freeu()

    with mock.patch.object(unet_2d_blocks, "apply_freeu", clock.timed(unet_2d_blocks.apply_freeu)):
        return measure(lambda: unet(*inputs), switch, clock, pairs)


def bench_filter(rows: int, pairs: int) -> dict[str, dict]:
    """The skip filter alone on SD1.5's skip features of each size, against the official code's form."""
    records = {}
    for channels, size in ((1280, 8), (1280, 16), (640, 32), (320, 64)):
        maps = torch.randn(rows, channels, size, size)
        band = LowBand.like(maps, 0.0)

        def seconds(function: Callable[[], object], times: int) -> float:
            began = time.perf_counter()
            for _ in range(times):
                function()
            return (time.perf_counter() - began) / times

        def ours(maps: torch.Tensor = maps, band: LowBand = band) -> None:
            band.scale_(maps, 0.999, 1.0)

        def fourier(maps: torch.Tensor = maps) -> None:
            filter_fourier(maps, 0.999)

        ours(), fourier()
        found = [(seconds(ours, REPEATS), seconds(fourier, max(1, REPEATS // 10))) for _ in range(max(5, pairs))]
        records[f"{channels} x {size} x {size}"] = {
            "ours_ms": 1e3 * statistics.median(a for a, _ in found),
            "fourier_ms": 1e3 * statistics.median(b for _, b in found),
            "times": statistics.median(b / a for a, b in found),
        }
    return records


def filter_fourier(maps: torch.Tensor, scale: float, r: int = 1) -> torch.Tensor:
    """The filter as the official code describes it: transform, shift, mask, and back."""
    waves = torch.fft.fftshift(torch.fft.fftn(maps, dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones(maps.shape)
    y, x = maps.shape[-2] // 2, maps.shape[-1] // 2
    mask[..., y - r : y + r, x - r : x + r] = scale
    return torch.fft.ifftn(torch.fft.ifftshift(waves * mask, dim=(-2, -1)), dim=(-2, -1)).real


@torch.no_grad()
def run(rows: int, pairs: int, demo_pairs: int) -> dict:
    def inputs(height: int, width: int, context_dim: int) -> tuple:
        return torch.randn(rows, 4, height, width), torch.full((rows,), 500.0), torch.randn(rows, 77, context_dim)

    record: dict = {"rows": rows, "threads": torch.get_num_threads(), "pairs": pairs, "demo_pairs": demo_pairs}
    demo = load_unet(DEMO)
    record["demo, 256 x 128 px"] = bench_ours(demo, DEMO_STAGES, inputs(16, 32, demo.context_dim), demo_pairs)
    record["filter"] = bench_filter(rows, pairs)
    weights = {name: torch.randn(shape) * 0.02 for name, shape in unet_shapes(**SD15).items()}
    unet = load_unet(weights)
    del weights
    latents = inputs(64, 64, SD15["context_dim"])
    cells = bench_ours(unet, SD15_STAGES, latents, pairs)
    del unet
    gc.collect()
    theirs = UNet2DConditionModel(cross_attention_dim=SD15["context_dim"], attention_head_dim=8).eval()
    cells["diffusers, version 1"] = bench_diffusers(theirs, latents, pairs)
    record["SD1.5, 512 px"] = cells
    return record


def show(record: dict) -> str:
    lines = [f"{record['rows']} rows, {record['threads']} threads, float32, CPU", "",
             "| U-Net | FreeU | off ms | on ms | median of paired ratios | by time inside FreeU |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for unet in ("SD1.5, 512 px", "demo, 256 x 128 px"):
        for name, cell in record[unet].items():
            lines.append(f"| {unet} | {name} | {cell['off_ms']:.1f} | {cell['on_ms']:.1f} | {cell['ratio']:.4f} "
                         f"| {cell['inside']:.4f} |")  # fmt: skip
    lines += ["", "| skip filter alone | ours ms | Fourier ms | times faster |", "|---|---|---|---|"]
    for name, cell in record["filter"].items():
        lines.append(f"| {name} | {cell['ours_ms']:.3f} | {cell['fourier_ms']:.2f} | {cell['times']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="pairs of SD1.5 forwards (9)")
    parser.add_argument("--demo-pairs", type=int, default=200, help="pairs of the demo's forwards (200)")
    parser.add_argument("--rows", type=int, default=2, help="batch rows; 2 is one picture with guidance (2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    record = run(args.rows, args.pairs, args.demo_pairs)
    print(show(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
