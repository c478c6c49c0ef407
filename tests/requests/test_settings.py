"""The table of parameters follows from the settings' fields; every row reads what it shows and refuses the rest."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.requests import request
from lib_fusion.requests.parameters import Parameter, row, rows_of
from lib_fusion.requests.settings import (
    AFA_PARAMETERS,
    EXPERT_PARAMETERS,
    FREEU_CUSTOM,
    FREEU_PARAMETERS,
    GENERATION_PARAMETERS,
    PARAMETERS,
    SKIP_PARAMETERS,
    ExpertSettings,
    FusionSettings,
    GenerationSettings,
)
from lib_fusion.training.options import CACHE_PARAMETERS, TRAINING_PARAMETERS, CacheSettings, TrainingSettings

#: Settings classes, their tables, and their fields that are no rows.
TABLES = [
    (ExpertSettings, EXPERT_PARAMETERS, {"mask"}),
    (FusionSettings, PARAMETERS, {"experts", "previews"}),
    (GenerationSettings, GENERATION_PARAMETERS, {"prompts"}),
    (CacheSettings, CACHE_PARAMETERS, set()),
    (TrainingSettings, TRAINING_PARAMETERS, set()),
]
ALL = [row for _, rows, _ in TABLES for row in rows]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(("settings_class", "rows", "others"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_tables_are_the_fields(settings_class, rows, others):
    own = [field for field in fields(settings_class) if field.name not in others]
    assert [row.key for row in rows] == [field.name for field in own]
    defaults = {row.key: row.default for row in rows if row.key != "checkpoint"}
    assert {field.name: field.default for field in own if field.name != "checkpoint"} == defaults


def test_an_expert_has_a_checkpoint():
    assert next(field.default for field in fields(ExpertSettings) if field.name == "checkpoint") is MISSING
    with pytest.raises(TypeError, match="checkpoint"):
        ExpertSettings()
    assert vars(ExpertSettings("a", "b", "c", "base", True)) == {
        "checkpoint": "a", "prompt": "b", "negative_prompt": "c", "text_encoder": "base", "loras": True,
        "weight": 1.0, "window": (1000.0, 0.0), "place": "auto", "mask": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("refiner", "bool"),
        ("skip_max", "int"),
        ("snb_hold", "float"),
        ("method", "choice"),
        ("afa_aggregator", "text"),
        ("snb_window", "window"),
    ],
)
def test_kinds_follow_from_annotations(key, kind):
    assert next(row.kind for row in PARAMETERS if row.key == key) == kind


def test_a_row_of_no_kind_is_refused():
    @dataclass(frozen=True)
    class Numbers:
        many: tuple[int, ...] = row((1, 2), "many", "")

    with pytest.raises(TypeError, match="many"):
        rows_of(Numbers)

    @dataclass(frozen=True)
    class Chosen:
        number: int = row(1, "number", "", choices=("1", "2"))

    with pytest.raises(TypeError, match="number"):
        rows_of(Chosen)


def test_groups_are_whole():
    assert [row.key for row in FREEU_PARAMETERS[6:]] == [row.key for row in FREEU_CUSTOM]
    assert [row.key for row in FREEU_CUSTOM] == [
        f"freeu_{factor}{stage}" for stage in (1, 2, 3) for factor in ("b", "s", "offset", "width", "high", "cutoff")
    ]
    grouped = FREEU_PARAMETERS + SKIP_PARAMETERS + AFA_PARAMETERS
    assert PARAMETERS[-len(grouped) :] == grouped


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


@pytest.mark.parametrize("value", [[True, False], [900, False], [900], [900, 500, 100], "900", "9:5:1", 900, None])
def test_a_window_is_two_numbers(value):
    with pytest.raises(SettingError, match=r"snb_window: .*START:END"):
        FusionSettings.from_dict({"snb_window": value})


def test_a_choice_is_named_by_a_text_or_a_whole_number():
    chosen = Parameter("a", "choice", "2", "a", "", choices=("2", "None", "True", "1.0"))
    assert [chosen.read(value) for value in (2, " none ", "TRUE", "1.0")] == ["2", "None", "True", "1.0"]
    for value in (None, True, 1.0, ["2"]):
        with pytest.raises(SettingError, match=r"^a: .*allowed: 2, None, True, 1\.0"):
            chosen.read(value)


def test_multiples_are_refused_and_told_of():
    even = Parameter("a", "int", 2, "a", "", low=2, high=8, multiple_of=2)
    assert even.allowed == "allowed: a whole number divisible by 2 at least 2 and at most 8"
    assert even.read("4") == 4
    with pytest.raises(SettingError, match=r"^a: 3 is not allowed"):
        even.read(3)
    free = Parameter("a", "int", 2, "a", "")
    assert free.allowed == "allowed: a whole number"
    assert free.read(3) == 3


def test_the_names_of_freeus_factors():
    """Infotexts of pictures that are already made go by them."""
    assert [row.name for row in FREEU_CUSTOM] == [
        f"FreeU {factor}{stage}"
        for stage in (1, 2, 3) for factor in ("b", "s", "offset ", "width ", "high ", "cutoff ")
    ]  # fmt: skip


@pytest.mark.parametrize(("method", "own"), [("AFA", {"weight": 0.5}), ("AFA", {"window": [900, 0]}),
                                             ("AFA", {"place": "rows 1:1 1"}), ("Average", {"place": "rows 1:1 1"}),
                                             ("Average", {"place": "mask", "mask": "YQ=="})])  # fmt: skip
def test_rows_that_a_method_can_not_honour(method: str, own: dict) -> None:
    """Refused by name; but panels hide them and plots over methods leave them out of their cells."""
    values = {"experts": [{"checkpoint": "a", **own}]}
    (key,) = [key for key in own if key != "mask"]
    assert FusionSettings.from_dict({**values, "method": "SNB"}).experts[0].place == own.get("place", "auto")
    with pytest.raises(SettingError, match=rf"experts\[0\].{key}: .* is not allowed; allowed with method {method}"):
        FusionSettings.from_dict({**values, "method": method})
    for cell in (method, method.lower()):
        plotted = request.read_args([{**values, "method": "SNB"}], {"method": cell})
        assert plotted.experts[0] == ExpertSettings("a")
    drawn = request.read_args([{**values, "method": "SNB"}], {"method": "SNB"})
    assert drawn.experts[0].mask == own.get("mask", "")
    assert values["experts"][0] == {"checkpoint": "a", **own}
