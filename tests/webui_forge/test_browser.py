"""The panel under Gradio 4 as a person uses it: tests of AUTOMATIC1111's, in Forge Neo.

Forge has the same Gradio and the same page; its pictures and requests are tested, but its page is not driven. Nor is
painting on the canvas, which is Forge's own.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.webui_forge.forks import Fork
from tests.webui_live.client import Client
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host
from tests.webui_live.test_browser import (  # noqa: F401 (tests, which run here too)
    take_screenshot,
    test_a_first_user,
    test_amounts_of_skipping,
    test_compare,
    test_nothing_chosen_is_told,
    test_presets_and_memory,
    test_what_is_typed_is_shown_as_text,
)


@pytest.fixture(autouse=True)
def _in_neo(fork: Fork) -> None:
    if fork.name != "neo":
        pytest.skip("the page is driven in Forge Neo alone")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshots(browser: Any, client: Client, host: Host, names: Names, fork: Fork, theme: str) -> None:
    """Writes docs/webui-FORK-*.png where SCREENSHOTS is set; elsewhere it shows that the panel opens in both themes."""
    client.draw(model=names.expert)
    take_screenshot(browser, host, names, theme, f"{fork.name}-{theme}")
