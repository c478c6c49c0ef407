"""What holds for all tests: one thread each, no time limit for examples, and a stand-in for a CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import hypothesis
import pytest
import torch

from tests import fake_cuda

# No time limit for an example: on a loaded machine the first one takes seconds.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

#: Tests of these folders take minutes a file.
LONG = ("webui_forge", "webui_device", "webui_live")


def pytest_configure() -> None:
    # Small tensors gain nothing from more threads, which wait for each other for minutes where the cores are busy.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so in the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that several processes end together."""
    items.sort(key=lambda item: LONG.index(folder) if (folder := item.path.parent.name) in LONG else len(LONG))


@pytest.fixture
def cuda() -> Iterator[ModuleType]:
    """``tests.fake_cuda`` with its device ``cuda:0`` there; the test is skipped where it can't be built."""
    if sentence := fake_cuda.obstacle():
        pytest.skip(sentence)
    with fake_cuda.installed():
        yield fake_cuda
