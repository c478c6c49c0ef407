"""Skipping with every sampler of the WebUI: ``python -m benchmarks.skipping_samplers --out samplers.csv``.

Draws with the demo's general model in the live tests' host: off, faithful, balanced, with so much tolerance that every
other call is skipped, and with as many steps as faithful computes. Tells the rows computed and the PSNR against off.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measures import psnr
from lib_fusion.requests.settings import SKIP_PRESETS
from tests.webui_live.client import Client
from tests.webui_live.host import Host, prepare_data

SAMPLERS = ("Euler", "DPM++ 2M", "DDIM", "UniPC", "LMS", "PLMS", "DPM2", "Heun", "Euler a", "DPM++ 2M SDE",
            "DPM++ SDE", "DPM++ 2S a", "DPM++ 3M SDE", "DPM2 a", "LCM")  # fmt: skip
CAPTIONS = ("a fox, flat drawing", "a tractor, glossy render", "a pizza, flat drawing", "an owl, glossy render")
WAYS = {
    **{name: {"skipping": "Forecast", **SKIP_PRESETS[name]} for name in ("Faithful", "Balanced")},
    "every other": {"skipping": "Forecast", "skip_tolerance": 10, "skip_max": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/skipping-samplers.csv"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--captions", type=int, default=len(CAPTIONS))
    parser.add_argument("--sampler", action="append")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, args.out.open("w", newline="", encoding="utf-8") as file:
        prepare_data(Path(folder), {"samples_save": False, "grid_save": False, "live_previews_enable": False})
        host = Host(Path(folder), "general")
        try:
            writer = csv.writer(file)
            writer.writerow(["sampler", "steps", "way", "rows", "psnr_mean", "psnr_worst"])
            for sampler in args.sampler or SAMPLERS:
                for line in measure(Client(host.url), sampler, args.steps, CAPTIONS[: args.captions]):
                    writer.writerow(line)
                    print(*line, flush=True)
                file.flush()
        finally:
            host.stop()


def measure(client: Client, sampler: str, steps: int, captions: tuple[str, ...]) -> list[tuple]:
    common = {"sampler_name": sampler, "steps": steps, "cfg_scale": 7, "negative_prompt": ""}
    drawn = {
        name: [client.draw(fusion, prompt=caption, seed=seed, **common) for seed, caption in enumerate(captions)]
        for name, fusion in {"off": None, **WAYS}.items()
    }
    off = np.stack([pictures.pixels[0] for pictures in drawn["off"]])
    lines = []
    for name in WAYS:
        counts = [re.match(r"base (\d+) of (\d+)", p.params["Fusion U-Net rows"]).groups() for p in drawn[name]]
        share = sum(int(a) for a, _ in counts) / sum(int(b) for _, b in counts)
        dbs = psnr(np.stack([pictures.pixels[0] for pictures in drawn[name]]), off)
        lines.append((sampler, steps, name, round(share, 3), round(dbs.mean(), 1), round(dbs.min(), 1)))
    count = max(1, round(lines[0][3] * steps))
    common["steps"] = count
    fewer = [client.draw(prompt=caption, seed=seed, **common) for seed, caption in enumerate(captions)]
    dbs = psnr(np.stack([pictures.pixels[0] for pictures in fewer]), off)
    lines.append((sampler, steps, f"{count} steps", round(count / steps, 3), round(dbs.mean(), 1), round(dbs.min(), 1)))
    return lines


if __name__ == "__main__":
    main()
