"""The gallery's button that upscales a finished picture: hires fix without a first pass."""

from __future__ import annotations

from typing import Any

from tests.webui_live.client import Client
from tests.webui_live.conftest import Names
from tests.webui_live.pages import enable, generate, prepare


def test_hires_fix_of_a_finished_picture_is_fused(page: Any, client: Client, names: Names) -> None:
    enable(page, names.expert)
    prepare(page)
    assert "Fusion U-Net calls" in generate(page)
    info = page.locator("#html_info_txt2img").first
    before = info.inner_text()
    page.locator("#txt2img_upscale").click()
    page.wait_for_function(
        "before => { const info = document.querySelector('#html_info_txt2img').innerText;"
        " const log = document.querySelector('#html_log_txt2img').innerText;"
        " return (info.includes('Steps:') && info !== before) || log.includes('Error'); }",
        arg=before, timeout=480_000,
    )  # fmt: skip
    text = info.inner_text() + page.locator("#html_log_txt2img").first.inner_text()
    assert "Error" not in text
    assert "Hires upscale" in text
    assert "Fusion expert 1 checkpoint" in text
    assert "Fusion U-Net calls" in text
