"""Takes pictures of all that the extension shows: ``python -m tests.webui_live.screenshots FOLDER``.

Every tab of the panel, the panel in img2img, the training tab, the settings page and the X/Y/Z plot, at each width, in
light and dark, in each language; and one sheet for each theme and language, which shows all of them side by side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tests.webui_live import pages, serve
from tests.webui_live.host import Host

WIDTHS = (390, 1280, 1920)
THEMES = ("light", "dark")
LANGUAGES = ("None", "zh_CN", "ja_JP")
#: Of the window: more than any part is high at any width.
HEIGHT = 3400
#: A sheet's width, and the most that a picture in it is high.
WIDE, CELL = 3000, 900
SETTLE = pages.SECONDS // 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=7870)
    parser.add_argument("--data", type=Path, default=Path("outputs/screenshots-data"), help="the WebUI's own")
    parser.add_argument("--fork", help="a fork instead of AUTOMATIC1111's WebUI")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--themes", nargs="+", default=THEMES, choices=THEMES)
    parser.add_argument("--languages", nargs="+", default=LANGUAGES, help="names of localisations; None is English")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=pages.find_chromium(), args=["--no-sandbox"])
        for language in args.languages:  # which the WebUI reads as it starts
            take_language(browser, language, args)
        browser.close()
    return 0


def take_language(browser: Any, language: str, args: argparse.Namespace) -> None:
    data = args.data.resolve()
    data.mkdir(parents=True, exist_ok=True)
    config = data / "config.json"
    known = json.loads(config.read_text("utf-8")) if config.exists() else {}
    config.write_text(json.dumps({"show_progress_type": "Approx cheap", **known, "localization": language}), "utf-8")
    if args.fork:
        host = serve.start_fork(args.fork, data, args.port, ())
    else:
        host = serve.start_a1111(data, None, args.port, ())
    try:
        for theme in args.themes:
            taken = list(take_pages(browser, host, args, theme, f"{language}-{theme}"))
            write_sheet(args.folder / f"sheet-{language}-{theme}.png", taken)
    finally:
        host.stop()


def take_pages(browser: Any, host: Host, args: argparse.Namespace, theme: str, name: str) -> Iterator[Path]:
    page = pages.open_page(browser, host, theme)
    try:
        pages.enable(page, "vehicles")
        page.evaluate("document.activeElement.blur()")  # which closes the list
        for part, element in parts_of(page):
            for width in args.widths:
                page.set_viewport_size({"width": width, "height": HEIGHT})
                page.wait_for_timeout(SETTLE)
                file = args.folder / f"{name}-{part}-{width}.png"
                page.locator(element).first.screenshot(path=file)
                yield file
    finally:
        pages.close_page(page)


def parts_of(page: Any) -> Iterator[tuple[str, str]]:
    """What is to be seen next: its name, and its element on the page."""
    panel = pages.PANEL.format(tab="txt2img")
    for i in (2, 3):
        page.locator(f"{panel}_expert{i} .label-wrap").first.dispatch_event("click")
    page.locator(f"{panel}_expert1_where .label-wrap").first.dispatch_event("click")
    page.locator(f"{panel}_expert1_place_left").dispatch_event("click")
    buttons = page.locator(f"{panel}_tabs > .tab-nav button")
    for i in range(buttons.count()):
        buttons.nth(i).dispatch_event("click")
        page.wait_for_timeout(SETTLE)
        show_more(page, panel)
        yield f"{i}", f"{panel}_enable"
    show_plot(page)
    yield "plot", "#script_txt2img_xyz_plot, #txt2img_script_container"
    page.evaluate("switch_to_img2img()")
    panel = pages.PANEL.format(tab="img2img")
    page.locator(f"{panel}_enable .label-wrap").first.click()
    page.locator(f"{panel}_expert1_where .label-wrap").first.click()
    yield "img2img", f"{panel}_enable"
    for name, element in (("settings", "#settings_denoiser_fusion"), ("training", "#tab_denoiser_fusion_training")):
        if open_tab(page, name):
            yield name, element


def show_more(page: Any, panel: str) -> None:
    """Makes the shown tab's choices those with the most controls."""
    if page.locator(f"{panel}_freeu").is_visible():
        pages.choose(page, f"{panel}_freeu", page.evaluate("(window.localization || {})['Custom'] || 'Custom'"))
        page.locator(f"{panel}_freeu_more .label-wrap").first.dispatch_event("click")
    if page.locator(f"{panel}_skipping").is_visible():
        page.locator(f"{panel}_skip_balanced").dispatch_event("click")
    page.wait_for_timeout(SETTLE)


def show_plot(page: Any) -> None:
    """The X/Y/Z plot with axes of ours."""
    word = page.evaluate("(window.localization || {})['X/Y/Z plot'] || 'X/Y/Z plot'")
    pages.choose(page, "#script_list", word)
    page.wait_for_timeout(SETTLE)
    for axis, label in (("x", "[Fusion] Preset"), ("y", "[Fusion] FreeU factors")):
        box = page.locator(f"[id$=xyz_plot_{axis}_type] input").first
        box.click()
        box.fill(label)
        page.locator(f"[id$=xyz_plot_{axis}_type] ul li", has_text=label).first.click()


def open_tab(page: Any, name: str) -> bool:
    """Opens one of the page's own tabs; False where the WebUI has none of ours in it."""
    if name == "settings":
        page.evaluate("[...document.querySelectorAll('#tabs > .tab-nav button')].find(b => document.querySelector("
                      "'#tab_settings') && b.id === '' && b.innerText === ((window.localization || {}).Settings || "
                      "'Settings'))?.click()")  # fmt: skip
        page.wait_for_timeout(SETTLE)
        page.evaluate("[...document.querySelectorAll('#settings > .tab-nav button')].find(b => b.innerText.trim() === "
                      "((window.localization || {})['Denoiser Fusion'] || 'Denoiser Fusion'))?.click()")  # fmt: skip
        page.wait_for_timeout(SETTLE)
        return bool(page.locator("#settings_denoiser_fusion").is_visible())
    page.evaluate("[...document.querySelectorAll('#tabs > .tab-nav button')].find(b => b.innerText.trim() === "
                  "((window.localization || {})['Fusion training'] || 'Fusion training'))?.click()")  # fmt: skip
    page.wait_for_timeout(4 * SETTLE)
    return bool(page.locator("#tab_denoiser_fusion_training").is_visible())


def write_sheet(file: Path, taken: list[Path]) -> None:
    """All pictures in one, each with its name."""
    pictures = [Image.open(one).convert("RGB") for one in taken]
    cells = [picture.resize((max(1, round(picture.width * CELL / picture.height)), CELL)) if picture.height > CELL
             else picture for picture in pictures]  # fmt: skip
    sheet = Image.new("RGB", (WIDE, (CELL + 24) * len(cells)), "#888888")
    draw = ImageDraw.Draw(sheet)
    left = top = 0
    for cell, name in zip(cells, taken):
        if left and left + cell.width > WIDE:
            left, top = 0, top + CELL + 24
        sheet.paste(cell, (left, top + 20))
        draw.text((left + 2, top + 4), name.stem, fill="white")
        left += max(cell.width, 130) + 8
    sheet.crop((0, 0, WIDE, top + CELL + 24)).save(file)


if __name__ == "__main__":
    raise SystemExit(main())
