"""How the tests are spread over processes: all that talk to the real WebUI are in two groups, each with a WebUI."""

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

LIVE = "tests/webui_live/"
#: The live files of the second group, about half of the time; a file is never in both.
SECOND_GROUP = ("test_afa", "test_browser", "test_hires_button", "test_extensions", "test_faults", "test_identity",
                "test_training")  # fmt: skip


def pytest_configure() -> None:
    # Small tensors gain nothing from more threads, which wait for each other for minutes where the cores are busy.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so in the processes that tests start


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(LIVE):
            item.add_marker(pytest.mark.xdist_group(f"webui {1 + (item.path.stem in SECOND_GROUP)}"))


@pytest.fixture
def cuda() -> Iterator[ModuleType]:
    """``tests.fake_cuda`` with its device ``cuda:0`` there; the test is skipped where it can't be built."""
    if sentence := fake_cuda.obstacle():
        pytest.skip(sentence)
    with fake_cuda.installed():
        yield fake_cuda
