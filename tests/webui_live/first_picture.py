"""Clicks and seconds from the open page to the first good fused picture: ``python -m tests.webui_live.first_picture``.

``--fork neo`` does it in Forge Neo. It starts the WebUI as ``serve`` does, with the demo's checkpoints, sizes and
prompt, and then does what the README's "Your first fused picture" says, in Chromium. Good: both objects are sharp, as
``make demo`` counts it.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from lib_fusion.engine.demo_sheet import FOLDER, Result, Score
from tests.webui_live.pages import PANEL, SECONDS, close_page, open_page, set_number
from tests.webui_live.serve import FIRST, start_a1111, start_fork

#: The picture in the gallery, which is no live preview, as base64 of its file; nothing before it is there.
READ = """async () => {
    const image = [...document.querySelectorAll('#txt2img_gallery img')].find(image => !image.closest('.livePreview'));
    if (!image) return null;
    const blob = await (await fetch(image.src)).blob();
    return await new Promise(done => { const reader = new FileReader();
        reader.onload = () => done(reader.result.split(',')[1]); reader.readAsDataURL(blob); }); }"""


class Clicks:
    """Counts what a person presses."""

    def __init__(self, page: Any) -> None:
        self.page, self.pressed = page, []  # type: ignore[var-annotated]

    def __call__(self, what: str, element: Any) -> None:
        element.click()
        self.pressed.append(what)


def write_prompt(page: Any) -> None:
    """What the demo's models draw well; forks have sizes of their own, which go before ``ui-config.json``."""
    page.locator("#txt2img_prompt textarea").first.fill(FIRST["txt2img/Prompt/value"])
    for control in ("Width", "Height", "CFG Scale"):
        set_number(page, f"#txt2img_{control.lower().replace(' ', '_')}", FIRST[f"txt2img/{control}/value"])


def draw_first(page: Any) -> tuple[list[str], float, Image.Image]:
    """The presses, the seconds from the first of them to the picture, and the picture."""
    panel = PANEL.format(tab="txt2img")
    press, began = Clicks(page), time.monotonic()
    press("open the panel", page.locator(f"{panel}_enable .label-wrap").first)
    expert = page.locator(f"{panel}_expert1_checkpoint")
    expert.wait_for(state="visible")
    press("list of Expert 1", expert.locator("input").first)
    press("the second checkpoint", expert.locator("ul li", has_text="vehicles.safetensors").first)
    press("Generate", page.locator("#txt2img_generate"))
    drawn = "document.querySelector('#html_info_txt2img').innerText.includes('Fusion U-Net calls')"
    page.wait_for_function(drawn, timeout=480 * SECONDS)
    while (file := page.evaluate(READ)) is None:
        page.wait_for_timeout(SECONDS // 10)
    seconds = time.monotonic() - began
    return press.pressed, seconds, Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fork", choices=["neo", "forge"], help="a fork instead of AUTOMATIC1111's WebUI")
    parser.add_argument("--save", type=Path, help="where the picture goes")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    args = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        host = start_fork(args.fork, data, args.port, ()) if args.fork else start_a1111(data, None, args.port, ())
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = open_page(browser, host, "light")
                write_prompt(page)
                pressed, seconds, picture = draw_first(page)
                close_page(page)
        finally:
            host.stop()
    if args.save:
        picture.save(args.save)
    result = Result()
    Score(FOLDER / "images").add(result, FIRST["txt2img/Prompt/value"], picture, {"seconds": seconds, "unet_rows": []})
    good = "both objects are sharp" if result.sharp else "not both objects are sharp"
    print(f"{len(pressed)} clicks ({', '.join(pressed)}), {seconds:.0f} s: {good}")


if __name__ == "__main__":
    main()
