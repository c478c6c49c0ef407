"""The table of parameters: every row reads what it shows, and refuses what it does not allow."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.requests.settings import (
    EXPERT_PARAMETERS,
    GENERATION_PARAMETERS,
    PARAMETERS,
    ExpertSettings,
    FusionSettings,
    GenerationSettings,
)

ALL = [*EXPERT_PARAMETERS, *PARAMETERS, *GENERATION_PARAMETERS]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.key)
def test_default_is_allowed_and_survives_text(row):
    assert row.read(row.default) == row.default
    assert row.read(row.show(row.default)) == row.default


@pytest.mark.parametrize("row", [row for row in ALL if row.kind in ("int", "float")], ids=lambda row: row.key)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many", None, True, [], {}])
def test_numbers_refuse_what_is_none(row, value):
    with pytest.raises(SettingError, match=row.key):
        row.read(value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"k_general": -1}, "k_general"),
        ({"k_expert": "x"}, "k_expert"),
        ({"snb_window": "1001:0"}, "snb_window"),
        ({"snb_window": [0, 600]}, "snb_window"),
        ({"snb_window": "600"}, "snb_window"),
        ({"snb_hold": 1001}, "snb_hold"),
        ({"snb_outside": "both"}, "snb_outside"),
        ({"method": "magic"}, "method"),
        ({"no_such": 1}, "no_such"),
        ({"experts": "file"}, "experts"),
        ({"experts": ["file"]}, r"experts\[0\]"),
        ({"experts": [{"checkpoint": "a", "text_encoder": "other"}]}, r"experts\[0\].text_encoder"),
        ({"experts": [{"checkpoint": "a"}, {"nope": 1}]}, r"experts\[1\].nope"),
    ],
)
def test_errors_name_the_field(values, named):
    with pytest.raises(SettingError, match=named) as caught:
        FusionSettings.from_dict(values)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([row.key for row in PARAMETERS] + ["experts", "other"]), JSON, max_size=4))
def test_any_input_is_read_or_refused_in_one_line(values):
    try:
        fusion = FusionSettings.from_dict(values)
    except FusionError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert FusionSettings.from_dict(fusion.to_dict()) == fusion


def test_round_trip():
    fusion = FusionSettings.from_dict(
        {
            "experts": [{"checkpoint": "a", "prompt": "a dog"}, {"checkpoint": "b", "text_encoder": "BASE"}],
            "method": "average",
            "snb_window": "900:100",
            "k_expert": "2.5",
            "snb_hold": 850,
        }
    )
    assert fusion.method == "Average"
    assert fusion.snb_window == (900.0, 100.0)
    assert fusion.experts[1] == ExpertSettings("b", text_encoder="base")
    assert FusionSettings.from_dict(fusion.to_dict()) == fusion


@pytest.mark.parametrize(
    ("window", "inside", "out"),
    [
        ("1000:600", (1000, 999, 601), (600, 0)),  # the paper's mode 2 with v1 = 600: fused while t > 600
        ("600:0", (600, 1, 0), (601, 999)),  # mode 1: fused once t <= 600
        ("600:600", (), (999, 601, 600, 599, 0)),
        ("0:0", (), (0, 1)),
        ("1000:0", (1000, 999, 0), ()),
    ],
)
def test_window(window, inside, out):
    fusion = FusionSettings.from_dict({"snb_window": window})
    assert all(fusion.in_window(t) for t in inside)
    assert not any(fusion.in_window(t) for t in out)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"prompts": []}, "prompt"),
        ({"prompts": ["a"], "width": 100}, "width"),
        ({"prompts": ["a"], "height": 8}, "height"),
        ({"prompts": ["a"], "steps": 0}, "steps"),
        ({"prompts": ["a"], "seed": -1}, "seed"),
        ({"prompts": ["a"], "sampler": "LMS"}, "sampler"),
    ],
)
def test_generation_errors_name_the_field(values, named):
    with pytest.raises(SettingError, match=named):
        GenerationSettings.from_dict(values)
