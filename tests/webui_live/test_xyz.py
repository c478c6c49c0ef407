"""The X/Y/Z plot's cells are what single requests give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.webui_live.client import PICTURE, PLAIN, Client, RefusedError, decode, encode, expert
from tests.webui_live.conftest import Names
from tests.webui_live.host import REPOSITORY, Host
from tests.webui_live.test_requests import without_seconds

SCRIPT = "x/y/z plot"
#: A label, and its values as text, or as a list for what the plot's list of values offers.
Axis = tuple[str, "str | list[str]"]
NOTHING: Axis = ("Nothing", "")


def entries(text: str) -> list[str]:
    """An infotext's entries; a plot's come in another order than a single picture's where the host adds some late."""
    return sorted(without_seconds(text).split(", "))


def plot_inputs(client: Client, is_img2img: bool = False) -> list[dict]:
    scripts = client.ask("/sdapi/v1/script-info")
    return next(entry["args"] for entry in scripts if entry["name"] == SCRIPT and entry["is_img2img"] == is_img2img)


def axis_labels(client: Client, is_img2img: bool = False) -> list[str]:
    return plot_inputs(client, is_img2img)[0]["choices"]


def plot(
    client: Client, x: Axis, y: Axis = NOTHING, fusion: dict | None = None, **changes: object
) -> tuple[list, list]:
    """(pictures, infotexts) of a plot's cells, row by row. All axes are given as text, or all as lists."""
    labels = axis_labels(client)
    values: list = []
    for label, given in (x, y, NOTHING):
        values += [labels.index(label), *(("", given) if isinstance(given, list) else (given, []))]
    as_text = isinstance(x[1], str)
    margins = [0] * (len(plot_inputs(client)) - 17)  # a fork has a number of rows before the width of the margins
    body = {**PICTURE, **changes, "script_name": SCRIPT,
            "script_args": [*values, False, True, False, False, False, False, False, *margins, as_text]}  # fmt: skip
    if fusion is not None:
        body["alwayson_scripts"] = {"Denoiser Fusion": {"args": [fusion]}}
    answer = client.ask("/sdapi/v1/txt2img", body)
    texts = json.loads(answer["info"])["infotexts"]
    assert f"X Type: {x[0]}, X Values: " in texts[0]
    return [decode(picture) for picture in answer["images"]][1:], texts[1:]


def test_cells(client: Client, names: Names) -> None:
    pictures, texts = plot(
        client, ("[Fusion] Expert 1 checkpoint", f"None,{names.expert}.safetensors"),
        ("[Fusion] Expert mask sharpness", "1,40"), PLAIN,
    )
    off = client.draw()
    assert np.array_equal(pictures[0], off.pixels[0])
    assert np.array_equal(pictures[2], off.pixels[0])
    assert "Fusion" not in texts[0] + texts[2]
    for i, k in ((1, 1), (3, 40)):
        single = client.draw(expert(names.expert, k_expert=k))
        assert np.array_equal(pictures[i], single.pixels[0])
        assert entries(texts[i]) == entries(single.infotexts[0])


def test_windows_over_what_the_request_says(client: Client, names: Names) -> None:
    pictures, _ = plot(
        client, ("[Fusion] Timesteps", "1000:500,500:0"), ("[Fusion] Outside these timesteps", "base,expert"),
        expert(names.expert, k_expert=3),
    )
    for i, (window, outside) in enumerate([(w, o) for o in ("base", "expert") for w in ([1000, 500], [500, 0])]):
        single = client.draw(expert(names.expert, k_expert=3, snb_window=window, snb_outside=outside))
        assert np.array_equal(pictures[i], single.pixels[0])


def test_three_by_three(client: Client, names: Names) -> None:
    """Method x tolerance: each cell is the same settings alone, bit for bit, and its infotext makes it again."""
    methods, tolerances = ("SNB", "Average", "AFA"), (0, 0.15, 10)
    fusion = expert(names.expert, afa_maps="uniform", skipping="Forecast")
    pictures, texts = plot(
        client, ("[Fusion] Method", ",".join(methods)), ("[Fusion] Skip tolerance", "0, 0.15, 10"), fusion, steps=10
    )
    assert len(pictures) == 9
    assert len({picture.tobytes() for picture in pictures}) > 6
    for i, (tolerance, method) in enumerate([(t, m) for t in tolerances for m in methods]):
        single = client.draw({**fusion, "method": method, "skip_tolerance": tolerance}, steps=10)
        assert np.array_equal(pictures[i], single.pixels[0]), (method, tolerance)
        assert entries(texts[i]) == entries(single.infotexts[0])
        answer = client.ask("/sdapi/v1/txt2img", {"infotext": texts[i]})
        assert np.array_equal(decode(answer["images"][0]), pictures[i]), (method, tolerance)
        assert without_seconds(json.loads(answer["info"])["infotexts"][0]) == without_seconds(texts[i])


def test_the_switch_and_an_end_of_the_window_from_lists_and_ranges(client: Client, names: Names) -> None:
    pictures, texts = plot(client, ("[Fusion] Enabled", ["True", "False"]), fusion=expert(names.expert))
    assert np.array_equal(pictures[0], client.draw(expert(names.expert)).pixels[0])
    assert np.array_equal(pictures[1], client.draw().pixels[0])
    assert "Fusion" not in texts[1]
    pictures, _ = plot(client, ("[Fusion] Starting timestep", "600-1000 (+400)"), fusion=expert(names.expert))
    for picture, start in zip(pictures, (600, 1000), strict=True):
        single = client.draw(expert(names.expert, snb_window=[start, 0]))
        assert np.array_equal(picture, single.pixels[0])


def test_whole_presets(client: Client, host: Host, names: Names) -> None:
    own = {"experts": [{"checkpoint": names.other, "prompt": "a house"}], "snb_window": [900, 200], "skipping": "Off"}
    (host.data / "denoiser-fusion-presets.json").write_text(json.dumps({"my, own": own}), "utf-8")
    shipped = "As published: the lion (the base draws the detail)"
    fusion = expert(names.expert, freeu="Custom", freeu_b3=1.2, method="Average")
    values = ([shipped, "my, own"], f'"{shipped}", "my, own"')
    grids = [plot(client, ("[Fusion] Preset", given), fusion=fusion) for given in values]
    singles = [client.draw({**fusion, "method": "SNB", "snb_window": [1000, 600], "snb_saliency": "code"}),
               client.draw({**fusion, **own})]  # fmt: skip
    for pictures, texts in grids:
        for picture, text, single in zip(pictures, texts, singles, strict=True):
            assert np.array_equal(picture, single.pixels[0])
            assert entries(text) == entries(single.infotexts[0])
    (host.data / "denoiser-fusion-presets.json").unlink()


@pytest.fixture
def aggregators(host: Host) -> Iterator[list[str]]:
    folder = host.data / "models/denoiser-fusion"
    folder.mkdir(parents=True, exist_ok=True)
    names = ["afa-animals-vehicles", "afa-animals-vehicles-food"]
    for name in names:
        shutil.copy(REPOSITORY / "demo" / f"{name}.safetensors", folder)
    yield names
    shutil.rmtree(folder)


def test_aggregators_bring_their_method_and_experts(client: Client, names: Names, aggregators: list[str]) -> None:
    if names.base != "general":
        pytest.skip("without the demo's checkpoints")
    changes = {"prompt": "a fox left of a tractor, flat drawing", "override_settings": {
        "sd_model_checkpoint": "animals.safetensors"}}  # fmt: skip
    pictures, texts = plot(client, ("[Fusion] Aggregator", aggregators), fusion=expert(names.expert, k_expert=2),
                           **changes)  # fmt: skip
    for picture, text, name in zip(pictures, texts, aggregators, strict=True):
        single = client.draw({"method": "AFA", "afa_aggregator": name, "k_expert": 2, **PLAIN}, **changes)
        assert np.array_equal(picture, single.pixels[0])
        assert entries(text) == entries(single.infotexts[0])


def test_weights_places_and_the_guidance_interval(client: Client, names: Names) -> None:
    """As single requests; an axis of places takes the place of a painted mask."""
    mask = encode(Image.new("L", (64, 64), 255))
    fusion = {**PLAIN, "experts": [{"checkpoint": names.expert, "place": "mask", "mask": mask}]}
    weights, places = ("0.3", "1"), ("auto", "columns 1:1 2", "0,0,1,0.5")
    text = ",".join(f'"{place}"' for place in places)
    pictures, texts = plot(
        client, ("[Fusion] Expert 1 strength", ",".join(weights)), ("[Fusion] Expert 1 place", text), fusion
    )
    cells = [(place, float(weight)) for place in places for weight in weights]
    for picture, text, (place, weight) in zip(pictures, texts, cells, strict=True):
        single = client.draw(expert(names.expert, place=place, weight=weight))
        assert np.array_equal(picture, single.pixels[0]), (place, weight)
        assert entries(text) == entries(single.infotexts[0])
    pictures, texts = plot(
        client, ("[Fusion] Guidance interval", "with experts,off"), ("[Fusion] Lowered CFG scale", "1,3"), fusion
    )
    for i, (after, guidance) in enumerate([(a, g) for a in (1, 3) for g in ("with experts", "off")]):
        single = client.draw({**fusion, "guidance": guidance, "guidance_after": after})
        assert np.array_equal(pictures[i], single.pixels[0]), (guidance, after)
        assert entries(texts[i]) == entries(single.infotexts[0])


WRONG = [
    ("[Fusion] Preset", "mine", "preset: 'mine' is not allowed; allowed: "),
    ("[Fusion] Aggregator", "nothing", "afa_aggregator: 'nothing' is not allowed; no such aggregator"),
    ("[Fusion] Expert 1 checkpoint", "nothing", "Expert 1 checkpoint: 'nothing' is not allowed"),
    ("[Fusion] Method", "SNB,Mask it", "Method: 'Mask it' is not allowed"),
    ("[Fusion] Expert mask sharpness", "1,many", "Expert mask sharpness: 'many' is not allowed; allowed: a number"),
    ("[Fusion] Most skips in a row", "0-20", "Most skips in a row: 9 is not allowed"),
    ("[Fusion] Starting timestep", "900,1001", "Starting timestep: '1001' is not allowed"),
]


@pytest.mark.parametrize(("label", "values", "told"), WRONG, ids=[label for label, _, _ in WRONG])
def test_wrong_values_are_refused_before_the_grid(client: Client, host: Host, names: Names, label: str, values: str,
                                                  told: str) -> None:  # fmt: skip
    plots = host.log.count("X/Y/Z plot will create")
    with pytest.raises(RefusedError, match="500"):
        plot(client, (label, values), fusion=expert(names.expert))
    assert host.log.count("X/Y/Z plot will create") == plots
    assert told in host.log


def test_an_error_in_one_cell_leaves_the_others_right(client: Client, names: Names) -> None:
    client.draw(model=names.base)
    checkpoints = f"{names.expert}.safetensors,tiny_xl.safetensors,None"
    y = ("[Fusion] Expert mask sharpness", "1,3")
    pictures, texts = plot(client, ("[Fusion] Expert 1 checkpoint", checkpoints), y, PLAIN)
    off = client.draw()
    for row, k in enumerate((1, 3)):
        single = client.draw(expert(names.expert, k_expert=k))
        assert np.array_equal(pictures[3 * row], single.pixels[0])
        assert entries(texts[3 * row]) == entries(single.infotexts[0])
        assert not pictures[3 * row + 1].any()
        assert np.array_equal(pictures[3 * row + 2], off.pixels[0])
        assert "Fusion" not in texts[3 * row + 2]


def test_every_parameter_has_an_axis_once_and_in_order(client: Client) -> None:
    for is_img2img in (False, True):
        labels = [label for label in axis_labels(client, is_img2img) if label.startswith("[Fusion] ")]
        assert len(labels) == len(set(labels))
        assert labels[:3] == ["[Fusion] Enabled", "[Fusion] Preset", "[Fusion] Expert 1 checkpoint"]
        wanted = ["Method", "Aggregator", "Timesteps", "Starting timestep", "Ending timestep",
                  "Outside these timesteps", "Base mask sharpness", "Expert mask sharpness", "Mask decided by",
                  "Mask decided until timestep", "FreeU", "FreeU version", "FreeU factors", "Skipping",
                  "Skip threshold", "Skip tolerance", "Most skips in a row", "Passes", "Skip in passes"]  # fmt: skip
        assert {f"[Fusion] {label}" for label in wanted} <= set(labels)
