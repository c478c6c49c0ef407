"""The axes as the host's plot is given them."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lib_fusion.errors import SettingError
from lib_fusion.requests import infotext
from lib_fusion.requests.settings import FREEU_CUSTOM
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
    step, count = r"(?:\s*\(([+-]\d+(?:.\d*)?)\s*\))?\s*", r"(?:\s*\[(\d+(?:.\d*)?)\s*])?\s*"
    plot = SimpleNamespace(
        axis_options=[AxisOption("Nothing", str, None)], AxisOption=AxisOption, re_range=re.compile(whole + r".*"),
        re_range_count=re.compile(whole + r"\[.*"), re_range_float=re.compile(part + step),
        re_range_count_float=re.compile(part + count), csv_string_to_list_strip=lambda text: text.split(","),
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
    listed = [field for field in infotext.list_fields() if field.row not in FREEU_CUSTOM]
    assert {f"[Fusion] {field.label}" for field in listed} < set(labels)
    ends = 2 * sum(field.width == 2 for field in listed)
    assert len(labels) == 1 + 3 + ends + len(listed)  # nothing; switch, preset, factors; both ends of each window
    assert sum("FreeU" in label for label in labels) == 7


def test_what_is_loaded_is_in_the_outer_loop(plot: SimpleNamespace) -> None:
    costs = {option.label.removeprefix("[Fusion] "): option.cost for option in plot.axis_options}
    loads = ("Expert 1 checkpoint", "Expert 3 checkpoint", "Aggregator", "Preset")
    assert min(costs.pop(label) for label in loads) > 0
    costs.pop("Expert 2 checkpoint")
    assert set(costs.values()) == {0}


def test_numbers_are_checked_and_ranges_left_to_the_host(plot: SimpleNamespace) -> None:
    option = option_of(plot, "Expert mask sharpness")
    assert option.type is float
    assert option.prepare("1,0-2 (+0.5), 3") == ["1", "0-2 (+0.5)", " 3"]
    with pytest.raises(SettingError, match="Expert mask sharpness: 'many' is not allowed"):
        option.prepare("1,many")
    with pytest.raises(SettingError, match=r"Most skips in a row: '1\.5' is not allowed"):
        option_of(plot, "Most skips in a row").prepare("1.5")


def test_a_cell_has_a_dict_of_its_own(plot: SimpleNamespace) -> None:
    from lib_fusion.webui.panel import xyz

    p = SimpleNamespace()
    option_of(plot, "Expert mask sharpness").apply(p, 0.1 + 0.2, [])
    before = getattr(p, xyz.ATTRIBUTE)
    option_of(plot, "Ending timestep").apply(p, 100.0, [])
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


def test_freeus_factors_have_one_axis(plot: SimpleNamespace) -> None:
    """A value names the factors that it sets, in the host's ranges, too; the others and the stages stay the panel's."""
    from lib_fusion.webui.panel import xyz

    option = option_of(plot, "FreeU factors")
    cells = option.prepare("b1=1-1.4 [3] s1=0.9, b2 = 1.2-1.6 (+0.2),cutoff3=0.5 high3=2")
    assert cells == ["b1=1 s1=0.9", "b1=1.2 s1=0.9", "b1=1.4 s1=0.9", "b2=1.2", "b2=1.4", "b2=1.6",
                     "cutoff3=0.5 high3=2"]  # fmt: skip
    option.confirm(None, cells)
    p = SimpleNamespace()
    option.apply(p, "b1=1.2 s1=0.9", cells)
    assert getattr(p, xyz.ATTRIBUTE) == {"freeu": "Custom", "freeu_b1": 1.2, "freeu_s1": 0.9}
    option_of(plot, "FreeU").apply(p, "Off", [])
    assert getattr(p, xyz.ATTRIBUTE)["freeu"] == "Off"
    for wrong in ("1.2", "b4=1", "b1=", "b1=1 2 s1", "k=1"):
        with pytest.raises(SettingError, match=r"^FreeU factors.*: .* is not allowed; allowed: (such as b1=|a number)"):
            option.confirm(None, option.prepare(wrong))
    with pytest.raises(SettingError, match="FreeU factors b1: '9' is not allowed; allowed: a number at least -1"):
        option.confirm(None, ["b1=9"])


def test_earlier_axes_are_pasted_as_the_present_ones(plot: SimpleNamespace) -> None:
    """Every name that an axis has had names one, in infotexts of plots that are already made."""
    from lib_fusion.webui.panel import xyz

    now = {option.label for option in plot.axis_options}
    before = ("Expert 1 weight", "Expert 3 window", "Expert 3 window start", "Window end", "Outside", "K general",
              "K expert", "Saliency", "Mask hold", "Mask from", "Guidance until", "Guidance after", "FreeU models",
              "FreeU start", "FreeU stop", "FreeU smooth", "Skips in a row", "Skip warm-up", "Skip correction",
              "Skip passes", "FreeU b1", "FreeU offset 2", "FreeU cutoff 3", "Method", "Expert 2 place")  # fmt: skip
    for label in before:
        entries = {"X Type": "Seed", "X Values": "1,2", "Z Type": f"[Fusion] {label}", "Z Values": "1, 2-3 [4]"}
        xyz.adopt_earlier("", entries)
        assert entries["Z Type"] in now
        assert (entries["X Type"], entries["X Values"]) == ("Seed", "1,2")
        is_factor = label.startswith("FreeU") and label[-1].isdigit()
        assert is_factor == (entries["Z Type"] == "[Fusion] FreeU factors")
    entries = {"Y Type": "[Fusion] FreeU offset 2", "Y Values": "0, 0.2-0.4 [3]"}
    xyz.adopt_earlier("", entries)
    assert entries == {"Y Type": "[Fusion] FreeU factors", "Y Values": "offset2=0, offset2=0.2-0.4 [3]"}
    assert option_of(plot, "FreeU factors").prepare(entries["Y Values"])[1:] == [
        "offset2=0.2", "offset2=0.3", "offset2=0.4"]  # fmt: skip
