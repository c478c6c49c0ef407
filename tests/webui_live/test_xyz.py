"""The X/Y/Z plot's cells are what single requests give."""

from __future__ import annotations

import json

import numpy as np

from tests.webui_live.client import PICTURE, Client, decode, expert
from tests.webui_live.conftest import Names
from tests.webui_live.test_requests import without_seconds

SCRIPT = "x/y/z plot"


def plot(client: Client, x: tuple[str, str], y: tuple[str, str], fusion: dict | None = None) -> tuple[list, list]:
    """(pictures, infotexts) of a 2x2 plot's cells, row by row; an axis is (label, values)."""
    scripts = client.ask("/sdapi/v1/script-info")
    script = next(entry for entry in scripts if entry["name"] == SCRIPT and not entry["is_img2img"])
    labels = script["args"][0]["choices"]
    axes = []
    for label, values in (x, y, ("Nothing", "")):
        axes += [labels.index(label), values, []]
    body = {**PICTURE, "script_name": SCRIPT,
            "script_args": [*axes, False, True, False, False, False, False, False, 0, True]}  # fmt: skip
    if fusion is not None:
        body["alwayson_scripts"] = {"Denoiser Fusion": {"args": [fusion]}}
    answer = client.ask("/sdapi/v1/txt2img", body)
    texts = json.loads(answer["info"])["infotexts"]
    return [decode(picture) for picture in answer["images"]][-4:], texts[-4:]


def test_cells(client: Client, names: Names) -> None:
    pictures, texts = plot(
        client, ("[Fusion] Expert 1 checkpoint", f"None,{names.expert}.safetensors"), ("[Fusion] K expert", "1,40")
    )
    off = client.draw()
    assert np.array_equal(pictures[0], off.pixels[0])
    assert np.array_equal(pictures[2], off.pixels[0])
    assert "Fusion" not in texts[0] + texts[2]
    for i, k in ((1, 1), (3, 40)):
        single = client.draw(expert(names.expert, k_expert=k))
        assert np.array_equal(pictures[i], single.pixels[0])
        assert without_seconds(texts[i]) == without_seconds(single.infotexts[0])


def test_windows_over_what_the_request_says(client: Client, names: Names) -> None:
    pictures, _ = plot(
        client, ("[Fusion] Window", "1000:500,500:0"), ("[Fusion] Outside", "base,expert"),
        expert(names.expert, k_expert=3),
    )
    for i, (window, outside) in enumerate([(w, o) for o in ("base", "expert") for w in ([1000, 500], [500, 0])]):
        single = client.draw(expert(names.expert, k_expert=3, snb_window=window, snb_outside=outside))
        assert np.array_equal(pictures[i], single.pixels[0])
