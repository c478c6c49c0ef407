"""Skipping in the WebUI in seconds, at SD1.5's size: ``python -m benchmarks.webui_skipping``.

Starts the live tests' host with two checkpoints of random weights, and draws without skipping, with every other step
skipped and with three of four, alone and fused. A random network's trajectory says nothing about fidelity: by its
tolerance as many steps in a row are skipped as are allowed. Seconds are the WebUI's processor time (Linux), so that
other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lib_fusion.unet.config import SD15, unet_shapes
from tests.webui_live.client import Client, expert
from tests.webui_live.host import REPOSITORY, Host, copy_demo, prepare_data

PREFIX = "model.diffusion_model."
#: U-Net settings of SD1.5 in a demo checkpoint's YAML file; the text encoder stays the demo's.
SIZES = {"model_channels": "320", "attention_resolutions": "[4, 2, 1]", "num_res_blocks": "2",
         "channel_mult": "[1, 2, 4, 4]"}  # fmt: skip
#: Anything is within it.
ANY = {"skipping": "Forecast", "skip_tolerance": 10}
AMOUNTS = {"unskipped": {}, "every other skipped": ANY | {"skip_max": 1},
           "three of four skipped": ANY | {"skip_max": 3}}  # fmt: skip


def write_checkpoint(models: Path, name: str, seed: int) -> None:
    """The demo's text encoder and VAE with a random U-Net of SD1.5's size, in float16."""
    copy_demo("general", models, name)
    file, config = models / f"{name}.safetensors", models / f"{name}.yaml"
    generator = torch.Generator().manual_seed(seed)
    shapes = unet_shapes(**{**SD15, "context_dim": 64})
    demo = load_file(REPOSITORY / "demo/general.safetensors")
    others = {key: value for key, value in demo.items() if PREFIX not in key}
    drawn = {PREFIX + key: (torch.randn(shape, generator=generator) * 0.02).half() for key, shape in shapes.items()}
    save_file(others | drawn, file)
    unet, rest = (text := config.read_text("utf-8")).split("first_stage_config:", 1)
    for key, value in SIZES.items():
        unet, found = re.subn(rf"\b{key}: .*", f"{key}: {value}", unet)
        assert found == 1, text
    config.write_text(f"{unet}first_stage_config:{rest}", "utf-8")


def processor_seconds(pid: int) -> float:
    """User and system time of a process, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(client: Client, pid: int, size: int, steps: int, rounds: int) -> None:
    fusions = {"one model": {}, "two, SNB": expert("random_b.safetensors")}

    def draw(fusion: dict, length: int) -> tuple[float, int]:
        began = processor_seconds(pid)
        picture = client.draw(fusion or None, steps=length, width=size, height=size, model="random_a")
        told = re.findall(r"(?:base|expert \d) (\d+)", picture.infotexts[0].partition("Fusion U-Net rows: ")[2])
        rows = [int(n) for n in told] or [2 * length]
        return processor_seconds(pid) - began, sum(rows)

    draw(fusions["two, SNB"], 2)
    rest, _ = draw({}, 1)  # text encoding, the VAE, and one step
    first: tuple[float, int] | None = None
    for title, fusion in fusions.items():
        for amount, values in AMOUNTS.items():
            times = [draw(fusion | values, steps) for _ in range(rounds)]
            seconds, rows = min(times)
            first = first or (seconds, rows)
            print(f"{title:<10} {amount:<22} {rows:4} rows x {rows / first[1]:.3f}   "
                  f"{seconds:7.1f} s x {seconds / first[0]:.3f}", flush=True)  # fmt: skip
    print(f"of each: {rest:.1f} s for the text, the VAE and one step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        prepare_data(data, {"samples_save": False, "grid_save": False, "live_previews_enable": False})
        for seed, name in enumerate(("random_a", "random_b")):
            write_checkpoint(data / "models/Stable-diffusion", name, seed)
        host = Host(data, "random_a")
        try:
            measure(Client(host.url), host.process.pid, args.size, args.steps, args.rounds)
        finally:
            host.stop()


if __name__ == "__main__":
    main()
