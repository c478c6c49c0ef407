"""One training stage: AdamW with warm-up and cosine decay, EMA, and a state on disk from which it resumes exactly.

Every step draws from a generator seeded by (stage, step), so a resumed run repeats what an unbroken one would do.
"""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lib_fusion.files import write_whole

SAVE_EVERY_SECONDS = 60.0


def _save(state: dict, path: Path) -> None:
    write_whole(path, lambda partial: torch.save(state, partial))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself; a CPU that emulates it takes ten times as long as in float32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda"


def run_stage(
    name: str,
    modules: nn.ModuleDict,
    loss_of: Callable[[int, torch.Generator], torch.Tensor],
    *,
    steps: int,
    lr: float,
    folder: Path,
    weight_decay: float = 0.01,
    ema_decay: float = 0.999,
    warm_up: int = 50,
    log_every: int = 100,
) -> nn.ModuleDict:
    """Trains ``modules`` for ``steps`` steps of ``loss_of(step, generator)`` and leaves their EMA weights in them.

    A finished stage is only loaded; an unfinished one goes on from ``folder/{name}.state``.
    """
    done, running = folder / f"{name}.pt", folder / f"{name}.state"
    if done.exists():
        modules.load_state_dict(torch.load(done, map_location="cpu", weights_only=True))
        print(f"{name}: already trained")
        return modules
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    weights = [value for value in modules.state_dict().values() if value.is_floating_point()]
    ema = {key: value.detach().clone() for key, value in modules.state_dict().items()}
    start, spent = 0, 0.0
    if running.exists():
        state = torch.load(running, map_location="cpu", weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        for key, value in state["ema"].items():
            ema[key].copy_(value)
        start, spent = state["step"], state["seconds"]
        print(f"{name}: goes on at step {start}")
    averages = [value for value in ema.values() if value.is_floating_point()]
    began = saved = time.monotonic()
    device = parameters[0].device
    mean = 0.0
    for step in range(start, steps):
        rate = lr * min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{step}".encode()))
        with torch.autocast(device.type, torch.bfloat16) if has_bfloat16(device) else contextlib.nullcontext():
            loss = loss_of(step, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)
        mean += loss.item() / log_every
        now = time.monotonic()
        if (step + 1) % log_every == 0:
            seconds = spent + now - began
            left = (now - began) / (step + 1 - start) * (steps - step - 1)
            print(f"{name}: step {step + 1}/{steps} loss {mean:.4f} {seconds:.0f} s, {left:.0f} s left", flush=True)
            mean = 0.0
        if now - saved > SAVE_EVERY_SECONDS:
            saved = now
            _save(
                {
                    "modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema,
                    "step": step + 1, "seconds": spent + now - began,
                },
                running,
            )
    modules.load_state_dict(ema)
    _save(modules.state_dict(), done)
    running.unlink(missing_ok=True)
    return modules
