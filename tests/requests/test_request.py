"""Settings read from panel values, dicts and infotext, without a host."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib_fusion.errors import SettingError
from lib_fusion.requests import infotext, request
from lib_fusion.requests.presets import PAPER, Presets
from lib_fusion.requests.refusals import in_panels_words
from lib_fusion.requests.settings import EXPERT_PARAMETERS, PARAMETERS, FusionSettings

FULL = {
    "experts": [
        {"checkpoint": "b.safetensors", "prompt": "a cat", "negative_prompt": "x", "text_encoder": "base",
         "loras": True},
        {"checkpoint": "c.safetensors"},
    ],
    "method": "SNB", "snb_window": [900.0, 100.0], "snb_outside": "expert", "k_general": 2.0, "k_expert": 3.5,
    "snb_saliency": "code", "snb_hold": 700.0, "passes": "first",
}  # fmt: skip


def to_panel(values: dict) -> list:
    return [True, *request.dict_to_panel(values)]


def test_panel_opens_off() -> None:
    assert request.read_args(request.default_values()) is None
    assert request.read_args([]) is None
    assert request.read_args([None] * 5) is None


def test_dict_and_panel_are_read_alike() -> None:
    by_dict = request.read_args([FULL])
    assert by_dict == FusionSettings.from_dict(FULL)
    assert request.read_args(to_panel(FULL)) == by_dict
    assert request.read_args([FULL, *request.default_values()[1:]]) == by_dict


def test_an_object_may_name_a_preset() -> None:
    """Its own keys go before the preset's; a preset that is not there is refused; the panel names none."""
    get = Presets(Path("nowhere")).get
    asked = {"preset": "MagicFusion (paper): a mask at every step", "k_expert": 2, "experts": [{"checkpoint": "a"}]}
    expected = FusionSettings.from_dict({**PAPER, "k_expert": 2, "experts": [{"checkpoint": "a"}]})
    assert request.read_args([asked], preset=get) == expected
    with pytest.raises(SettingError, match="preset: 'none such' is not allowed; allowed: Objects of two"):
        request.read_args([{**asked, "preset": "none such"}], preset=get)
    assert request.write_schema()["properties"]["preset"]["type"] == "string"


def test_every_row_has_a_control_and_a_schema_entry() -> None:
    elements = [field.element for field in infotext.list_fields()]
    assert len(elements) == len(set(elements))
    labels = [label for field in infotext.list_fields() for label in field.labels]
    assert len(labels) == len(set(labels))
    axes = [field.label for field in infotext.list_fields()]
    assert len(axes) == len(set(axes))
    properties = request.write_schema()["properties"]
    rows = {row.key for row in PARAMETERS if "panel" in row.where}
    assert set(properties) == {"preset", "experts", "previews", "enabled", "compare"} | rows
    assert set(properties["experts"]["items"]["properties"]) == {row.key for row in EXPERT_PARAMETERS} | {"mask"}


@pytest.mark.parametrize(
    ("values", "field"),
    [({}, "experts"), ({"experts": [{"checkpoint": "None"}]}, "experts[0].checkpoint"), ({"x": 1}, "x"),
     ({"experts": [{"checkpoint": "b"}], "method": "Mask"}, "method"), ({"enabled": 3}, "enabled"),
     ({"experts": [{"checkpoint": "b"}] * 4}, "experts")],
)  # fmt: skip
def test_refused(values: dict, field: str) -> None:
    with pytest.raises(SettingError) as caught:
        request.read_args([values])
    assert caught.value.field == field


def test_previews_of_a_request() -> None:
    """The panel and the API's object name them; without them they are those of the WebUI's settings."""
    panel = panel_with(**EXPERT)
    for shown, expected in ((None, None), ([], ()), (["masks", "skips"], ("masks", "skips"))):
        read = request.read_args([*panel[:-1], shown])
        assert read is not None
        assert read.previews == expected
        assert "previews" not in read.to_dict()
    read = request.read_args([{"freeu": "Auto", "previews": ["maps"]}])
    assert read is not None
    assert read.previews == ("maps",)
    for wrong in ("masks", ["mask"], 1, [["masks"]]):
        with pytest.raises(SettingError, match=r"previews: .* is not allowed; allowed: a list of masks, skips"):
            request.read_args([{"freeu": "Auto", "previews": wrong}])


def test_off_is_still_checked() -> None:
    assert request.read_args([{"enabled": False}]) is None
    with pytest.raises(SettingError):
        request.read_args([{"enabled": False, "k_expert": "x"}])


def panel_with(**changes: object) -> list[object]:
    """The panel's values, on, with others for some of its elements."""
    values = request.default_values()
    values[0], place = True, 1
    for field in infotext.list_fields():
        if field.element in changes:
            change = changes[field.element]
            values[place : place + field.width] = list(change) if field.width == 2 else [change]
        place += field.width
    return values


#: A value that is not allowed, and the panel's choices with which it has no part, and with which it has.
EXPERT = {"expert1_checkpoint": "b"}
HIDDEN = [
    ("k_general", -5, {"freeu": "Auto"}, EXPERT),
    ("k_general", -5, {**EXPERT, "method": "Average"}, EXPERT),
    ("snb_window", (300, 700), {"skipping": "Forecast"}, EXPERT),
    ("snb_window", (300, 700), {"skipping": "Forecast"}, {"method": "AFA", "afa_aggregator": "x"}),
    ("skip_tolerance", 99, EXPERT, {"skipping": "Forecast"}),
    ("skip_warmup", 1, {"skipping": "Paper"}, {"skipping": "Forecast"}),
    ("freeu_start", -1, EXPERT, {"freeu": "Auto"}),
    ("freeu_width1", 7, {"freeu": "Auto"}, {"freeu": "Custom"}),
    ("guidance_until", 5000, {**EXPERT, "guidance": "off"}, EXPERT),
    ("place_feather", -1, EXPERT, {**EXPERT, "expert1_place": "rows 1:1 1"}),
    ("expert2_window", (0, 1000), EXPERT, {**EXPERT, "expert2_checkpoint": "c"}),
]


@pytest.mark.parametrize(("element", "value", "without", "used"), HIDDEN)
def test_what_is_hidden_or_off_refuses_no_picture(element: str, value: object, without: dict, used: dict) -> None:
    """Used, it is refused by the control's own name."""
    assert request.read_args(panel_with(**without, **{element: value})) == request.read_args(panel_with(**without))
    off = panel_with(**used, **{element: value})
    off[0] = False
    assert request.read_args(off) is None
    with pytest.raises(SettingError) as caught:
        request.read_args(panel_with(**used, **{element: value}))
    labels = next(field.labels for field in infotext.list_fields() if field.element == element)
    assert in_panels_words(caught.value).startswith(f"Denoiser Fusion, {' or '.join(labels)}: ")


def test_a_plot_switches_on_what_the_panel_hides() -> None:
    values = panel_with(skip_tolerance=99, **EXPERT)
    with pytest.raises(SettingError, match="skip_tolerance"):
        request.read_args(values, {"skipping": "Forecast"})


def test_an_empty_panel_says_what_to_do() -> None:
    with pytest.raises(SettingError) as caught:
        request.read_args(panel_with())
    assert "choose a checkpoint under Expert 1" in in_panels_words(caught.value)


def parse_as_host(entries: dict[str, str]) -> dict[str, str]:
    """The host's writing and reading of infotext entries (modules/infotext_utils.py), in short."""
    texts = {k: json.dumps(v, ensure_ascii=False) if any(m in v for m in ",\n:") else v for k, v in entries.items()}
    line = ", ".join(f"{key}: {text}" for key, text in texts.items())
    result = {}
    for key, text in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line):
        value = json.loads(text) if text[:1] == '"' and text[-1:] == '"' else text
        size = re.match(r"^(\d+)x(\d+)$", value)
        result.update({f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: value})
    return result


def read_back(entries: dict) -> dict:
    values: dict = {"experts": [{}, {}, {}]}
    for field in infotext.list_fields():
        target = values if field.expert is None else values["experts"][field.expert]
        target[field.row.key] = infotext.read_infotext(entries, field)
    values["experts"] = [e for e in values["experts"] if e["checkpoint"] not in infotext.NO_CHECKPOINT]
    return values


def test_infotext_round_trip() -> None:
    settings = FusionSettings.from_dict(FULL)
    entries = infotext.write_infotext(settings, ["b.safetensors", "c.safetensors"])
    assert all(re.fullmatch(r"\w[\w \-/]+", key) for key in entries)
    assert set(entries) <= set(infotext.infotext_keys())
    assert FusionSettings.from_dict(read_back(parse_as_host(entries))) == settings


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=20))
def test_any_prompt_survives_infotext(prompt: str) -> None:
    settings = FusionSettings.from_dict({"experts": [{"checkpoint": "b", "prompt": prompt}]})
    entries = infotext.write_infotext(settings, ["b"])
    if any(mark in prompt for mark in "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"):
        return  # the host parses line by line
    read = read_back(parse_as_host(entries))
    assert read["experts"][0]["prompt"] == prompt


#: The entries' keys; pictures that are already made go by them, whatever the controls are called.
KEYS = """method, window, outside, k general, k expert, saliency, mask hold, mask from, place strength, place feather,
guidance interval, guidance until, guidance after, passes, experts on refiner, FreeU, FreeU version, FreeU models,
FreeU start, FreeU stop, FreeU smooth, FreeU b1, FreeU s1, FreeU offset 1, FreeU width 1, FreeU high 1, FreeU cutoff 1,
FreeU b2, FreeU s2, FreeU offset 2, FreeU width 2, FreeU high 2, FreeU cutoff 2, FreeU b3, FreeU s3, FreeU offset 3,
FreeU width 3, FreeU high 3, FreeU cutoff 3, skipping, skip tolerance, skip threshold, skips in a row, skip warm-up,
skip correction, skip passes, aggregator, AFA maps, force aggregator"""
EXPERT_KEYS = "checkpoint, prompt, negative prompt, text encoder, LoRAs, weight, window, place"


def test_infotexts_keys_stay() -> None:
    expected = {f"Fusion {key}" for key in KEYS.replace("\n", " ").split(", ")}
    expected |= {f"Fusion expert {i} {key}" for i in (1, 2, 3) for key in EXPERT_KEYS.split(", ")}
    assert expected <= {field.infotext for field in infotext.list_fields()}


def test_plain_infotext_says_nothing() -> None:
    assert all(infotext.read_infotext({"Steps": "4"}, field) is None for field in infotext.list_fields())
    assert not infotext.is_fused({"Steps": "4"})


def test_axes_of_a_plot() -> None:
    both = request.put_axes({"enabled": False}, {"expert2_checkpoint": "c", "k_expert": "3", "snb_window": "900:100"})
    assert FusionSettings.from_dict({k: v for k, v in both.items() if k != "enabled"}) == FusionSettings.from_dict(
        {"experts": [{"checkpoint": "c"}], "k_expert": 3, "snb_window": [900, 100]}
    )
    assert request.read_args([False], {"expert1_checkpoint": "None"}) is None
    assert request.read_args([FULL], {"expert1_checkpoint": "None"}).experts[0].checkpoint == "c.safetensors"


FREEU = {"freeu": "Custom", "freeu_version": "1", "freeu_models": "experts", "freeu_b1": 1.3, "freeu_s3": 0.25,
         "freeu_start": 0.25, "freeu_stop": 12.0, "freeu_smooth": 1.0, "freeu_cutoff2": 0.5}  # fmt: skip


def test_freeu_needs_no_expert() -> None:
    settings = request.read_args([FREEU])
    assert settings == FusionSettings.from_dict(FREEU)
    assert request.read_args(to_panel(FREEU)) == settings
    entries = infotext.write_infotext(settings, [])
    assert "Fusion method" not in entries
    assert len(entries) == len(FREEU)
    assert infotext.is_fused(entries)
    assert FusionSettings.from_dict(read_back(parse_as_host(entries))) == settings


def test_freeus_own_factors_count_where_they_are_chosen() -> None:
    assert request.read_args(to_panel(FREEU | {"freeu": "Auto"})).freeu_b1 == 1  # the panel hides them
    with pytest.raises(SettingError, match=r"freeu_b1: 1.3 is not allowed; allowed with freeu Auto: 1"):
        request.read_args([FREEU | {"freeu": "Auto"}])


def test_a_plot_over_freeu_switches_off_where_nothing_is_left() -> None:
    assert request.read_args([False], {"freeu": "off"}) is None
    assert request.read_args([False], {"freeu": "SDXL"}).freeu == "SDXL"
    assert request.read_args([FULL], {"freeu": "Off"}) == FusionSettings.from_dict(FULL)
    assert request.read_args([FREEU], {"expert1_checkpoint": "None"}) == FusionSettings.from_dict(FREEU)


def adopted(**entries: str) -> dict:
    read = infotext.adopt_freeu(entries)
    fields = [field for field in infotext.list_fields() if field.expert is None]
    values = {field.row.key: infotext.read_infotext(read, field) for field in fields}
    return {k: v for k, v in values.items() if v != getattr(FusionSettings(), k)}


def test_the_other_extensions_infotext() -> None:
    stages = '[{"backbone_factor": 1.2, "skip_factor": 0.9, "skip_high_end_factor": 1.1}, {"backbone_offset": 0.5}]'
    values = {"freeu": "Custom", "freeu_version": "1", "freeu_b1": 1.2, "freeu_s1": 0.9, "freeu_high1": 1.1,
              "freeu_offset2": 0.5}  # fmt: skip
    entries = {"Steps": "20", "FreeU Stages": stages, "FreeU Version": "1"}
    assert adopted(**entries, **{"FreeU Schedule": "0.0, 1.0, 0.0"}) == values
    assert adopted(**entries) == values
    version = entries | {"FreeU Version": "2", "FreeU Schedule": "0.1, 0.75, 0.5"}
    assert adopted(**version) == {
        **{k: v for k, v in values.items() if k != "freeu_version"},
        "freeu_start": 0.1, "freeu_stop": 0.75, "freeu_smooth": 0.5,
    }  # fmt: skip
    steps = adopted(**entries, **{"FreeU Schedule": "1, 12, 0.0"})  # whole numbers are steps, also the first
    assert steps == values | {"freeu_start": 0.05, "freeu_stop": 12}


@pytest.mark.parametrize("stages", ["", "{}", "[1]", '[{"nothing": 1}]', "no JSON"])
def test_the_other_extensions_infotext_broken(stages: str) -> None:
    entries = {"FreeU Stages": stages, "FreeU Schedule": "0.0"}
    assert infotext.adopt_freeu(entries) is entries
    assert not infotext.is_fused(entries)


def test_a_plots_switch_and_the_ends_of_a_window() -> None:
    assert request.read_args([FULL], {"enabled": "False"}) is None
    assert request.read_args([FULL | {"enabled": False}], {"enabled": "True"}).k_expert == 3.5
    assert request.read_args([FULL], {"snb_window_start": 800.0}).snb_window == (800, 100)
    assert request.read_args([FULL], {"snb_window": "700:0", "snb_window_end": 50.0}).snb_window == (700, 50)
    with pytest.raises(SettingError, match=r"snb_window: .* START >= END"):
        request.read_args([FULL], {"snb_window_start": 50.0})


def test_a_plots_preset_comes_before_its_other_axes() -> None:
    preset = {"method": "Average", "snb_window": [900, 0], "snb_hold": 500.0}
    settings = request.read_args([FULL], {"preset": preset, "snb_hold": 300.0})
    assert (settings.method, settings.snb_window, settings.snb_hold) == ("Average", (900, 0), 300)
    assert settings.experts == FusionSettings.from_dict(FULL).experts  # it names none
    assert request.read_args([FULL], {"preset": {"experts": [{"checkpoint": "d"}]}}).experts[0].checkpoint == "d"


def test_a_plot_over_freeu_leaves_ones_own_factors_to_their_cells() -> None:
    values = FULL | FREEU
    assert request.read_args([values], {"freeu": "Custom"}).freeu_b1 == 1.3
    assert request.read_args([values], {"freeu": "Off"}).freeu_b1 == 1
    assert request.read_args([values], {"preset": {"freeu": "Auto"}}).freeu_b1 == 1
    with pytest.raises(SettingError, match=r"freeu_b1"):
        request.read_args([FULL], {"freeu_b1": 1.3})


@pytest.mark.parametrize("experts", ["animals", ["animals"], 5])
def test_a_plot_over_malformed_experts_is_refused(experts: object) -> None:
    with pytest.raises(SettingError, match=r"^experts"):
        request.read_args([{"experts": experts}], {"k_expert": "3"})


def test_an_object_wins_over_what_an_infotext_has_filled_in() -> None:
    """The host fills the arguments after the object where a request has an infotext, too."""
    filled = to_panel({**FULL, "method": "Average"})[1:]
    assert request.read_args([FULL, *filled]) == FusionSettings.from_dict(FULL)
    with pytest.raises(SettingError, match="one object of settings"):
        request.read_args([FULL, FULL])


def test_a_canvas_counts_where_the_place_is_a_painted_mask() -> None:
    values = FULL | {"experts": [{"checkpoint": "b", "place": " MASK "}, {"checkpoint": "c", "place": "inpaint"}]}
    panel = to_panel(values)
    painted = [False, "cGFpbnRlZA==", "b3RoZXI=", None]  # the comparison's switch, then a canvas for each expert
    experts = request.panel_to_dict([*panel, *painted])["experts"]
    assert [expert.get("mask") for expert in experts] == ["cGFpbnRlZA==", None]
    assert all("mask" not in expert for expert in request.panel_to_dict(panel)["experts"])


def test_what_is_painted_on_either_canvas_is_the_mask() -> None:
    """Gradio 3 gives white on black under the picture; Forge's canvas strokes of any colour on nothing."""
    expected = Image.new("L", (4, 2))
    expected.putpixel((1, 1), 255)
    black = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    black.putpixel((1, 1), (255, 255, 255, 255))
    strokes = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    strokes.putpixel((1, 1), (0, 0, 0, 255))
    for canvas in ({"image": Image.new("RGB", (4, 2), "red"), "mask": black}, strokes):
        found = Image.open(io.BytesIO(base64.b64decode(request.read_canvas(canvas))))
        assert found.tobytes() == expected.tobytes()
    for empty in ({"image": None, "mask": Image.new("RGBA", (4, 2), "black")}, Image.new("RGBA", (4, 2), (9, 9, 9, 0))):
        assert request.read_canvas(empty) == ""
    assert request.read_canvas(None) is None


def test_the_schema_of_each_kind_of_row() -> None:
    properties = request.write_schema()["properties"]
    told = {key: {k: v for k, v in properties[key].items() if k != "description"} for key in properties}
    assert told["skip_max"] == {"type": "integer", "default": 0, "minimum": 0, "maximum": 8}
    assert told["k_expert"] == {"type": "number", "default": 1.0, "minimum": 0, "maximum": 1000}
    assert told["passes"] == {"type": "string", "default": "both", "enum": ["both", "first", "hires"]}
    assert told["refiner"] == {"type": "boolean", "default": False}
    assert told["afa_aggregator"] == {"type": "string", "default": ""}
    number = {"type": "number", "minimum": 0, "maximum": 1000}
    assert told["snb_window"] == {
        "type": "array", "items": number, "minItems": 2, "maxItems": 2, "default": [1000.0, 0.0],
    }  # fmt: skip


def test_a_prompt_that_the_host_takes_for_a_size_is_put_together_again() -> None:
    settings = FusionSettings.from_dict({"experts": [{"checkpoint": "1x2", "prompt": "512x768"}]})
    entries = parse_as_host(infotext.write_infotext(settings, ["1x2"]))
    assert entries["Fusion expert 1 prompt-1"] == "512"
    assert FusionSettings.from_dict(read_back(entries)).experts == settings.experts


def read_own(entries: dict) -> dict:
    """The fusion's own rows in infotext, by key."""
    own = [field for field in infotext.list_fields() if field.expert is None]
    return {field.row.key: infotext.read_infotext(entries, field) for field in own}


@pytest.mark.parametrize(
    ("entries", "tolerance", "most"),
    [({"Fusion skipping": "Forecast"}, 0.15, 1), ({"Fusion skipping": "Paper"}, 0.1, 0),
     ({"Fusion skipping": "Forecast", "Fusion skip tolerance": "0.1", "Fusion skips in a row": "3"}, 0.1, 3)],
)  # fmt: skip
def test_skipping_in_earlier_infotext_is_read_by_its_former_defaults(
    entries: dict, tolerance: float, most: int
) -> None:
    read = read_own(entries)
    assert (read["skip_tolerance"], read["skip_max"]) == (tolerance, most)


@pytest.mark.parametrize("skipping", ["Forecast", "Paper"])
@pytest.mark.parametrize("most", [0, 1, 2])
@pytest.mark.parametrize("tolerance", [0.1, 0.15])
def test_skipping_in_infotext_says_what_its_absence_would_not(skipping: str, most: int, tolerance: float) -> None:
    settings = FusionSettings(skipping=skipping, skip_max=most, skip_tolerance=tolerance)
    entries = infotext.write_infotext(settings, [])
    read = read_own(entries)
    assert read["skip_max"] == most
    if skipping == "Forecast":
        assert read["skip_tolerance"] == tolerance
