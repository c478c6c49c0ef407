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


def sdxl_vector(pooled: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pooled text (B,P) -> vector (B,P + 1536), in its dtype, for whole pictures of ``height`` x ``width`` pixels.

    Original and target size are the picture's, nothing is cropped. Each number is embedded as a timestep is, in the
    order height, width; top, left; height, width.
    """
    numbers = torch.tensor([height, width, 0, 0, height, width], device=pooled.device)
    sizes = timestep_embedding(numbers, NUMBER_DIM).flatten().to(pooled.dtype)
    return torch.cat([pooled, sizes.expand(len(pooled), -1)], dim=1)
