"""What a second model costs in the WebUI: ``python -m benchmarks.webui_expert``.

Starts the live tests' host and draws with and without an expert of the base's size, in turn. The time of a step is
taken from the difference between a long and a short sampling, so that text encoding and the VAE do not count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from tests.webui_live.client import Client, expert
from tests.webui_live.host import Host, prepare_data

LONG, SHORT = 30, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare_data(Path(folder), {"samples_save": False, "grid_save": False, "live_previews_enable": False})
        host = Host(Path(folder), "animals")
        try:
            measure(Client(host.url), args.rounds, args.size)
        finally:
            host.stop()


def measure(client: Client, rounds: int, size: int) -> None:
    ways = {"without": None, "SNB": expert("vehicles.safetensors"),
            "SNB, mask held": expert("vehicles.safetensors", snb_hold=900)}  # fmt: skip

    def seconds(fusion: dict | None, steps: int) -> float:
        began = time.perf_counter()
        client.draw(fusion, steps=steps, width=size, height=size)
        return time.perf_counter() - began

    for fusion in ways.values():
        seconds(fusion, 2)
    steps: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, fusion in ways.items():
            short = seconds(fusion, SHORT)
            steps[name].append((seconds(fusion, LONG) - short) / (LONG - SHORT))
    print(f"{size} x {size}, batch 1, {rounds} rounds in turn; median of the rounds' ratios to without")
    for name, values in steps.items():
        ratio = statistics.median(a / b for a, b in zip(values, steps["without"]))
        print(f"{name:<16} {1000 * statistics.median(values):8.1f} ms a step   x {ratio:.2f}")


if __name__ == "__main__":
    main()
