"""What AFA costs: ``python -m benchmarks.afa``. Processor seconds of one prediction, as ratios to one model's.

N models in lockstep cost N predictions and their aggregators. All models share one set of random weights, so that a
real size fits into memory; what is computed is the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from lib_fusion.fusion.lockstep import Lockstep, mean_context, sizes_for
from lib_fusion.methods.afa import uniform
from lib_fusion.unet.config import SD15, unet_shapes
from lib_fusion.unet.model import UNet

#: The demo's U-Net and Stable Diffusion 1.5's, the side of the latent each is measured at, and the aggregators' sizes.
CASES = {
    "demo": ({"model_channels": 64, "channel_mult": (1, 1, 1), "num_res_blocks": 1, "attention_resolutions": (2,),
              "context_dim": 64}, 16, {"hidden": 12, "layers": 1, "heads": 3}),
    "sd15": (SD15, 32, {"hidden": 128, "layers": 2, "heads": 8}),
}  # fmt: skip


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The fastest of a few."""
    run()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


@torch.no_grad()
def measure(case: str, repeats: int) -> None:
    config, side, sizes = CASES[case]
    torch.manual_seed(0)
    unet = UNet(unet_shapes(**config)).eval()
    x, t = torch.randn(2, 4, side, side), torch.tensor([500.0, 500.0])
    context = torch.randn(2, 77, config["context_dim"])
    one = seconds(lambda: unet(x, t, context), repeats)
    parameters = sum(p.numel() for p in unet.parameters())
    print(f"{case}, {side * 8} px, batch 2: one model {one:.2f} s, {parameters / 1e6:.1f}M parameters")
    for count in (2, 3):
        made = sizes_for(unet, count, **sizes).make().eval()
        size = sum(p.numel() for p in made.parameters())
        for name, aggregators in (("plain mean", uniform(count)), ("aggregators", made)):
            lockstep = Lockstep(unet, [unet] * (count - 1), aggregators)
            contexts = [context] * (count - 1)
            with lockstep.attach(), lockstep.running(contexts, mean_context([context] * count)):
                ratio = seconds(lambda: unet(x, t, context), repeats) / one
            more = f", {size / 1e6:.2f}M more parameters" if name == "aggregators" else ""
            print(f"  N = {count}, {name}: {ratio:.2f} times one model{more}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.afa", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for case in args.cases:
        measure(case, args.repeats)


if __name__ == "__main__":
    main()
