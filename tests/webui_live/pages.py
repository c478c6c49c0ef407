"""The page of a running WebUI in Chromium: opened, driven, and closed."""

from __future__ import annotations

import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.webui_live.host import Host

SECONDS = 1000
PANEL = "#script_{tab}_denoiser_fusion"
#: How many pictures the gallery shows.
SHOWN = "new Set([...document.querySelectorAll('#txt2img_gallery img')].map(image => image.src)).size"


def find_chromium() -> str | None:
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no chromium on this machine; install it, or set CHROMIUM to its path")
    api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, host: Host) -> Iterator[Any]:
    page = open_page(browser, host, "light")
    yield page
    close_page(page)


def close_page(page: Any) -> None:
    """Closes a page once the host has answered it.

    Gradio (3.41) waits for ever for a queued event whose page has gone, and *Reload UI* with it.
    """
    wait_for_answers(page)
    page.close()


def wait_for_answers(page: Any) -> None:
    """Until the host has answered all that the page has put into its queue: each has a web socket."""
    deadline = time.monotonic() + 240
    while page.open_sockets and time.monotonic() < deadline:
        page.wait_for_timeout(SECONDS // 10)


def open_page(browser: Any, host: Host, theme: str) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 1180})
    page.open_sockets = sockets = set()

    def on_socket(socket: Any) -> None:
        sockets.add(socket)
        socket.on("close", lambda _: sockets.discard(socket))

    page.on("websocket", on_socket)
    page.set_default_timeout(240 * SECONDS)
    asked = watch_requests(page)
    page.goto(f"{host.url}/?__theme={theme}")
    page.wait_for_selector("#txt2img_generate")
    if page.evaluate("gradio_config.version").startswith("4"):
        wait_for_first_values(page, asked)
    return page


def save_small(page: Any, path: Path) -> None:
    """A screenshot in 256 colours, which is half of the bytes."""
    taken = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    colours = taken.quantize(256, kmeans=4)
    taken.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def watch_requests(page: Any) -> set[Any]:
    """The page's calls of Python functions past the queue that are not answered yet."""
    asked: set[Any] = set()
    page.on("request", lambda request: asked.add(request) if "/run/" in request.url else None)
    for end in ("requestfinished", "requestfailed"):
        page.on(end, lambda request: asked.discard(request))
    return asked


def wait_for_first_values(page: Any, asked: set[Any]) -> None:
    """Until nothing has been asked for a second: a fork's page gets its steps, size and more after it has opened."""
    deadline, quiet = time.monotonic() + 60, 0
    while quiet < SECONDS and time.monotonic() < deadline:
        page.wait_for_timeout(SECONDS // 10)
        page.evaluate("() => new Promise(done => requestIdleCallback(() => done()))")  # it may be behind with its work
        quiet = 0 if asked else quiet + SECONDS // 10


def set_number(page: Any, element: str, value: int) -> None:
    box = page.locator(f"{element} input[type=number]").first
    box.fill(str(value))
    box.dispatch_event("change")


def choose(page: Any, element: str, option: str | re.Pattern) -> None:
    page.locator(f"{element} input").first.click()
    page.locator(f"{element} ul li", has_text=option).first.click()


def enable(page: Any, name: str, tab: str = "txt2img") -> None:
    """Opens the panel, which switches it on, and chooses an expert: all that a first user has to do."""
    panel = PANEL.format(tab=tab)
    page.locator(f"{panel}_enable .label-wrap").first.click()
    page.locator(f"{panel}_expert1_checkpoint").wait_for(state="visible")
    choose(page, f"{panel}_expert1_checkpoint", f"{name}.safetensors")


def prepare(page: Any, prompt: str = "a fox, flat drawing", steps: int = 4, width: int = 128) -> None:
    page.locator("#txt2img_prompt textarea").fill(prompt)
    set_number(page, "#txt2img_steps", steps)
    set_number(page, "#txt2img_width", width)
    set_number(page, "#txt2img_height", 128)
    page.locator("#txt2img_seed input").fill("1")


def generate(page: Any, tab: str = "txt2img") -> str:
    """Presses the button; returns the text under the gallery once it has a picture's infotext, or an error."""
    info, log = page.locator(f"#html_info_{tab}").first, page.locator(f"#html_log_{tab}").first
    before = info.inner_text()
    page.locator(f"#{tab}_generate").click()
    page.wait_for_function(
        "([tab, before]) => {"
        " const info = document.querySelector(`#html_info_${tab}`).innerText;"
        " const log = document.querySelector(`#html_log_${tab}`).innerText;"
        " return (info.includes('Steps:') && info !== before) || log.includes('Error'); }",
        arg=[tab, before], timeout=480 * SECONDS,
    )  # fmt: skip
    return info.inner_text() + log.inner_text()


def wait_for_text(page: Any, element: str, text: str) -> None:
    page.wait_for_function(
        "([element, text]) => document.querySelector(element)?.innerText.includes(text)", arg=[element, text]
    )


def open_tab(page: Any, name: str) -> None:
    page.locator(f"{PANEL.format(tab='txt2img')}_tabs button", has_text=name).first.click()


def press_radio(page: Any, element: str, option: str) -> None:
    page.locator(f"{element} label", has_text=option).first.click()
