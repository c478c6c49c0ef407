"""The panel under Gradio 4 as a person uses it: the tests of AUTOMATIC1111's, in each fork."""

from __future__ import annotations

from tests.webui_live.test_browser import (  # noqa: F401 (tests, which run here too)
    test_a_first_user,
    test_amounts_of_skipping,
    test_buttons_of_places,
    test_compare,
    test_nothing_chosen_is_told,
    test_paint_a_place,
    test_presets_and_memory,
    test_three_by_three,
    test_what_is_typed_is_shown_as_text,
)
