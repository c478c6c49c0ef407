"""The panel as a person uses it, in Chromium."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.webui_live.client import PICTURE, Client
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host
from tests.webui_live.pages import (
    PANEL,
    SECONDS,
    SHOWN,
    choose,
    close_page,
    enable,
    generate,
    open_page,
    open_tab,
    prepare,
    press_radio,
    save_small,
    set_number,
    wait_for_answers,
    wait_for_text,
)
from tests.webui_live.test_lifecycle import reload_ui

FILL_X = "#xyz_grid_fill_x_tool_button"
#: What of the panel is wider than the page.
WIDER = """panel => [...document.querySelectorAll(`${panel}_enable *`)].filter(
    element => element.offsetParent && element.getBoundingClientRect().right > window.innerWidth).map(e => e.id)"""


def test_a_first_user(page: Any, client: Client, names: Names) -> None:
    client.draw(model=names.base)
    prepare(page)
    enable(page, names.expert)
    text = generate(page)
    assert f"Fusion expert 1 checkpoint: {names.expert}.safetensors" in text
    assert "Fusion method: SNB" in text
    assert page.locator("#txt2img_gallery img").count() > 0
    title = page.locator(f"{PANEL.format(tab='txt2img')}_enable .label-wrap").first
    wait_for_text(page, f"{PANEL.format(tab='txt2img')}_enable .denoiser-fusion-badge", f"SNB: {names.expert}")
    page.wait_for_function(
        "([panel, name]) => document.querySelector(`${panel}_memory`).innerText.startsWith(`Loaded: ${name} (`)",
        arg=[PANEL.format(tab="txt2img"), names.expert],
    )  # fmt: skip
    title.locator("input").click()
    page.wait_for_function(
        "panel => !document.querySelector(`${panel}_enable .denoiser-fusion-badge`).textContent",
        arg=PANEL.format(tab="txt2img"),
    )  # fmt: skip
    title.locator("input").click()
    page.locator("#txt2img_send_to_img2img").click()
    panel = PANEL.format(tab="img2img")
    page.locator(f"{panel}_expert1_checkpoint").wait_for(state="visible")
    assert page.locator(f"{panel}_expert1_checkpoint input").first.input_value() == f"{names.expert}.safetensors"
    assert "Fusion method: SNB" in generate(page, "img2img")


def test_nothing_chosen_is_told(page: Any, client: Client) -> None:
    prepare(page)
    page.locator(f"{PANEL.format(tab='txt2img')}_enable .label-wrap").first.click()
    text = generate(page)
    assert "Denoiser Fusion: choose a checkpoint under Expert 1, switch on FreeU" in text


def test_presets_and_memory(page: Any, client: Client, host: Host, names: Names) -> None:
    panel = PANEL.format(tab="txt2img")
    enable(page, names.expert)
    choose(page, f"{panel}_preset", "Sharper parts")  # acts at once
    page.wait_for_function(f"document.querySelector('{panel}_preset_told').innerText.startsWith('Applied')")
    page.locator(f"{panel}_tabs button", has_text="Blend").click()
    assert page.locator(f"{panel}_snb_hold input[type=number]").input_value() == "900"
    set_number(page, f"{panel}_snb_hold", 800)
    line = f"document.querySelector('{panel}_preset_told').innerText"
    name = "Sharper parts and harsher colours: mask used at once"
    page.wait_for_function(f"{line} == 'Changed since it was applied: {name}'")
    box = page.locator(f"{panel}_preset input").first
    box.fill("mine")
    box.press("Enter")
    page.locator(f"{panel}_preset_save").click()
    page.wait_for_function(f"document.querySelector('{panel}_preset_told').innerText == 'Saved: mine'")
    assert "mine" in (host.data / "denoiser-fusion-presets.json").read_text("utf-8")
    for button, symbol, doing, done in (("save", "💾", "replace", "Saved"), ("delete", "🗑️", "delete", "Deleted")):
        page.locator(f"{panel}_preset_{button}").focus()
        page.keyboard.press("Enter")
        page.wait_for_function(f"{line} == 'Press {symbol} again to {doing} the preset mine.'")
        assert "mine" in (host.data / "denoiser-fusion-presets.json").read_text("utf-8")
        page.keyboard.press("Enter")
        page.wait_for_function(f"{line} == '{done}: mine'")
    assert "mine" not in (host.data / "denoiser-fusion-presets.json").read_text("utf-8")
    page.locator(f"{panel}_free").click()
    page.wait_for_function(f"document.querySelector('{panel}_memory').innerText == 'No expert is loaded.'")


def test_what_is_typed_is_shown_as_text(page: Any, client: Client, host: Host) -> None:
    """A preset's name goes into the line under the list, whatever characters it has."""
    panel, name = PANEL.format(tab="txt2img"), "<b id=typed>mine</b> & <img src=x onerror=alert(1)>"
    page.locator(f"{panel}_enable .label-wrap").first.click()
    box = page.locator(f"{panel}_preset input").first
    box.fill(name)
    box.press("Enter")
    question = f"Press 🗑️ again to delete the preset {name}."
    for button, told in (
        ("apply", "preset: '<b id=typed>mine</b>"), ("save", f"Saved: {name}"), ("apply", f"Applied: {name}"),
        ("delete", question), ("delete", f"Deleted: {name}"),
    ):  # fmt: skip
        page.locator(f"{panel}_preset_{button}").click()
        wait_for_text(page, f"{panel}_preset_told", told)
    assert page.locator("#typed").count() == 0


def test_a_late_answer_to_a_new_name_keeps_the_line(page: Any, client: Client) -> None:
    """A typed name and a button's press are answered side by side, in any order."""
    panel, held = PANEL.format(tab="txt2img"), []

    def hold_the_first(route: Any) -> None:
        if held or (route.request.post_data_json or {}).get("data") != ["mine"]:
            route.continue_()
        else:
            held.append(route)

    page.route("**/run/predict*", hold_the_first)
    page.locator(f"{panel}_enable .label-wrap").first.click()
    box = page.locator(f"{panel}_preset input").first
    box.fill("mine")
    box.press("Enter")
    page.locator(f"{panel}_preset_apply").click()
    wait_for_text(page, f"{panel}_preset_told", "preset: 'mine'")
    with page.expect_response("**/run/predict*"):
        held[0].continue_()
    page.wait_for_timeout(SECONDS)
    assert "preset: 'mine'" in page.locator(f"{panel}_preset_told").first.inner_text()


def test_no_hint_of_the_hosts_covers_ours(page: Any, client: Client) -> None:
    """The host hints at what has a word of its own, such as None, Seed or Learning rate, wherever it stands."""
    page.locator("button", has_text="Fusion training").first.click()
    page.locator(f"{PANEL.format(tab='txt2img')}_enable .label-wrap").first.dispatch_event("click")
    page.wait_for_timeout(3 * SECONDS)
    foreign = """() => {
        const hints = new Set(Object.values(titles));
        const ours = [...document.querySelectorAll('[id*="denoiser_fusion"] *:not(button)')];
        return ours.filter(e => hints.has(e.title)).map(e => [e.innerText || e.value, e.title]);
    }"""
    assert page.evaluate(foreign) == []
    known = """() => [...document.querySelectorAll('[id*="denoiser_fusion"] :is(span, input)')].filter(
        e => (e.innerText || e.value) in titles && e.title).length"""
    assert page.evaluate(known) > 0  # or the test looks at nothing


def test_a_checkpoint_called_none(page: Any, client: Client, host: Host, names: Names) -> None:
    """It is an expert as any other: chosen from the list, written into the infotext, and pasted."""
    panel, file = PANEL.format(tab="txt2img"), host.data / "models/Stable-diffusion/None.safetensors"
    weights = host.data / "models/Stable-diffusion" / f"{names.expert}.safetensors"
    shutil.copy(weights, file)
    shutil.copy(weights.with_suffix(".yaml"), file.with_suffix(".yaml"))
    try:
        client.draw(model=names.base)
        page.locator(f"{panel}_enable .label-wrap").first.click()
        page.locator(f"{panel}_expert1_refresh").click()
        page.wait_for_timeout(SECONDS)
        prepare(page)
        choose(page, f"{panel}_expert1_checkpoint", "None.safetensors")
        wait_for_text(page, f"{panel}_enable .denoiser-fusion-badge", "SNB: None")
        text = generate(page)
        assert "Fusion expert 1 checkpoint: None.safetensors" in text
        page.reload()
        page.locator("#txt2img_prompt textarea").fill(text)
        page.locator("#paste").first.click()
        checkpoint = page.locator(f"{panel}_expert1_checkpoint input").first
        page.wait_for_function("e => e.value === 'None.safetensors'", arg=checkpoint.element_handle())
    finally:
        file.unlink()
        file.with_suffix(".yaml").unlink()


def test_amounts_of_skipping(page: Any, client: Client, names: Names) -> None:
    """Without any expert: one press, and the next picture is made with it."""
    client.draw(model=names.base)
    panel = PANEL.format(tab="txt2img")
    prepare(page, steps=16)
    page.locator(f"{panel}_enable .label-wrap").first.click()
    page.locator(f"{panel}_tabs button", has_text="Skipping").click()
    page.locator(f"{panel}_skip_balanced").click()
    page.wait_for_function(f"document.querySelector('{panel}_skip_max input[type=number]').value == '3'")
    assert page.locator(f"{panel}_skipping input:checked").input_value() == "Forecast"
    text = generate(page)
    assert "Fusion skipping: Forecast, Fusion skip tolerance: 0.1, Fusion skips in a row: 3" in text
    assert "Fusion U-Net rows: base" in text
    wait_for_text(page, f"{panel}_enable .denoiser-fusion-badge", "Skipping: Forecast")


def test_compare(page: Any, client: Client, names: Names) -> None:
    prepare(page)
    enable(page, names.expert)
    panel = PANEL.format(tab="txt2img")
    info = page.locator("#html_info_txt2img").first
    page.locator(f"{panel}_compare_button").click()
    page.wait_for_function(f"{SHOWN} == 2")
    page.wait_for_function("document.querySelector('#html_info_txt2img').innerText.includes('Fusion method: SNB')")
    before = info.inner_text()
    page.wait_for_function(f"!document.querySelector('{panel}_compare input').checked")  # for one press only
    page.locator("#txt2img_seed input").fill("2")
    generate(page)
    assert info.inner_text() != before
    page.wait_for_function(f"{SHOWN} == 1")


def test_three_by_three(page: Any, client: Client, names: Names) -> None:
    """A plot as a person sets it up, one axis filled from the list; each cell is what the API draws by itself."""
    client.draw(model=names.base)
    prepare(page, PICTURE["prompt"], steps=8)
    page.locator("#txt2img_neg_prompt textarea").fill(PICTURE["negative_prompt"])
    choose(page, "#txt2img_sampling", re.compile(r"Euler\s*$"))
    set_number(page, "#txt2img_cfg_scale", PICTURE["cfg_scale"])
    enable(page, names.expert)
    panel, plot = PANEL.format(tab="txt2img"), "#script_txt2img_xyz_plot"
    open_tab(page, "AFA")
    choose(page, f"{panel}_afa_maps", "uniform")
    open_tab(page, "Skipping")
    press_radio(page, f"{panel}_skipping", "Forecast")
    page.locator(f"{panel}_skip_warmup input").fill("3")
    choose(page, "#txt2img_script_container #script_list", "X/Y/Z plot")
    page.locator(f"{plot}_x_type").wait_for(state="visible")
    choose(page, f"{plot}_x_type", "[Fusion] Method")
    page.locator(f"#txt2img_script_container {FILL_X}").click()
    page.locator("#txt2img_script_container .token:has-text('AFA')").wait_for()
    choose(page, f"{plot}_y_type", "[Fusion] Skip tolerance")
    page.wait_for_timeout(3 * SECONDS)  # a chosen axis empties its values when the host answers
    page.locator(f"{plot}_y_values textarea").fill("0, 0.15, 10")
    page.wait_for_timeout(SECONDS)
    assert page.locator(f"{plot}_y_values textarea").input_value() == "0, 0.15, 10"
    page.locator(f"{plot}_include_lone_images input").check()
    generate(page)
    page.wait_for_function(f"{SHOWN} == 10")
    sources = page.evaluate("[...new Set([...document.querySelectorAll('#txt2img_gallery img')].map(i => i.src))]")
    images = [Image.open(io.BytesIO(page.request.get(source).body())) for source in sources[-9:]]
    experts = [{"checkpoint": names.expert}]
    fusion = {"experts": experts, "afa_maps": "uniform", "skipping": "Forecast", "skip_warmup": 3}
    cells = [(tolerance, method) for tolerance in (0, 0.15, 10) for method in ("SNB", "Average", "AFA")]
    for image, (tolerance, method) in zip(images, cells, strict=True):
        single = client.draw({**fusion, "method": method, "skip_tolerance": tolerance}, steps=8)
        assert np.array_equal(np.asarray(image.convert("RGB")), single.pixels[0]), (method, tolerance)
        assert f"Fusion method: {method}" in image.info["parameters"]


#: What the page shows of a control: with these choices, these and not those.
CHOICES = [
    ("Blend", "method", "Average", ["snb_window_start", "snb_outside"], ["snb_saliency", "k_general", "snb_hold"]),
    ("Blend", "method", "SNB", ["snb_saliency", "k_general", "k_expert", "snb_hold"], []),
    ("AFA", "", "", ["afa_aggregator", "afa_unused"], []),
    ("Blend", "method", "AFA", ["snb_window_end"], ["k_expert"]),
    ("AFA", "", "", ["afa_aggregator", "afa_maps", "afa_force"], ["afa_unused"]),
    ("FreeU", "", "", ["freeu"], ["freeu_version", "freeu_custom", "freeu_start", "freeu_models"]),
    ("FreeU", "freeu", "SD1.5", ["freeu_version", "freeu_start", "freeu_models"], ["freeu_custom"]),
    ("FreeU", "freeu", "Custom", ["freeu_b1", "freeu_custom"], []),
    ("Skipping", "", "", ["skipping", "skip_faithful"], ["skip_tolerance", "skip_threshold", "skip_max"]),
    ("Skipping", "skipping", "Forecast", ["skip_tolerance", "skip_max", "skip_warmup"], ["skip_threshold"]),
    ("Skipping", "skipping", "Paper", ["skip_threshold", "skip_max"], ["skip_tolerance", "skip_warmup"]),
]  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_only_what_is_of_use_is_shown(browser: Any, host: Host, client: Client, names: Names, theme: str) -> None:
    """By whatever way it was chosen, at 800 pixels, where nothing is wider than the page; values stay."""
    page = open_page(browser, host, theme)
    page.set_viewport_size({"width": 800, "height": 1180})
    panel = PANEL.format(tab="txt2img")
    enable(page, names.expert)
    open_tab(page, "Blend")
    page.locator(f"{panel}_snb_hold input[type=number]").fill("700")
    for tab, control, choice, shown, hidden in CHOICES:
        open_tab(page, tab)
        if control == "freeu":
            choose(page, f"{panel}_{control}", choice)
        elif control:
            press_radio(page, f"{panel}_{control}", choice)
        for name in shown:
            page.locator(f"{panel}_{name}").first.wait_for(state="visible")
        for name in hidden:
            page.locator(f"{panel}_{name}").first.wait_for(state="hidden")
        assert page.evaluate(WIDER, panel) == []
    assert page.locator(f"{panel}_snb_hold input[type=number]").input_value() == "700"
    choose(page, f"{panel}_preset", "Sharper parts")
    page.locator(f"{panel}_preset_apply").click()
    open_tab(page, "Blend")
    page.locator(f"{panel}_snb_hold").wait_for(state="visible")
    close_page(page)


def test_defaults_of_ones_own_are_shown_too(browser: Any, client: Client, host: Host) -> None:
    """The host's ui-config.json knows nothing of what the page hides, and the panel may begin with other choices."""
    file = host.data / "ui-config.json"
    before = file.read_text("utf-8")
    values = json.loads(before)
    ours = {key: value for key, value in values.items() if key.startswith("customscript/denoiser_fusion.py/")}
    assert all(value is True for key, value in ours.items() if key.endswith("/visible"))
    changed = {f"customscript/denoiser_fusion.py/txt2img/{name}/value": choice
               for name, choice in (("FreeU", "Custom"), ("Method", "Average"))}  # fmt: skip
    assert set(changed) <= set(ours)
    file.write_text(json.dumps({**values, **changed}), "utf-8")
    try:
        reload_ui(client, host)
        page = open_page(browser, host, "light")
        panel = PANEL.format(tab="txt2img")
        page.locator(f"{panel}_enable .label-wrap").first.click()
        open_tab(page, "FreeU")
        page.locator(f"{panel}_freeu_b3").wait_for(state="visible")
        open_tab(page, "Blend")
        page.locator(f"{panel}_snb_window_start").wait_for(state="visible")
        page.locator(f"{panel}_snb_hold").wait_for(state="hidden")
        close_page(page)
    finally:
        file.write_text(before, "utf-8")
        reload_ui(client, host)


def test_by_keyboard(page: Any, client: Client, names: Names) -> None:
    """Tab reaches the folds, which open by key, and hidden controls are passed over."""
    enable(page, names.expert)
    panel = PANEL.format(tab="txt2img")
    fold = page.locator(f"{panel}_expert2 .label-wrap").first
    fold.focus()
    page.keyboard.press("Enter")
    page.locator(f"{panel}_expert2_prompt textarea").wait_for(state="visible")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('[id$=expert2_checkpoint]') !== null")
    open_tab(page, "Blend")
    press_radio(page, f"{panel}_method", "Average")
    page.locator(f"{panel}_snb_hold").wait_for(state="hidden")
    page.locator(f"{panel}_snb_outside input:checked").focus()
    page.keyboard.press("Tab")  # over all of the mask's
    assert page.evaluate("document.activeElement.closest('[id$=denoiser_fusion_previews]') !== null")


def test_the_amount_of_skipping_that_is_on_is_marked(page: Any, client: Client) -> None:
    """Also where the values were set by hand; no amount is on in another policy. A preview ticked is shown."""
    panel = PANEL.format(tab="txt2img")
    all_marked = f"[...document.querySelectorAll('{panel}_tabs .denoiser-fusion-on')]"
    marked = f"{all_marked}.map(e => e.id.split('_').pop()).join()"
    prepare(page)
    page.locator(f"{panel}_enable .label-wrap").first.click()
    open_tab(page, "Skipping")
    assert page.evaluate(marked) == ""
    press_radio(page, f"{panel}_skipping", "Forecast")
    page.wait_for_function(f"{marked} == 'faithful'")
    page.locator(f"{panel}_skip_fast").click()
    page.wait_for_function(f"{marked} == 'fast'")
    set_number(page, f"{panel}_skip_tolerance", 0.1)
    page.wait_for_function(f"{marked} == 'balanced'")
    set_number(page, f"{panel}_skip_max", 2)
    page.wait_for_function(f"{marked} == ''")
    page.locator(f"{panel}_previews label", has_text="skipped steps").click()
    assert "Fusion skips in a row: 2" in generate(page)
    page.wait_for_function(f"{SHOWN} == 2")
    press_radio(page, f"{panel}_skipping", "Paper")
    page.locator(f"{panel}_skip_threshold").wait_for(state="visible")
    assert page.evaluate(marked) == ""


def test_reload(page: Any, client: Client, host: Host, names: Names) -> None:
    wait_for_answers(page)
    page.route("**/internal/ping", lambda route: route.abort())  # which the page sends to a starting host
    page.evaluate("document.querySelector('#settings_restart_gradio').click()")
    host.wait()
    page.unroute("**/internal/ping")
    page.wait_for_selector("#txt2img_generate")
    prepare(page)
    enable(page, names.expert)
    assert "Fusion method: SNB" in generate(page)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshots(browser: Any, client: Client, host: Host, names: Names, theme: str) -> None:
    """Writes docs/webui-*.png where SCREENSHOTS is set; elsewhere it shows that the panel opens in both themes."""
    with client.settings({"sd_model_checkpoint": f"{names.expert}.safetensors"}):
        take_screenshot(browser, host, names, theme)


def take_screenshot(browser: Any, host: Host, names: Names, theme: str, name: str = "") -> None:
    page = open_page(browser, host, theme)
    prepare(page, "a fox left of a tractor, flat drawing", 30, width=256)
    set_number(page, "#txt2img_cfg_scale", 4)
    enable(page, names.other)
    panel = PANEL.format(tab="txt2img")
    page.wait_for_timeout(SECONDS)
    generate(page)
    page.locator("#txt2img_generate").get_by_text("Generate").wait_for(state="visible")
    page.wait_for_timeout(SECONDS)
    if theme == "light":
        page.locator(f"{panel}_expert1_where .label-wrap").first.click()
        page.locator(f"{panel}_expert1_place_painted").click()
        page.locator(f"{panel}_expert1_canvas_use").click()
        paint(page, panel, left=0.53, width=0.42, strokes=25)
        generate(page)
        page.wait_for_timeout(SECONDS)
    else:
        open_tab(page, "Blend")
    shoot(page, host, name or theme)
    close_page(page)


#: Whether a canvas has its picture: in Forge's, that is an image under it; an empty one of A1111's is 300 wide.
LOADED = """element => {
    const canvas = document.querySelector(element), image = canvas.querySelector('[id^=image_]');
    return image ? image.offsetWidth > 0 : canvas.querySelector('canvas').width != 300;
}"""


def shoot(page: Any, host: Host, name: str) -> None:
    page.locator(f"{PANEL.format(tab='txt2img')}_enable").scroll_into_view_if_needed()
    folder = Path(__file__).parents[2] / "docs" if os.environ.get("SCREENSHOTS") else host.data
    folder.mkdir(exist_ok=True)
    save_small(page, folder / f"webui-{name}.png")


def test_in_chinese(browser: Any, client: Client, host: Host, names: Names) -> None:
    with client.settings({"localization": "zh_CN"}):
        reload_ui(client, host)
        page = open_page(browser, host, "light")
        prepare(page)
        enable(page, names.expert)
        panel = PANEL.format(tab="txt2img")
        page.locator(f"{panel}_tabs button", has_text="混合方式").click()
        wait_for_text(page, f"{panel}_snb_hold", "掩码")
        wait_for_text(page, f"{panel}_enable .denoiser-fusion-badge", f"SNB: {names.expert}")
        shoot(page, host, "zh")
        press_radio(page, f"{panel}_method", "平均")
        page.locator(f"{panel}_snb_hold").wait_for(state="hidden")
        close_page(page)
    reload_ui(client, host)


def shown_picture(page: Any) -> np.ndarray:
    """The pixels of the picture that the gallery shows."""
    page.wait_for_function(f"{SHOWN} == 1")
    source = page.locator("#txt2img_gallery img").first.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def place_of(page: Any, panel: str) -> str:
    return page.locator(f"{panel}_expert1_place").locator("textarea, input").first.input_value()


def paint(page: Any, panel: str, left: float = 0.7, width: float = 0.2, strokes: int = 9) -> None:
    """A zigzag down the right side of the first expert's canvas, by mouse; the more strokes the fuller."""
    canvas = page.locator(f"{panel}_expert1_canvas canvas").first
    canvas.wait_for(state="visible")
    page.wait_for_function(LOADED, arg=f"{panel}_expert1_canvas")
    page.locator(f"{panel}_expert1_canvas").scroll_into_view_if_needed()
    page.wait_for_timeout(SECONDS)
    box = canvas.bounding_box()
    for i in range(strokes):
        page.mouse.move(box["x"] + box["width"] * (left + width * (i % 2)),
                        box["y"] + box["height"] * (0.1 + 0.8 * i / (strokes - 1)), steps=4)  # fmt: skip
        if i == 0:
            page.mouse.down()
    page.mouse.up()
    page.wait_for_timeout(SECONDS)


@pytest.mark.parametrize("has_picture", [False, True])
def test_paint_a_place(browser: Any, client: Client, host: Host, names: Names, has_picture: bool) -> None:
    """Painted by mouse on the gallery's picture, or on a grey one. The API makes the same picture with the mask that
    was kept, and so does the infotext pasted into an empty panel."""
    paint_a_place(browser, client, host, names, has_picture)


def paint_a_place(
    browser: Any, client: Client, host: Host, names: Names, has_picture: bool, pastes_prompts: bool = True
) -> None:
    """``pastes_prompts``: whether the host's page does; else the prompt is written by hand."""
    client.draw(model=names.base)
    panel = PANEL.format(tab="txt2img")
    page = open_page(browser, host, "light")
    prepare(page, steps=6, width=192)
    enable(page, names.expert)
    if has_picture:
        generate(page)
    page.locator(f"{panel}_expert1_where .label-wrap").first.click()
    page.locator(f"{panel}_place_feather").wait_for(state="hidden")
    page.locator(f"{panel}_expert1_place_painted").click()
    page.locator(f"{panel}_expert1_canvas_use").click()
    paint(page, panel)
    assert place_of(page, panel) == "mask"
    page.locator(f"{panel}_place_feather").wait_for(state="visible")
    text = generate(page)
    (name,) = re.findall(r"Fusion expert 1 place: mask (\w{12})", text)
    drawn = shown_picture(page)
    close_page(page)

    file = host.data / "denoiser-fusion-masks" / f"{name}.png"
    mask = np.asarray(Image.open(file))
    assert mask.shape == (128, 192)
    assert 0.02 < (mask > 127).mean() < 0.5  # by the hosts' own widths of brushes
    assert not (mask > 127)[:, :96].any()
    sampler, scheduler, guidance = (re.findall(f"{key}: ([^,]+)", text)[0]
                                    for key in ("Sampler", "Schedule type", "CFG scale"))  # fmt: skip
    changes = {"prompt": "a fox, flat drawing", "negative_prompt": "", "steps": 6, "width": 192,
               "cfg_scale": float(guidance), "sampler_name": sampler, "scheduler": scheduler}  # fmt: skip
    painted = {"checkpoint": names.expert, "place": "mask", "mask": base64.b64encode(file.read_bytes()).decode()}
    for one in (painted, {"checkpoint": names.expert, "place": f"mask {name}"}):
        assert np.array_equal(client.draw({"experts": [one]}, **changes).pixels[0], drawn)
    assert not np.array_equal(client.draw({"experts": [{"checkpoint": names.expert}]}, **changes).pixels[0], drawn)

    page = open_page(browser, host, "light")
    page.locator("#txt2img_prompt textarea").fill(text[: text.index("Time taken")])
    page.locator("#txt2img_tools #paste").click()
    page.locator(f"{panel}_expert1_checkpoint").wait_for(state="visible")
    if pastes_prompts:
        page.wait_for_function("document.querySelector('#txt2img_prompt textarea').value == 'a fox, flat drawing'")
    else:
        page.locator("#txt2img_prompt textarea").fill("a fox, flat drawing")
    assert place_of(page, panel) == f"mask {name}"
    again = generate(page)
    assert re.sub("Fusion seconds.*", "", again) == re.sub("Fusion seconds.*", "", text)
    assert np.array_equal(shown_picture(page), drawn)
    close_page(page)


def test_buttons_of_places(page: Any, client: Client, names: Names) -> None:
    """Each writes its place. A canvas without paint is told; Clear lets saliency decide again."""
    panel = PANEL.format(tab="txt2img")
    prepare(page)
    enable(page, names.expert)
    page.locator(f"{panel}_expert1_where .label-wrap").first.click()
    for button, place in (("left", "columns 1:1 1"), ("right", "columns 1:1 2"), ("top", "rows 1:1 1"),
                          ("bottom", "rows 1:1 2"), ("auto", "auto"), ("painted", "mask")):  # fmt: skip
        page.locator(f"{panel}_expert1_place_{button}").click()
        page.wait_for_function(
            "([element, value]) => document.querySelector(`${element} textarea, ${element} input`).value == value",
            arg=[f"{panel}_expert1_place", place],
        )
    assert page.locator(f"{panel}_expert1_place_inpaint").count() == 0
    assert page.locator(f"{PANEL.format(tab='img2img')}_expert1_place_inpaint").count() == 1
    page.locator(f"{panel}_expert1_canvas_use").click()
    page.locator(f"{panel}_expert1_canvas canvas").first.wait_for(state="visible")
    assert "Expert 1 mask: '' is not allowed; allowed with place mask: paint on expert 1's canvas" in generate(page)
    paint(page, panel)
    page.locator(f"{panel}_expert1_canvas_clear").click()
    canvases = f"[...document.querySelectorAll('{panel}_expert1_canvas canvas')]"
    page.wait_for_function(f"{canvases}.every(canvas => canvas.width == 1)")  # in A1111's there is none any more
    assert place_of(page, panel) == "auto"
    assert "Fusion expert 1 place" not in generate(page)
    page.set_viewport_size({"width": 390, "height": 1180})
    for tab in ("Experts", "Blend", "Guidance"):
        open_tab(page, tab)
        page.wait_for_timeout(SECONDS)
        assert page.evaluate(WIDER, panel) == []
    press_radio(page, f"{panel}_guidance", "off")
    page.locator(f"{panel}_guidance_after").wait_for(state="hidden")
    press_radio(page, f"{panel}_guidance", "always")
    page.locator(f"{panel}_guidance_after").wait_for(state="visible")


def test_two_lora_experts_are_told_of_divergence(page: Any, client: Client, names: Names) -> None:
    """Only where both have LoRAs and the base has none; the button chooses it, and then there is nothing to tell."""
    panel = PANEL.format(tab="txt2img")
    prepare(page)
    page.locator(f"{panel}_enable .label-wrap").first.click()
    choose(page, f"{panel}_expert1_checkpoint", "same as base")
    hint = page.locator(f"{panel}_loras_hint")
    page.locator(f"{panel}_expert1_prompt textarea").fill("<lora:tiny_lora:1>")
    page.locator(f"{panel}_expert2 .label-wrap").first.click()
    choose(page, f"{panel}_expert2_checkpoint", "same as base")
    hint.wait_for(state="hidden")
    page.locator(f"{panel}_expert2_prompt textarea").fill("a dog <lora:lora_lora:0.5>")
    hint.wait_for(state="visible")
    page.locator("#txt2img_prompt textarea").fill("a cat <lora:lora_loha:1>")
    hint.wait_for(state="hidden")
    page.locator("#txt2img_prompt textarea").fill("a cat")
    hint.wait_for(state="visible")
    page.locator(f"{panel}_loras_divergence").click()
    hint.wait_for(state="hidden")
    assert page.locator(f"{panel}_snb_saliency input:checked").input_value() == "divergence"


def test_a_loras_card_goes_to_the_prompt_that_was_written_in_last(page: Any, client: Client, names: Names) -> None:
    """An expert without a checkpoint becomes the base with that LoRA; a second click takes it out, as in the host."""
    client.draw(model=names.base)
    panel = PANEL.format(tab="txt2img")
    page.locator(f"{panel}_enable .label-wrap").first.click()
    own, picture = page.locator(f"{panel}_expert1_prompt textarea"), page.locator("#txt2img_prompt textarea")
    own.wait_for(state="visible")

    def click_card() -> None:
        page.locator("#txt2img_extra_tabs > .tab-nav button", has_text="Lora").first.click()
        page.locator('#txt2img_lora_cards .card[data-name="tiny_lora"]').first.click()
        page.locator("#txt2img_extra_tabs > .tab-nav button", has_text="Generation").first.click()

    picture.fill("a cat")
    click_card()
    assert picture.input_value() == "a cat <lora:tiny_lora:1>"
    click_card()
    assert picture.input_value().strip() == "a cat"
    own.fill("a dog")
    click_card()
    assert own.input_value() == "a dog <lora:tiny_lora:1>"
    assert picture.input_value().strip() == "a cat"
    checkpoint = page.locator(f"{panel}_expert1_checkpoint input").first
    page.wait_for_function("e => e.value === 'same as base'", arg=checkpoint.element_handle())
    wait_for_text(page, f"{panel}_enable .denoiser-fusion-badge", "SNB: base + tiny_lora")
    click_card()
    assert own.input_value().strip() == "a dog"
    picture.click()
    click_card()
    assert picture.input_value() == "a cat <lora:tiny_lora:1>"
    assert own.input_value().strip() == "a dog"
