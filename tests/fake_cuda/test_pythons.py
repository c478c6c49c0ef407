"""The stand-in in other processes: with gradients, and with the WebUI's own Python and torch."""

from __future__ import annotations

import subprocess
import sys

import torch

from tests import fake_cuda
from tests.webui_live.host import REPOSITORY, environment
from tests.webui_live.needs import the_host


def check_in(python: str) -> None:
    command = [python, "-m", "tests.fake_cuda.test_fake_cuda"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_gradients_are_computed_on_it(cuda):
    check_in(sys.executable)


def test_it_works_with_the_webuis_torch(cuda):
    _, python = the_host()
    check_in(str(python))


def test_torch_is_as_before_afterwards(cuda):
    before = torch.cuda.is_available, torch.cuda.memory_stats, torch.backends.cudnn.enabled
    with fake_cuda.installed("Another GPU"):
        assert torch.cuda.get_device_name() == "Another GPU"
        assert not torch.backends.cudnn.enabled
    assert (torch.cuda.is_available, torch.cuda.memory_stats, torch.backends.cudnn.enabled) == before
