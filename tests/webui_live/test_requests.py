"""What is refused, and that panel, API and infotext say the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lib_fusion.requests.presets import SHIPPED
from tests.webui_live.client import PICTURE, TITLE, Client, RefusedError, decode, expert
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host

WRONG = {
    "experts[0].checkpoint": [expert("nothing"), expert("/etc/passwd"), expert(""), expert("tiny_xl"), expert("tiny"),
                              expert("tiny_inpaint")],
    "experts[0].promt": [{"experts": [{"checkpoint": "tiny_b", "promt": "x"}]}],
    "experts[0].text_encoder": [expert("tiny_b", text_encoder="mine")],
    "experts[0].prompt": [expert("tiny_b", prompt="a cat <lora:x:1>"), expert("tiny_b", prompt="a cat AND a dog")],
    "experts[1]": [{"experts": [{"checkpoint": "tiny_b"}, "tiny_b"]}],
    "experts": [{}, {"experts": []}, {"experts": {}}, {"experts": [{"checkpoint": "tiny_b"}] * 4}],
    "k_expert": [expert("tiny_b", k_expert=-1), expert("tiny_b", k_expert="many"), expert("tiny_b", k_expert=None)],
    "snb_window": [expert("tiny_b", snb_window=[0, 1000]), expert("tiny_b", snb_window=7)],
    "method": [expert("tiny_b", method="Mask"), expert("tiny_b", method="AFAX")],
    "passes": [expert("tiny_b", passes="hires")],
    "enabled": [expert("tiny_b", enabled="perhaps")],
    "k_generall": [expert("tiny_b", k_generall=1)],
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_wrong_requests_are_refused_by_name(client: Client, field: str) -> None:
    for fusion in WRONG[field]:
        with pytest.raises(RefusedError) as caught:
            client.draw(fusion, model="tiny_a")
        assert caught.value.status == 422, fusion
        told = caught.value.answer["detail"]
        assert told.startswith(f"{field}:"), (fusion, told)
        assert "\n" not in told


def test_text_encoder_that_is_not_there(client: Client) -> None:
    with pytest.raises(RefusedError, match=r"experts\[0\].text_encoder.*tiny_unet.*allowed: base"):
        client.draw(expert("tiny_unet"), model="tiny_a")
    assert client.draw(expert("tiny_unet", text_encoder="base"), model="tiny_a").pixels


def test_more_than_one_object_is_refused(client: Client) -> None:
    for more in ([expert("tiny_c")], [True, expert("tiny_c")]):
        with pytest.raises(RefusedError, match=r"422: args: .*; allowed: one object of settings"):
            client.draw(args=[expert("tiny_b"), *more], model="tiny_a")


def test_another_unet_engine_is_refused(client: Client, names: Names) -> None:
    with client.settings({"sd_unet": "[probe] engine"}):
        engine = client.draw()
        with pytest.raises(RefusedError, match=r"^422: SD Unet: '\[probe\] engine' is not allowed"):
            client.draw(expert(names.expert))
        assert client.draw().same_as(engine)
    assert not client.draw().same_as(engine)


def test_off_is_off(client: Client, names: Names) -> None:
    off = client.draw()
    assert client.draw(expert(names.expert, enabled=False)).same_as(off)
    assert not any(key.startswith("Fusion") for key in off.params)


def test_schema_lists_every_key(client: Client) -> None:
    schema = client.ask("/denoiser-fusion/schema")
    assert schema["additionalProperties"] is False
    assert {"experts", "enabled", "method", "snb_window", "k_expert", "passes"} <= set(schema["properties"])
    assert "Mask" not in schema["properties"]["method"]["enum"]


def panel_args(client: Client, **values: object) -> list:
    """The panel's values in its order, as script-info tells it; ``values`` by label."""
    scripts = client.ask("/sdapi/v1/script-info")
    script = next(entry for entry in scripts if entry["name"] == TITLE.lower() and not entry["is_img2img"])
    labels = [arg["label"] for arg in script["args"]]
    assert set(values) <= set(labels), labels
    return [values.get(arg["label"], arg["value"]) for arg in script["args"]]


def test_presets_and_aggregators_are_listed_and_may_be_named(client: Client, names: Names, host: Host) -> None:
    """What a program needs to know the names of; a broken aggregator is listed with what is wrong."""
    presets = client.ask("/denoiser-fusion/presets")
    assert list(presets) == list(SHIPPED)
    folder = host.data / "models/denoiser-fusion"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.safetensors").write_bytes(b"none")
    try:
        broken = [entry for entry in client.ask("/denoiser-fusion/aggregators") if entry["name"] == "broken"]
    finally:
        (folder / "broken.safetensors").unlink()
    assert "broken.safetensors" in broken[0]["error"]
    own = {"experts": [{"checkpoint": f"{names.expert}.safetensors"}], "k_expert": 2}
    paper = "As published (MagicFusion): a mask at every step"
    by_preset = client.draw({"preset": paper, **own})
    assert by_preset.same_as(client.draw({**presets[paper], **own}))
    with pytest.raises(RefusedError, match="preset: 'none such' is not allowed; allowed: Objects of two"):
        client.draw({"preset": "none such", **own})
    document = client.ask("/openapi.json")["paths"]["/denoiser-fusion/schema"]["get"]
    example = document["responses"]["200"]["content"]["application/json"]["example"]
    assert example == client.ask("/denoiser-fusion/schema")


def test_panel_dict_and_infotext_agree(client: Client, names: Names) -> None:
    prompt = 'a "cat", in: 64x64\nhats'
    fusion = expert(names.expert, prompt=prompt, text_encoder="base", snb_window=[900, 100], k_expert=2.5,
                    snb_hold=700, snb_saliency="code")  # fmt: skip
    by_dict = client.draw(fusion)
    by_panel = client.draw(args=panel_args(client, **{
        TITLE: True, "Expert 1 checkpoint": f"{names.expert}.safetensors", "Expert 1 prompt": prompt,
        "Expert 1 text encoder": "base", "Starting timestep": 900, "Ending timestep": 100, "Guidance interval": "off",
        "Expert mask sharpness": 2.5, "Mask decided until timestep": 700, "Mask decided by": "code",
        "Mask used from timestep": 1000,
    }))  # fmt: skip
    assert by_panel.same_as(by_dict)
    text = by_dict.infotexts[0]
    answer = client.ask("/sdapi/v1/txt2img", {"infotext": text, "width": 128, "height": 128})
    info = json.loads(answer["info"])
    assert without_seconds(info["infotexts"][0]) == without_seconds(text)
    assert without_seconds(by_panel.infotexts[0]) == without_seconds(text)
    assert np.array_equal(decode(answer["images"][0]), by_dict.pixels[0])


def test_the_panels_defaults_are_the_apis(client: Client, names: Names) -> None:
    by_dict = client.draw({"experts": [{"checkpoint": f"{names.expert}.safetensors"}]})
    by_panel = client.draw(args=panel_args(client, **{
        TITLE: True, "Expert 1 checkpoint": f"{names.expert}.safetensors"}))  # fmt: skip
    assert by_panel.same_as(by_dict)
    assert without_seconds(by_panel.infotexts[0]) == without_seconds(by_dict.infotexts[0])
    rule = {key: by_dict.params[f"Fusion {key}"] for key in ("mask hold", "mask from", "guidance interval")}
    assert rule == {"mask hold": "900", "mask from": "300", "guidance interval": "with experts"}
    answer = client.ask("/sdapi/v1/txt2img", {"infotext": by_dict.infotexts[0], "width": 128, "height": 128})
    assert np.array_equal(decode(answer["images"][0]), by_dict.pixels[0])


def without_seconds(text: str) -> str:
    return ", ".join(part for part in text.split(", ") if not part.startswith("Fusion seconds"))


def test_infotext_of_a_plain_picture_switches_off(client: Client) -> None:
    plain = client.draw()
    answer = client.ask("/sdapi/v1/txt2img", {**PICTURE, "infotext": plain.infotexts[0]})
    assert "Fusion" not in json.loads(answer["info"])["infotexts"][0]


def test_defaults_are_not_written(client: Client, names: Names) -> None:
    params = client.draw(expert(names.expert)).params
    mine = {key for key in params if key.startswith("Fusion")}
    assert mine == {"Fusion expert 1 checkpoint", "Fusion expert 1 hash", "Fusion method",
                    "Fusion U-Net calls", "Fusion seconds", "Fusion version"}
