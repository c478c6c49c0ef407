"""What a live test needs of the machine. Without it the test is skipped, and with FUSION_REQUIRE_HOST=1 it fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from tests.webui_live.host import NoHostError, find_host


def missing(reason: str) -> NoReturn:
    """Ends a test whose host is not there."""
    if os.environ.get("FUSION_REQUIRE_HOST", "0") not in ("", "0"):
        pytest.fail(f"{reason} (and FUSION_REQUIRE_HOST is set)", pytrace=False)
    pytest.skip(reason)


def the_host() -> tuple[Path, Path]:
    """(the WebUI's folder, its Python)."""
    try:
        return find_host()
    except NoHostError as error:
        missing(str(error))
