"""The axes as the host's plot is given them."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lib_fusion.errors import SettingError
from lib_fusion.requests import infotext
from tests.webui_fake import fakes


class AxisOption(SimpleNamespace):
    def __init__(self, label, type, apply, confirm=None, cost=0.0, choices=None, prepare=None):  # noqa: A002
        super().__init__(label=label, type=type, apply=apply, confirm=confirm, cost=cost, choices=choices,
                         prepare=prepare)  # fmt: skip


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> SimpleNamespace:
    """The host's plot with our axes in it."""
    fakes.install(monkeypatch)
    whole, part = r"\s*([+-]?\d+)\s*-\s*([+-]?\d+)", r"\s*([\d.]+)\s*-\s*([\d.]+)"
    plot = SimpleNamespace(
        axis_options=[AxisOption("Nothing", str, None)], AxisOption=AxisOption, re_range=re.compile(whole + r".*"),
        re_range_count=re.compile(whole + r"\[.*"), re_range_float=re.compile(part + r".*"),
        re_range_count_float=re.compile(part + r"\[.*"), csv_string_to_list_strip=lambda text: text.split(","),
    )  # fmt: skip
    script = type("Script", (), {"__module__": "xyz_grid.py"})
    scripts = SimpleNamespace(scripts_data=[SimpleNamespace(script_class=script, module=plot)])
    monkeypatch.setattr(sys.modules["modules"], "scripts", scripts, raising=False)
    monkeypatch.setitem(sys.modules, "modules.scripts", scripts)
    monkeypatch.setattr(sys.modules["modules.paths"], "data_path", str(tmp_path), raising=False)
    from lib_fusion.webui.panel import xyz

    xyz.add_axes()
    xyz.add_axes()
    return plot


def option_of(plot: SimpleNamespace, label: str) -> Any:
    return next(option for option in plot.axis_options if option.label == f"[Fusion] {label}")


def test_each_field_has_its_axis_once(plot: SimpleNamespace) -> None:
    labels = [option.label for option in plot.axis_options]
    assert len(labels) == len(set(labels))
    assert {f"[Fusion] {field.label}" for field in infotext.list_fields()} < set(labels)
    listed = list(infotext.list_fields())
    ends = 2 * sum(field.width == 2 for field in listed)
    assert len(labels) == 1 + 2 + ends + len(listed)  # nothing; switch, preset; both ends of each window


def test_what_is_loaded_is_in_the_outer_loop(plot: SimpleNamespace) -> None:
    costs = {option.label.removeprefix("[Fusion] "): option.cost for option in plot.axis_options}
    loads = ("Expert 1 checkpoint", "Expert 3 checkpoint", "Aggregator", "Preset")
    assert min(costs.pop(label) for label in loads) > 0
    costs.pop("Expert 2 checkpoint")
    assert set(costs.values()) == {0}


def test_numbers_are_checked_and_ranges_left_to_the_host(plot: SimpleNamespace) -> None:
    option = option_of(plot, "K expert")
    assert option.type is float
    assert option.prepare("1,0-2 (+0.5), 3") == ["1", "0-2 (+0.5)", " 3"]
    with pytest.raises(SettingError, match="K expert: 'many' is not allowed"):
        option.prepare("1,many")
    with pytest.raises(SettingError, match=r"Skips in a row: '1\.5' is not allowed"):
        option_of(plot, "Skips in a row").prepare("1.5")


def test_a_cell_has_a_dict_of_its_own(plot: SimpleNamespace) -> None:
    from lib_fusion.webui.panel import xyz

    p = SimpleNamespace()
    option_of(plot, "K expert").apply(p, 0.1 + 0.2, [])
    before = getattr(p, xyz.ATTRIBUTE)
    option_of(plot, "Window end").apply(p, 100.0, [])
    assert before == {"k_expert": 0.3}
    assert getattr(p, xyz.ATTRIBUTE) == {"k_expert": 0.3, "snb_window_end": 100}


def test_an_aggregator_gives_way_to_other_axes(plot: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_fusion.webui.models import aggregators
    from lib_fusion.webui.panel import xyz

    implied = {"method": "AFA", "expert1_checkpoint": "b"}
    monkeypatch.setattr(aggregators, "implied_by", lambda name: implied)
    wanted = {"afa_aggregator": "ab", "method": "SNB", "expert1_checkpoint": "b"}
    for order in (("Method", "Aggregator"), ("Aggregator", "Method")):
        p = SimpleNamespace()
        for label in order:
            option_of(plot, label).apply(p, {"Method": "SNB", "Aggregator": "ab"}[label], [])
        assert getattr(p, xyz.ATTRIBUTE) == wanted
