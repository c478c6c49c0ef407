"""The comparison: base, experts and fusion in one grid, each as it is alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.webui_live.client import PLAIN, Client, expert
from tests.webui_live.conftest import Names

ALONE = {"snb_window": [0, 0], "snb_outside": "expert"}
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}


CASES = [{}, {"batch_size": 2, "n_iter": 2, "steps": 2}, HIRES | {"sampler_name": "Euler a"}]


@pytest.mark.parametrize("changes", CASES)
def test_cells_are_what_each_draws_alone(client: Client, names: Names, changes: dict) -> None:
    two = {"experts": [{"checkpoint": names.expert, "prompt": "a house"}, {"checkpoint": names.other}]}
    ways = [None, expert(names.expert, prompt="a house", **ALONE), expert(names.other, **ALONE), two]
    drawn = [client.draw(way, **changes) for way in ways]
    compared = client.draw({**two, "compare": True}, **changes)
    assert compared.same_as(drawn[-1])
    grid = compared.first
    height, width, _ = drawn[0].pixels[0].shape
    rows, columns = len(drawn[0].pixels), len(ways)
    top, left = grid.shape[0] - rows * height, grid.shape[1] - columns * width
    assert top > 0
    assert left > 0
    for row in range(rows):
        for column, pictures in enumerate(drawn):
            y, x = top + row * height, left + column * width
            assert np.array_equal(grid[y : y + height, x : x + width], pictures.pixels[row]), (row, column)


def test_a_checkpoint_with_two_prompts_has_two_columns(client: Client, names: Names) -> None:
    experts = [{"checkpoint": names.expert, "prompt": text} for text in ("a house", "a fox")]
    alone = [client.draw({"experts": [one], **PLAIN, **ALONE}).pixels[0] for one in experts]
    grid = client.draw({"experts": experts, "compare": True}).first
    height, width, _ = alone[0].shape
    for column, picture in zip((3, 2), alone, strict=True):  # from the right
        x = grid.shape[1] - column * width
        assert np.array_equal(grid[-height:, x : x + width], picture)


def test_a_seed_of_chance_is_the_same_for_all(client: Client, names: Names) -> None:
    compared = client.draw({**expert(names.base), "compare": True}, seed=-1)
    height, width, _ = compared.pixels[0].shape
    cells = [compared.first[-height:, compared.first.shape[1] - i * width :][:, :width] for i in (1, 2)]
    assert np.array_equal(cells[0], cells[1])


def test_it_is_refused_as_any_request(client: Client, names: Names) -> None:
    from tests.webui_live.client import RefusedError

    with pytest.raises(RefusedError, match="422: compare: 'perhaps' is not allowed"):
        client.draw({**expert(names.expert), "compare": "perhaps"})
    with pytest.raises(RefusedError, match="422: experts"):
        client.draw({**expert("nothing"), "compare": True})
