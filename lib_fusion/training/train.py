"""Trains aggregators on a cache: frozen U-Nets, noise-prediction loss of the blended prediction (AFA, section 3).

Everything random in a step is drawn from (seed, step) for the whole batch, and each process takes its share: so a run
that is resumed, or spread over processes, repeats what an unbroken run of one process does.
"""

from __future__ import annotations

import csv
import math
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.files import write_whole
from lib_fusion.fusion.aggregator_files import Card, ModelIdentity, identify_model, load_aggregators, save_aggregators
from lib_fusion.fusion.lockstep import sizes_for
from lib_fusion.training.cache import Cache, Text, stack_texts
from lib_fusion.training.ensemble import TIMESTEPS, Ensemble, add_noise, alphas_cumprod, load_models
from lib_fusion.training.options import CHANGEABLE, TrainingSettings
from lib_fusion.unet.model_file import ModelFile

LOG, STATE = "log.csv", "state.pt"
COLUMNS = ("step", "loss", "learning_rate", "seconds")
#: How many losses the mean shown to people and kept in the file's card covers.
WINDOW = 100
SECONDS_BETWEEN_LINES = 10.0


class Batches:
    """Draws batches of one latent size; a picture is as likely as its repeats say, a size as all of its own."""

    def __init__(self, cache: Cache, settings: TrainingSettings) -> None:
        self.cache, self.settings = cache, settings
        sizes = sorted({entry.size for entry in cache.entries})
        self.groups = [[entry for entry in cache.entries if entry.size == size] for size in sizes]
        self._repeats = [torch.tensor([e.repeats for e in group], dtype=torch.float64) for group in self.groups]

    def draw(self, step: int, part: slice) -> tuple[torch.Tensor, list[Text], torch.Tensor, torch.Tensor]:
        """Latents (B,C,h,w), each model's texts of B captions, noise like the latents, timesteps (B,); of ``part``."""
        s = self.settings
        generator = torch.Generator().manual_seed(zlib.crc32(f"{s.seed}/{step}".encode()))
        shares = torch.stack([repeats.sum() for repeats in self._repeats])
        number = int(torch.multinomial(shares, 1, generator=generator))
        group, repeats = self.groups[number], self._repeats[number]
        chosen = torch.multinomial(repeats, s.batch_size, replacement=True, generator=generator).tolist()
        is_empty = (torch.rand(s.batch_size, generator=generator) < s.caption_dropout).tolist()
        timesteps = torch.randint(TIMESTEPS, (s.batch_size,), generator=generator)
        read = [self.cache.read(group[i]) for i in chosen[part]]
        texts = [self.cache.empty if empty else text for (_, text), empty in zip(read, is_empty[part], strict=True)]
        latents = torch.stack([latent for latent, _ in read])
        noise = torch.randn((s.batch_size, *latents.shape[1:]), generator=generator)
        return latents, stack_texts(texts), noise[part], timesteps[part]


def train(
    folder: str | Path, checkpoints: Sequence[str | Path | ModelFile], out: str | Path, settings: TrainingSettings,
    device: str | torch.device = "cpu", tell: Callable[[str], None] = lambda _: None, init: str | Path | None = None,
) -> Card:  # fmt: skip
    """Trains on the cache in ``folder`` and writes the aggregator file ``out``; ``out``.run is kept in the same folder.

    ``init``: an aggregator file of the same sizes to begin with, also one of other models. A run whose folder is there
    resumes from its last saved state, also to more steps than before. Raises FusionError where it can't.
    """
    s, out = settings, Path(out)
    if out.suffix != ".safetensors":
        raise SettingError("out", str(out), "allowed: a name that ends in .safetensors")
    device = torch.device(device)
    with _processes(device) as (rank, world):
        check_settings(s, world)
        check_precision(s.precision, device)
        cache = Cache(folder)
        dtype = getattr(torch, s.precision)
        unets = load_models(checkpoints, cache, dtype, device)
        models = tuple(identify_model(path) for path in checkpoints)
        torch.manual_seed(s.seed)
        sizes = sizes_for(unets[0], len(unets), s.hidden, s.layers, s.heads)
        aggregators = sizes.make().to(device)
        if init is not None:
            given, begin = load_aggregators(init, device=device)
            if given.sizes != sizes:
                raise FusionError(f"{init}: aggregators of other sizes ({given.describe()})")
            aggregators.load_state_dict(begin.state_dict())
        run = TrainingRun(out.with_suffix(".run"), models, len(cache.entries), s, aggregators, device, rank)
        ensemble = Ensemble(unets, aggregators)
        if s.checkpointing:
            ensemble.recompute_activations()
        module = DistributedDataParallel(ensemble) if world > 1 else ensemble
        try:
            losses = _loop(module, unets[0].prediction, Batches(cache, s), run, rank, world, tell)
        finally:
            run.close()
        data = {"data": cache.index["source"], "pictures": len(cache.entries)}
        data |= {"init": Path(init).name} if init is not None else {}
        loss = {"loss": round(sum(losses[-WINDOW:]) / len(losses[-WINDOW:]), 6)}
        card = Card(unets[0].kind, unets[0].prediction, sizes, models, {**data, **asdict(s), **loss})
        if rank == 0:
            save_aggregators(out, card, run.ema or aggregators.state_dict())
    return card


def check_settings(s: TrainingSettings, world: int = 1) -> None:
    """Raises SettingError for values that do not go together; ``world`` is the number of processes."""
    if s.batch_size % (world * s.accumulate):
        allowed = f"allowed: a multiple of {world} processes x {s.accumulate} parts"
        raise SettingError("batch_size", s.batch_size, allowed)
    if s.hidden % s.heads:
        raise SettingError("heads", s.heads, f"allowed: a number that divides hidden ({s.hidden})")
    if s.hidden > 128 and s.hidden % 32:
        raise SettingError("hidden", s.hidden, "allowed: above 128, a multiple of 32")


def check_precision(precision: str, device: torch.device) -> None:
    """Raises SettingError for a precision that this torch cannot compute in on the device."""
    if precision == "float32":
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # float16 on the CPU of torch before 2.3: switched off with a warning
            torch.autocast(device.type, getattr(torch, precision))
    except (RuntimeError, AssertionError, AttributeError, UserWarning) as error:  # by device and version of torch
        others = "float32" if device.type != "cpu" else "float32, bfloat16"
        allowed = f"allowed on {device.type} with torch {torch.__version__}: {others}"
        raise SettingError("precision", precision, allowed) from error


class _processes:  # noqa: N801 - a context manager that reads like a function
    """(rank, number of processes), joined as torchrun asks; one process where it does not."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.world = int(os.environ.get("WORLD_SIZE", "1"))

    def __enter__(self) -> tuple[int, int]:
        if self.world == 1:
            return 0, 1
        if self.device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return distributed.get_rank(), self.world

    def __exit__(self, *_: object) -> None:
        if self.world > 1:
            distributed.destroy_process_group()


class TrainingRun:
    """What a run keeps on disk: its state, from which it resumes exactly, and its log."""

    def __init__(
        self, folder: Path, models: Sequence[ModelIdentity], pictures: int, settings: TrainingSettings,
        aggregators: nn.Module, device: torch.device, rank: int,
    ) -> None:  # fmt: skip
        self.folder, self.settings, self.aggregators, self.rank = folder, settings, aggregators, rank
        self.optimizer = torch.optim.AdamW(
            aggregators.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.scaler = _scaler(device, settings.precision == "float16")
        self.ema = {k: v.detach().clone() for k, v in aggregators.state_dict().items()} if settings.ema else None
        self.step, self.seconds = 0, 0.0
        fixed = {key: value for key, value in asdict(settings).items() if key not in CHANGEABLE}
        self.identity: dict[str, Any] = {
            "settings": fixed, "models": [{"name": model.title, "unet": model.unet} for model in models],
            "pictures": pictures,
        }  # fmt: skip
        self.losses: list[float] = []
        self._resume()
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._log = (folder / LOG).open("w", newline="", encoding="utf-8")
            self._writer = csv.writer(self._log)
            self._writer.writerow(COLUMNS)
            self._writer.writerows(self._rows)
            self._board = _tensorboard(folder)

    def _resume(self) -> None:
        self._rows: list[list[Any]] = []
        path = self.folder / STATE
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for broken files
            raise FusionError(f"{path}: can't be read; delete {self.folder} to start again ({error})") from error
        if state["identity"] != self.identity:
            wrong = [key for key, value in self.identity["settings"].items()
                     if state["identity"]["settings"].get(key) != value]  # fmt: skip
            problem = f"other settings ({', '.join(wrong)})" if wrong else "another cache or other models"
            raise FusionError(f"{self.folder}: a run with {problem}; delete it to start again, or choose another out")
        self.aggregators.load_state_dict(state["aggregators"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema = {key: value.to(self.ema[key].device) for key, value in state["ema"].items()}
        self.step, self.seconds = state["step"], state["seconds"]
        with (self.folder / LOG).open(newline="", encoding="utf-8") as file:
            self._rows = [row for row in list(csv.reader(file))[1:] if len(row) == len(COLUMNS)][: self.step]
        self.losses = [float(row[1]) for row in self._rows]

    def save(self) -> None:
        """Whole or not at all."""
        if self.rank:
            return
        self._log.flush()
        state = {"aggregators": self.aggregators.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "scaler": self.scaler.state_dict(), "ema": self.ema, "step": self.step, "seconds": self.seconds,
                 "identity": self.identity}  # fmt: skip
        try:
            write_whole(self.folder / STATE, lambda partial: torch.save(state, partial))
        except (OSError, RuntimeError) as error:
            problem = f"can't be written ({error}); the last saved state stays"
            raise FusionError(f"{self.folder / STATE}: {problem}") from error

    def note(self, loss: float, rate: float, seconds: float) -> None:
        """One step is done."""
        self.step += 1
        self.seconds = seconds
        self.losses.append(loss)
        if self.ema:
            decay = min(self.settings.ema, self.step / (self.step + 10))
            weights = self.aggregators.state_dict()
            for key, value in self.ema.items():
                value.lerp_(weights[key], 1 - decay)
        if self.rank == 0:
            try:
                self._writer.writerow([self.step, repr(loss), f"{rate:.6g}", f"{seconds:.2f}"])
                self._log.flush()
            except OSError as error:
                problem = f"can't be written ({error}); the last saved state stays"
                raise FusionError(f"{self.folder / LOG}: {problem}") from error
            if self._board is not None:
                self._board.add_scalar("loss", loss, self.step)
                self._board.add_scalar("learning rate", rate, self.step)

    def close(self) -> None:
        if self.rank == 0:
            with suppress(OSError):  # reported already where the disk is full
                self._log.close()
            if self._board is not None:
                self._board.close()


def _scaler(device: torch.device, enabled: bool) -> Any:
    """float16's scaler of the loss; before torch 2.3 only CUDA has one."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device.type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def _loop(
    module: nn.Module, prediction: str, batches: Batches, run: TrainingRun, rank: int, world: int,
    tell: Callable[[str], None],
) -> list[float]:
    """All steps that are left; returns the losses of all steps."""
    s = run.settings
    device = next(module.parameters()).device
    parameters = list(run.aggregators.parameters())
    schedule = alphas_cumprod().to(device)
    share = s.batch_size // (world * s.accumulate)
    is_full = s.precision == "float32"  # which torch 2.1's autocast refuses, even switched off
    autocast = nullcontext() if is_full else torch.autocast(device.type, getattr(torch, s.precision))
    began = time.monotonic() - run.seconds
    began_here, first = time.monotonic(), run.step
    if run.step:
        tell(f"goes on at step {run.step}")
    while run.step < s.steps:
        rate = _rate(s, run.step)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=device)
        for i in range(s.accumulate):
            start = (rank * s.accumulate + i) * share
            x, texts, noise, t = batches.draw(run.step, slice(start, start + share))
            a = schedule[t.to(device)]
            noisy, target = add_noise(x.to(device), noise.to(device), a, prediction)
            is_last = i == s.accumulate - 1  # after which the processes exchange gradients
            with module.no_sync() if isinstance(module, DistributedDataParallel) and not is_last else nullcontext():
                with autocast:
                    output = module(noisy, t.to(device), [text.to(device) for text in texts])
                errors = (output.float() - target).square().mean(dim=(1, 2, 3))
                loss = (_weights(a, s.min_snr, prediction) * errors).mean() / s.accumulate
                run.scaler.scale(loss).backward()
            total += loss.detach()
        if world > 1:
            distributed.all_reduce(total)
            total /= world
        loss = total.item()
        if not math.isfinite(loss):
            raise FusionError(f"the loss is {loss} at step {run.step + 1}; a lower learning rate or bfloat16 may help")
        run.scaler.unscale_(run.optimizer)
        if s.clip:
            nn.utils.clip_grad_norm_(parameters, s.clip)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        run.note(loss, rate, now - began)
        left = (now - began_here) / (run.step - first) * (s.steps - run.step)
        recent = run.losses[-WINDOW:]
        tell(f"step {run.step}/{s.steps} loss {sum(recent) / len(recent):.4f} {clock(now - began)}<{clock(left)}")
        if run.step % s.save_every == 0 or run.step == s.steps:
            run.save()
    return run.losses


def _rate(s: TrainingSettings, step: int) -> float:
    rate = s.learning_rate * min(1.0, (step + 1) / (s.warm_up + 1))
    return rate if s.schedule == "constant" else rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / s.steps)))


def _weights(alphas: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """Min-SNR weights (B,): min(SNR, gamma) / SNR for noise, / (SNR + 1) for v (Hang et al. 2023); 1 without gamma."""
    if gamma == 0:
        return torch.ones_like(alphas)
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def clock(seconds: float) -> str:
    """Hours, where there are any, minutes and seconds, for people."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def is_first_process() -> bool:
    """Whether this is the only process, or the one of several that writes and talks."""
    return os.environ.get("RANK", "0") == "0"


def teller() -> Callable[[str], None]:
    """Progress for people: one line that is written over in a terminal, else a line now and then."""
    if not is_first_process():
        return lambda _: None
    if sys.stderr.isatty():
        longest = [0]  # of the line so far: spaces clear it in any console

        def show(text: str) -> None:
            end = "" if text.startswith("step") else "\n"
            longest[0] = max(longest[0], len(text))
            print(f"\r{text:<{longest[0]}}", end=end, file=sys.stderr, flush=True)
            longest[0] = longest[0] if not end else 0

        return show
    last = [0.0]

    def tell(text: str) -> None:
        if not text.startswith("step") or time.monotonic() - last[0] > SECONDS_BETWEEN_LINES:
            last[0] = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    return tell
