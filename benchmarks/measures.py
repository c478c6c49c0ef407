"""How far pictures are from others: PSNR and SSIM of 8-bit pictures, for benchmarks."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def psnr(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """PSNR in dB of each picture, uint8 (N,H,W,3) -> (N,). Equal ones count as if one value were off by one."""
    squares = (pictures.astype(np.float64) - references.astype(np.float64)).reshape(len(pictures), -1) ** 2
    return 10 * np.log10(255**2 / np.maximum(squares.mean(1), 1 / squares.shape[1]))


def ssim(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """SSIM (Wang et al. 2004: Gaussian window of 11, sigma 1.5) of the luminances, uint8 (N,H,W,3) -> (N,)."""
    a, b = (torch.from_numpy(p.astype(np.float64) @ np.array([0.299, 0.587, 0.114]))[:, None] for p in
            (pictures, references))  # fmt: skip
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line)[None, None] / line.sum() ** 2

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, window)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    local = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return local.mean((1, 2, 3)).numpy()
