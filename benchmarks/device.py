"""What the methods cost on this machine's GPU, or on its CPU: ``python -m benchmarks.device``.

For U-Nets of Stable Diffusion's sizes with random weights: seconds per step, peak memory, and how often a step waits
for the device. Rows of a size are measured in one run, and shown as ratios to the base, too. The tables are Markdown,
with the name of the device, for docs/measurements/costs.md. Without a GPU, and with ``--device cpu``, sizes are small.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lib_fusion.fusion.hooks import Hooks, attach_freeu
from lib_fusion.fusion.level import Level
from lib_fusion.fusion.lockstep import Lockstep, mean_context, sizes_for
from lib_fusion.fusion.rows import Rows, take
from lib_fusion.fusion.session import FusionSession
from lib_fusion.fusion.step import Step
from lib_fusion.requests.settings import FusionSettings
from lib_fusion.unet.config import SD15, unet_shapes
from lib_fusion.unet.layout import read_layout
from lib_fusion.unet.model import UNet

SDXL = {"model_channels": 320, "channel_mult": (1, 2, 4), "num_res_blocks": 2, "attention_resolutions": (4, 2),
        "transformer_depth": (0, 2, 10), "context_dim": 2048, "adm_in_channels": 2816,
        "use_linear_in_transformer": True}  # fmt: skip
#: Each size: LDM's constructor's terms and the side of the latent.
REAL = {"SD1.5": (SD15, 64), "SDXL": (SDXL, 128)}
_FEW_BLOCKS = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,), "context_dim": 64}
REDUCED = {
    "SD1.5": (SD15 | _FEW_BLOCKS | {"model_channels": 32}, 8),
    "SDXL": (SDXL | _FEW_BLOCKS | {"model_channels": 64, "transformer_depth": (0, 2), "adm_in_channels": 96}, 8),
}
GUIDANCE = 7.0
#: Where experts' weights wait, as in the WebUI's setting; *RAM between pictures* is as *GPU* within a picture.
GPU, STREAMED = "GPU", "RAM between U-Net calls"


@dataclass(frozen=True)
class Way:
    """One row of the table. ``place``: where the experts' weights are while they do not compute."""

    name: str
    experts: int = 0
    place: str = GPU
    settings: dict[str, Any] = field(default_factory=dict)


# A tolerance that skips every other step, whatever a random network predicts.
SKIPPING = {"skipping": "Forecast", "skip_tolerance": 1.0, "skip_max": 1}
WAYS = (
    Way("base"),
    Way("SNB, one expert", 1),
    Way("SNB, two experts", 2),
    Way("SNB, one expert", 1, STREAMED),
    Way("SNB, two experts", 2, STREAMED),
    Way("AFA, one expert", 1, settings={"method": "AFA", "afa_maps": "trained"}),
    Way("FreeU", settings={"freeu": "Custom", "freeu_b3": 1.3, "freeu_s3": 0.5, "freeu_b2": 1.4, "freeu_s2": 0.2}),
    Way("skipping, Forecast", settings=SKIPPING),
    Way("SNB, one expert, skipping", 1, settings=SKIPPING),
)


@dataclass(frozen=True)
class Cost:
    """Seconds a step (the mean, with skipped ones), the most bytes in use, and waits a step; None: not countable."""

    seconds: float
    memory: int | None
    waits: float | None


class Streamed:
    """A U-Net that waits in RAM, and whose blocks are on the device for their own forward only."""

    def __init__(self, unet: nn.Module, device: torch.device) -> None:
        self._hooks, self._homes = Hooks(), {}
        blocks = [b for child in unet.children() for b in (child if isinstance(child, nn.ModuleList) else [child])]
        for block in blocks:
            self._homes[block] = {name: value.data for name, value in block.named_parameters()}
            self._hooks.before(block, lambda block, _: self._move(block, device))
            self._hooks.after(block, lambda block, _, __: self._move(block, None))

    def _move(self, block: nn.Module, device: torch.device | None) -> None:
        for name, parameter in block.named_parameters():
            home = self._homes[block][name]
            parameter.data = home if device is None else home.to(device, non_blocking=True)

    def remove(self) -> None:
        self._hooks.remove()


class Pass:
    """One way's models and session, whose steps are taken one by one."""

    def __init__(self, way: Way, unets: Sequence[UNet], side: int, batch: int, steps: int) -> None:
        self.unets, first = unets, unets[0]
        self.device, self.dtype = first.device, first.dtype
        experts = [{"checkpoint": f"expert {i}"} for i in range(1, len(unets))]
        settings = FusionSettings.from_dict({"experts": experts, **way.settings})
        self.session = FusionSession(settings, kinds=[first.kind], guidance_scale=GUIDANCE)
        self.rows = Rows.plain(batch)
        self.levels = [Level(t, max(1e-3, (1 - t / 1000) ** 2), i, i == steps - 1) for i, t in _times(steps)]
        self.session.begin([level.timestep for level in self.levels] + [0.0])
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(self.device, self.dtype)  # noqa: E731
        self.x, self.text = draw(batch, 4, side, side), draw(2 * batch, 77, first.context_dim)
        self.vector = draw(2 * batch, first.label_dim) if first.label_dim else None
        self.times = torch.tensor([level.timestep for level in self.levels], device=self.device)
        self.lockstep: Lockstep | None = None
        if settings.method == "AFA":
            aggregators = sizes_for(first, len(unets)).make().to(self.device, self.dtype).eval()
            self.lockstep = Lockstep(first, list(unets[1:]), aggregators)
            self.session.join(self.lockstep)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.lockstep is not None:
                stack.enter_context(self.lockstep.attach())
            if self.session.freeu:
                stack.enter_context(attach_freeu(read_layout(self.unets[0]).decoder, self.session.freeu[0]))
            yield

    def step(self, i: int) -> None:
        """A step of the sampler: the models' predictions, fused, and an Euler step's arithmetic."""
        level, inputs = self.levels[i], torch.cat([self.x] * 2)
        step = Step(self.session, level, self.rows, list(self.x))
        step.run(range(len(inputs)), inputs, partial(self._predict, inputs, self.times[i : i + 1]))
        step.observe()
        fused = step.fuse()
        cond, uncond = (step.output() if fused is None else fused).chunk(2)
        self.x = self.x - 0.01 * (uncond + GUIDANCE * (cond - uncond)).to(self.x.dtype)
        self.session.check_finite()

    def _predict(
        self, inputs: torch.Tensor, t: torch.Tensor, models: Sequence[int], rows: Sequence[int], _box: Any = None
    ) -> torch.Tensor:
        text = take(self.text, rows)
        vector = None if self.vector is None else take(self.vector, rows)
        call = partial(self.unets[models[0]], take(inputs, rows), t.expand(len(rows)), text, vector)
        if len(models) == 1:
            return call()
        assert self.lockstep is not None
        texts, vectors = [text] * (len(models) - 1), [vector] * (len(models) - 1)
        with self.lockstep.running(texts, mean_context([text] * len(models)), vectors):
            return call()


def _times(steps: int) -> Iterator[tuple[int, float]]:
    return ((i, 981 - 980 * i / max(steps - 1, 1)) for i in range(steps))


def make_unet(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> UNet:
    """A U-Net with PyTorch's random weights, made where it stays."""
    with device:
        unet = UNet(unet_shapes(**config))
    return unet.to(dtype).eval().requires_grad_(False)


@contextmanager
def synchronizations(device: torch.device) -> Iterator[list[int]]:
    """Within, CUDA reports every call that waits for it; the list's one number counts them, afterwards."""
    count = [0]
    if device.type != "cuda":
        yield count
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield count
        finally:
            torch.cuda.set_sync_debug_mode("default")
    count[0] = sum("synchroniz" in str(warning.message) for warning in caught)


@torch.no_grad()
def measure(
    way: Way, config: dict[str, Any], side: int, device: torch.device, dtype: torch.dtype, batch: int, steps: int,
    counting: Callable[[torch.device], Any] = synchronizations,
) -> Cost:  # fmt: skip
    """The cost of a way's steps, after a pass that is not measured."""
    is_cuda = device.type == "cuda"
    homes = [device, *[torch.device("cpu") if way.place == STREAMED else device] * way.experts]
    unets = [make_unet(config, home, dtype) for home in homes]
    streamed = [Streamed(unet, device) for unet in unets[1:]] if way.place == STREAMED else []
    try:
        warm_up, run = (Pass(way, unets, side, batch, steps) for _ in range(2))
        with warm_up.hooked():
            for i in range(min(steps, 2)):
                warm_up.step(i)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        with run.hooked(), counting(device) as waits:
            for i in range(steps):
                began = time.perf_counter()
                run.step(i)  # its check for NaN waits for the device
                seconds.append(time.perf_counter() - began)
    finally:
        for each in streamed:
            each.remove()
    memory = torch.cuda.max_memory_allocated() if is_cuda else None
    return Cost(sum(seconds) / steps, memory, waits[0] / steps if is_cuda else None)


def name_of(device: torch.device) -> str:
    """The device's name for the tables."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def table(size: str, title: str, costs: Sequence[tuple[Way, Cost]]) -> str:
    """A Markdown table of one size; the first way is what the others are compared with."""
    base = costs[0][1].seconds
    columns = "| Way | Experts wait in | Seconds a step | Ratio | Peak memory | Waits a step |"
    lines = [f"### {size}, {title}", "", columns, "|---|---|---|---|---|---|"]
    for way, cost in costs:
        memory = "-" if cost.memory is None else f"{cost.memory / 2**30:.2f} GiB"
        waits = "-" if cost.waits is None else f"{cost.waits:.1f}"
        place = way.place if way.experts else "-"
        lines.append(f"| {way.name} | {place} | {cost.seconds:.3f} | {cost.seconds / base:.2f} | {memory} | {waits} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.device", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="default: float16, CPU: float32")
    parser.add_argument("--sizes", nargs="+", choices=list(REAL), default=list(REAL))
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default 1)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each pass (default 12)")
    parser.add_argument("--reduced", action="store_true", help="small U-Nets; always so on a CPU")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    is_reduced = args.reduced or device.type == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "float16"))
    title = f"{name_of(device)}, {str(dtype)[6:]}, batch {args.batch}, torch {torch.__version__}"
    for size in args.sizes:
        config, side = (REDUCED if is_reduced else REAL)[size]
        shown = f"{size} reduced to {config['model_channels']} channels" if is_reduced else size
        costs = [(way, measure(way, config, side, device, dtype, args.batch, args.steps)) for way in WAYS]
        print(table(shown, f"{side * 8} px, {title}", costs), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
