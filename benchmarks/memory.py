"""Memory that a picture needs in the WebUI, from the shapes of its models: ``python -m benchmarks.memory``.

Nothing is loaded or computed. Weights are counted by the tensors' names and shapes, and what a step holds meanwhile by
running the U-Net, or the VAE's decoder, on PyTorch's meta device and adding up the tensors that are alive. It prints
the tables of docs/measurements/costs.md; tests/test_memory.py compares them with a counted device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib_fusion.requests.settings import PLACES
from lib_fusion.unet.config import SD15, unet_shapes
from lib_fusion.unet.model import UNet

GIB = 2**30
HALF = torch.float16
#: Of a card's memory, what CUDA, the allocator's gaps and the desktop take: an allowance, not measured.
RESERVED = 1.0
CARDS = (6, 8, 12, 24)
SDXL = {"model_channels": 320, "channel_mult": (1, 2, 4), "num_res_blocks": 2, "attention_resolutions": (4, 2),
        "transformer_depth": (0, 2, 10), "context_dim": 2048, "adm_in_channels": 2816,
        "use_linear_in_transformer": True}  # fmt: skip
#: Text encoders by width, layers, and whether the projections of queries, keys and values are one tensor, which the
#: host does not round to FP8 (OpenCLIP's).
CLIP_L, BIG_G = (768, 12, False), (1280, 32, True)
VOCABULARY, TOKENS = 49408, 77


@dataclass(frozen=True)
class Kind:
    """A kind of model at its usual picture: ``side`` in pixels."""

    name: str
    config: Mapping[str, Any]
    texts: tuple[tuple[int, int, bool], ...]
    side: int


KINDS = (Kind("SD1.5", SD15, (CLIP_L,), 512), Kind("SDXL", SDXL, (CLIP_L, BIG_G), 1024))


def is_rounded(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the host's setting "FP8 weight" rounds a tensor: one of a linear or convolutional layer."""
    weight = name.removesuffix("bias") + "weight" if name.endswith("bias") else name
    return len(shapes.get(weight, shape)) > 1


def unet_bytes(shapes: Mapping[str, tuple[int, ...]], fp8: bool) -> int:
    """Bytes of a U-Net's weights in half precision, or in FP8 as the host stores them."""
    return sum(_size(shape) * (1 if fp8 and is_rounded(name, shape, shapes) else 2) for name, shape in shapes.items())


def largest_block(shapes: Mapping[str, tuple[int, ...]], fp8: bool) -> int:
    """Bytes of the largest part that *RAM between U-Net calls* has on the GPU at one time."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        first, second = name.split(".")[:2]
        parts.setdefault(f"{first}.{second}" if first.endswith("_blocks") else first, {})[name] = shape
    return max(unet_bytes(part, fp8) for part in parts.values())


def text_bytes(texts: tuple[tuple[int, int, bool], ...], fp8: bool) -> int:
    """Bytes of a conditioner's weights: embeddings, and per layer four projections, two inner layers and two norms."""
    total = 0
    for width, layers, joined in texts:
        qkv, others = 3 * (width * width + width), 9 * width * width + 6 * width
        rounded = others + (0 if joined else qkv)
        whole = 4 * width + (qkv if joined else 0)
        embeddings = (VOCABULARY + TOKENS) * width + 2 * width + (width * width if joined else 0)
        total += layers * (rounded * (1 if fp8 else 2) + whole * 2) + embeddings * 2
    return total


@cache
def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        sides = (128, 256, 512, 512)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return AutoencoderKL(block_out_channels=sides, layers_per_block=2, latent_channels=4, **blocks).to(HALF)


def bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


class AliveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make within; ``peak`` is the most that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {StorageWeakRef(x.untyped_storage()).cdata for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(result)):
            ref = StorageWeakRef(tensor.untyped_storage())
            if ref.cdata not in held:
                self._alive[ref.cdata] = ref, tensor.untyped_storage().nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Attention as the kernels of a GPU hold it: no map of all queries and keys."""
    return torch.empty_like(q)


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes that a run holds at most, beside weights and inputs."""
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", attend), AliveTensors() as alive:
        run()
    return alive.peak


def empty_unet(config: Mapping[str, Any]) -> UNet:
    with torch.device("meta"):
        return UNet(unet_shapes(**config)).to(HALF)


def step_bytes(unet: UNet, side: int, rows: int = 2) -> int:
    """Bytes of a U-Net call's tensors for ``rows`` latents: a prompt and its negative prompt."""
    at = {"device": unet.device, "dtype": unet.dtype}
    x, t = torch.empty(rows, unet.in_channels, side // 8, side // 8, **at), torch.empty(rows, device=unet.device)
    y = torch.empty(rows, unet.label_dim, **at) if unet.label_dim else None
    return peak_of(lambda: unet(x, t, torch.empty(rows, TOKENS, unet.context_dim, **at), y))


def decode_bytes(side: int) -> int:
    latent = torch.empty(1, 4, side // 8, side // 8, device="meta", dtype=HALF)
    return peak_of(lambda: vae().decode(latent))


@dataclass(frozen=True)
class Needs:
    """Bytes of one kind's parts, all in half precision or FP8 (the VAE and what is computed: half precision)."""

    unet: int
    block: int
    text: int
    vae: int
    step: int
    decode: int

    def base(self, medvram: bool) -> int:
        """What the host's own model has on the GPU while sampling; ``--medvram`` leaves it the U-Net."""
        return self.unet if medvram else self.unet + self.text + self.vae

    def sampling(self, experts: int, place: str, medvram: bool = False) -> int:
        """Bytes on the GPU at most while a picture is sampled with experts that have their own text encoders."""
        own = {PLACES[0]: experts * (self.unet + self.text), PLACES[1]: experts * self.unet,
               PLACES[2]: self.block if experts else 0}  # fmt: skip
        if medvram and place == PLACES[0]:
            place = PLACES[1]  # then experts wait in RAM, too
        return self.base(medvram) + own[place] + self.step

    def decoding(self, medvram: bool = False) -> int:
        """And while it is decoded, with no expert on the GPU."""
        return (self.vae if medvram else self.base(False)) + self.decode


def needs_of(kind: Kind, fp8: bool) -> Needs:
    shapes = unet_shapes(**kind.config)
    step, decode = _computed(KINDS.index(kind))
    largest = max(_size(shape) for shape in shapes.values())
    return Needs(
        unet_bytes(shapes, fp8), largest_block(shapes, fp8), text_bytes(kind.texts, fp8), bytes_of(vae()),
        step + 2 * largest * fp8,  # a layer in FP8 computes on a copy in half precision
        decode,
    )  # fmt: skip


@cache
def _computed(index: int) -> tuple[int, int]:
    """Bytes of a step and of decoding; they are the same in FP8."""
    return step_bytes(empty_unet(KINDS[index].config), KINDS[index].side), decode_bytes(KINDS[index].side)


def choice(needs: Needs, experts: int, card: float) -> str:
    """The fastest way that fits a card of so many GiB: placements in their order, then with ``--medvram``."""
    room = (card - RESERVED) * GIB
    for medvram in (False, True):
        for place in PLACES[1:] if medvram else PLACES:
            if max(needs.sampling(experts, place, medvram), needs.decoding(medvram)) <= room:
                return f"{place}{', --medvram' if medvram else ''}"
    return "does not fit"


def report() -> list[str]:
    """The tables, as Markdown."""
    lines = ["| GiB | U-Net | its largest block | text encoders | VAE | a step | decoding |", f"|{'---|' * 7}"]
    every = [(kind, fp8, needs_of(kind, fp8)) for kind in KINDS for fp8 in (False, True)]
    title = lambda kind, fp8: f"{kind.name}, {'FP8' if fp8 else 'fp16'}"  # noqa: E731
    for kind, fp8, n in every:
        parts = " | ".join(f"{size / GIB:.2f}" for size in (n.unet, n.block, n.text, n.vae, n.step, n.decode))
        lines.append(f"| {title(kind, fp8)} | {parts} |")
    head = " | ".join(PLACES)
    lines += ["", f"| GiB while sampling | experts | {head} | the last two with --medvram |", f"|{'---|' * 6}"]
    for kind, fp8, n in every:
        for experts in range(4):
            cells = " | ".join(f"{n.sampling(experts, place) / GIB:.1f}" for place in PLACES)
            less = ", ".join(f"{n.sampling(experts, place, True) / GIB:.1f}" for place in PLACES[1:])
            lines.append(f"| {title(kind, fp8)} | {experts} | {cells} | {less} |")
    cards = " | ".join(f"{card} GB" for card in CARDS)
    lines += ["", f"| choose | experts | {cards} |", f"|---|---|{'---|' * len(CARDS)}"]
    for kind, fp8, n in every:
        for experts in range(1, 4):
            lines.append(f"| {title(kind, fp8)} | {experts} | {' | '.join(choice(n, experts, c) for c in CARDS)} |")
    return lines


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("\n".join(report()))


if __name__ == "__main__":
    main()
