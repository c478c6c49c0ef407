"""What a live test needs of the machine. Without it the test is skipped; ``FUSION_REQUIRE_HOST`` makes it fail.

That variable names the hosts that must be there, such as ``a1111,neo,forge``; ``1`` is AUTOMATIC1111's alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from tests.webui_live.host import NoHostError, find_host

A1111 = "a1111"


def required() -> set[str]:
    """The hosts that must be there."""
    named = {name.strip().lower() for name in os.environ.get("FUSION_REQUIRE_HOST", "").split(",")}
    return {A1111 if name == "1" else name for name in named - {"", "0"}}


def missing(reason: str, host: str = A1111) -> NoReturn:
    """Ends a test whose host is not there."""
    if host in required():
        pytest.fail(f"{reason} (and FUSION_REQUIRE_HOST is {os.environ['FUSION_REQUIRE_HOST']})", pytrace=False)
    pytest.skip(reason)


def the_host() -> tuple[Path, Path]:
    """(the WebUI's folder, its Python)."""
    try:
        return find_host()
    except NoHostError as error:
        missing(str(error))
