"""The panel under Gradio 4 as a person uses it, with Forge's own canvas: tests of AUTOMATIC1111's page, in forks.

All run in Forge Neo; Forge has the same Gradio and nearly the same page, and what is driven there is the way from an
empty panel over a painted mask to a pasted infotext.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.webui_forge.forks import Fork
from tests.webui_live import test_browser as of_a1111
from tests.webui_live.client import Client
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host
from tests.webui_live.pages import PANEL
from tests.webui_live.test_browser import (
    take_screenshot,
    test_a_first_user,
    test_amounts_of_skipping,
    test_buttons_of_places,
    test_compare,
    test_nothing_chosen_is_told,
    test_presets_and_memory,
    test_what_is_typed_is_shown_as_text,
)

#: In Forge the buttons, presets and lists are the same ones.
IN_NEO = {
    test_a_first_user, test_amounts_of_skipping, test_buttons_of_places, test_compare, test_nothing_chosen_is_told,
    test_presets_and_memory, test_what_is_typed_is_shown_as_text,
}  # fmt: skip


def test_paint_a_place(browser: Any, client: Client, host: Host, names: Names, fork: Fork) -> None:
    """On a grey picture in one fork, and on the gallery's in the other: Forge's canvas gives the same mask to the
    panel, to the API, and to a page into which the infotext is pasted.

    Forge Neo's page leaves the prompt as it is: a pasted value takes the type of the control's own, which is None for
    the prompt."""
    is_neo = fork.name == "neo"
    of_a1111.paint_a_place(browser, client, host, names, has_picture=is_neo, pastes_prompts=not is_neo)


def test_a_removed_picture_comes_again(page: Any, client: Client) -> None:
    """The canvas has a button of its own that removes its picture, and hints at uploading one where it has none."""
    panel = PANEL.format(tab="txt2img")
    page.locator(f"{panel}_enable .label-wrap").first.click()
    page.locator(f"{panel}_expert1_where .label-wrap").first.click()
    hint = page.locator(f"{panel}_expert1_canvas [id^=uploadHint_] svg").first
    painted, picture = page.locator(f"{panel}_expert1_place_painted"), f"{panel}_expert1_canvas [id^=image_]"
    painted.click()
    for remove in ("canvas [id^=removeButton_]", "canvas_clear"):
        hint.wait_for(state="visible")
        page.locator(f"{panel}_expert1_canvas_use").click()
        hint.wait_for(state="hidden")
        page.wait_for_function(f"document.querySelector('{picture}').offsetWidth > 0")
        page.locator(f"{panel}_expert1_{remove}").dispatch_event("click")
        page.wait_for_function(f"document.querySelector('{picture}').offsetWidth == 0")
    painted.click()  # for no place is left
    hint.wait_for(state="visible")


@pytest.mark.where(lambda fork, **_: fork == "neo")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshots(browser: Any, client: Client, host: Host, names: Names, fork: Fork, theme: str) -> None:
    """Writes docs/webui-FORK-*.png where SCREENSHOTS is set; elsewhere it shows that the panel opens in both themes."""
    with client.settings({"sd_model_checkpoint": f"{names.expert}.safetensors"}):
        take_screenshot(browser, host, names, theme, f"{fork.name}-{theme}")
