"""Writes into slices of tensors, which some of Apple's GPUs lose: torch before 2.4 computed ``addcmul_`` into a slice
without writing it back (pytorch/pytorch#118115). So a slice is only written by ``mul_`` and ``copy_``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_fusion.fusion.places import make_places
from lib_fusion.fusion.rows import Rows
from lib_fusion.fusion.session import FusionSession
from lib_fusion.fusion.step import Step
from lib_fusion.methods.freeu import FreeU, Stage
from lib_fusion.requests.settings import FusionSettings

ALLOWED = {"aten.mul_.Tensor", "aten.mul_.Scalar", "aten.copy_.default"}


class Writes(TorchDispatchMode):
    """The names of operators that write into a tensor which is not contiguous: ``found``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                target = args[i] if i < len(args) else kwargs.get(argument.name)
                if isinstance(target, torch.Tensor) and not target.is_contiguous():
                    self.found.add(str(func))
        return func(*args, **kwargs)


def test_such_writes_are_noticed() -> None:
    x = torch.ones(2, 4, 3)
    with Writes() as writes:
        x[:, :2].addcmul_(torch.ones(2, 2, 3), torch.ones(2, 1, 3))
        x[0].add_(1)
        x[:, :2] += 1
    assert writes.found - ALLOWED == {"aten.addcmul_.default", "aten.add_.Tensor"}


@pytest.mark.parametrize("cutoff", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_freeu(version: int, dtype: torch.dtype, cutoff: float) -> None:
    freeu = FreeU({2: Stage(1.5, 0.2, offset=0.75, high=1.1, cutoff=cutoff)}, version)
    freeu.strength = 1.0
    with Writes() as writes:
        freeu.edit_(torch.randn(2, 12, 8, 10).to(dtype), 8, multiple=2)
    assert "aten.copy_.default" in writes.found
    assert writes.found <= ALLOWED


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"method": "Average"}, {"snb_saliency": "code"}, {"snb_saliency": "divergence"}, {"place_feather": 2},
        {"place_strength": 0.6}, {"skipping": "Forecast"}, {"skipping": "Paper"}, {"guidance": "always"},
    ],
    ids=str,
)
@pytest.mark.parametrize("half", [False, True])
def test_steps(changes: dict[str, Any], half: bool) -> None:
    places = ["columns 1:1 2", "auto"] if any(key.startswith("place") for key in changes) else ["auto", "auto"]
    experts = [{"checkpoint": str(i), "place": place} for i, place in enumerate(places)]
    settings = FusionSettings.from_dict({"experts": experts, **changes})
    session = FusionSession(settings, make_places(settings, {}), guidance_scale=7)
    levels = [981.0, 901, 850, 700, 500, 390, 250, 100, 1, 0]
    session.begin(levels)
    dtype = torch.float16 if half else torch.float32
    weights = [[1.0], [0.7, 0.4]] if half else [[1.0], [1.0]]
    rows = Rows(weights)
    with Writes() as writes:
        for t in levels[:-1]:
            x = torch.randn(rows.num_all, 4, 6, 9).to(dtype)
            step = Step(session, session.schedule.level(t, t, 1 - (t + 1) / 1010), rows, list(x[: len(weights)]))
            step.run(range(rows.num_all), x, lambda models, chosen, box: torch.randn(len(chosen), 4, 6, 9).to(dtype))
            step.observe()
            step.fuse()
    assert writes.found <= ALLOWED
