"""GPU memory of weights during a picture: ``python -m benchmarks.memory``. From the shapes of the tensors, as Markdown.

Counted are weights alone. A picture's features come on top: what the WebUI needs for the base alone, with the VAE's
decoding as their peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lib_fusion.unet.config import SD15, unet_shapes

SDXL = {"model_channels": 320, "channel_mult": (1, 2, 4), "num_res_blocks": 2, "attention_resolutions": (4, 2),
        "transformer_depth": (0, 2, 10), "context_dim": 2048, "use_linear_in_transformer": True,
        "adm_in_channels": 2816}  # fmt: skip
#: Numbers in the text encoders (CLIP ViT-L/14; with OpenCLIP bigG/14) and in the VAE.
CLIP, BIGG, VAE = 123_060_480, 694_659_840, 83_653_863
MODELS: dict[str, tuple[dict[str, Any], int]] = {"SD1.5": (SD15, CLIP), "SDXL": (SDXL, CLIP + BIGG)}
GIB = 2**30


def sizes(config: dict[str, Any], fp8: bool) -> dict[str, int]:
    """Bytes of each tensor of a U-Net in float16, or with the WebUI's "FP8 weight": all but norms in one byte."""
    shapes = unet_shapes(**config)

    def width(name: str) -> int:
        is_layer = len(shapes[f"{name.rpartition('.')[0]}.weight"]) > 1
        return 1 if fp8 and is_layer else 2

    return {name: width(name) * math.prod(shape) for name, shape in shapes.items()}


def largest_block(tensors: dict[str, int]) -> int:
    """Bytes of the largest part that is on the device at once where experts come block by block."""
    blocks: dict[str, int] = {}
    for name, size in tensors.items():
        parts = name.split(".")
        block = ".".join(parts[: 2 if parts[0] in ("input_blocks", "output_blocks") else 1])
        blocks[block] = blocks.get(block, 0) + size
    return max(blocks.values())


def rows() -> Iterator[tuple[str, str, list[float]]]:
    """Model, placement, and GiB on the device for 0 to 3 experts with text encoders of their own."""
    for model, (config, text) in MODELS.items():
        for precision, fp8 in (("fp16", False), ("fp8", True)):
            tensors = sizes(config, fp8)
            unet, encoder = sum(tensors.values()), text * (1 if fp8 else 2)
            base, block = unet + encoder + 2 * VAE, largest_block(tensors)
            each = {
                "GPU": [base + n * (unet + encoder) for n in range(4)],
                "RAM between pictures": [base + n * unet for n in range(4)],
                "RAM between U-Net calls": [base + (block if n else 0) for n in range(4)],
                "RAM between U-Net calls, --medvram": [unet + (block if n else 0) for n in range(4)],
            }
            for place, numbers in each.items():
                yield f"{model}, {precision}", place, [number / GIB for number in numbers]


def main() -> None:
    print("| model | where an expert waits | base | 1 expert | 2 experts | 3 experts |\n|---|---|---|---|---|---|")
    for model, place, numbers in rows():
        print(f"| {model} | {place} | {' | '.join(f'{number:.1f}' for number in numbers)} |")
    print("\n| model | a U-Net | its largest block | its text encoders |\n|---|---|---|---|")
    for model, (config, text) in MODELS.items():
        for precision, fp8 in (("fp16", False), ("fp8", True)):
            tensors = sizes(config, fp8)
            parts = (sum(tensors.values()), largest_block(tensors), text * (1 if fp8 else 2))
            print(f"| {model}, {precision} | {' | '.join(f'{part / GIB:.2f}' for part in parts)} |")


if __name__ == "__main__":
    main()
