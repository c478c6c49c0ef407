"""The ticks of the README's table *What works where*, in each fork."""

from __future__ import annotations

from tests.webui_live.test_what_works import test_it_works  # noqa: F401 (a test, which runs here too)
