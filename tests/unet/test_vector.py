"""SDXL's vector, and a crop put into it."""

from __future__ import annotations

import math

import pytest
import torch

from lib_fusion.unet.vector import crop_vector, sdxl_vector


def embed(number: float) -> torch.Tensor:
    """A number's embedding (256,): cosines, then sines, of frequencies from 1 down to 1/10000."""
    angles = [number * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])


@pytest.mark.parametrize(
    ("kind", "others", "numbers"),
    [("sdxl", [], [768, 1024, 64, 320, 512, 640]), ("sdxl-refiner", [6.0], [768, 1024, 64, 320, 6.0])],
)
def test_a_crop_is_told_by_its_corner_and_where_there_is_a_target_by_its_size(kind, others, numbers) -> None:
    pooled = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    vector = sdxl_vector(pooled, 768, 1024)
    if others:  # the refiner has a score in place of the target size
        vector = torch.cat([vector[:, :-512], embed(others[0]).expand(2, -1)], dim=1)
    given = vector.clone()
    cropped = crop_vector(vector, kind, (64, 320), (512, 640))
    assert torch.equal(vector, given)
    assert torch.equal(cropped[:, :16], pooled)
    for i, number in enumerate(numbers):
        part = cropped[:, 16 + 256 * i :][:, :256]
        torch.testing.assert_close(part, embed(number).expand(2, -1), rtol=1e-4, atol=1e-4)
