"""The vector that SDXL's U-Net takes in addition to its text states: the pooled text, and sizes in pixels.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023), section 2.2,
micro-conditioning.
"""

from __future__ import annotations

import torch

from lib_fusion.methods.layers import timestep_embedding

#: Width of each number's embedding.
NUMBER_DIM = 256
#: Width of all six: original size, crop and target size, two numbers each.
SIZES_DIM = 6 * NUMBER_DIM
#: How many numbers a kind of U-Net takes; the refiner's are original size, crop, and a score in place of the target.
NUMBERS = {"sdxl": 6, "sdxl-refiner": 5}


def sdxl_vector(pooled: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pooled text (B,P) -> vector (B,P + 1536), in its dtype, for whole pictures of ``height`` x ``width`` pixels.

    Original and target size are the picture's, nothing is cropped. Each number is embedded as a timestep is, in the
    order height, width; top, left; height, width.
    """
    numbers = torch.tensor([height, width, 0, 0, height, width], device=pooled.device)
    sizes = timestep_embedding(numbers, NUMBER_DIM).flatten().to(pooled.dtype)
    return torch.cat([pooled, sizes.expand(len(pooled), -1)], dim=1)


def crop_vector(vector: torch.Tensor, kind: str, corner: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """A vector (B,V) with another crop in it: one whose top left ``corner`` and ``size`` (height, width) in pixels are
    these, of the picture of the vector's original size. ``kind``: of the U-Net, ``sdxl`` or ``sdxl-refiner``.

    In training pictures were cropped in this way to the sizes of the batches, so that original size, crop and target
    size say it all.
    """
    numbers = torch.tensor([*corner, *size], device=vector.device)
    known = numbers if kind == "sdxl" else numbers[:2]
    embedded = timestep_embedding(known, NUMBER_DIM).flatten()
    start = vector.shape[1] - (NUMBERS[kind] - 2) * NUMBER_DIM
    result = vector.clone()
    result[:, start : start + len(embedded)] = embedded.to(vector.dtype)
    return result
