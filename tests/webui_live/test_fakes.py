"""The fakes of tests/webui_fake have the signatures of the real ``modules``."""

from __future__ import annotations

import inspect
import re

from tests.webui_fake import fakes
from tests.webui_live.client import Client


def parameters(signature: str) -> str:
    """Without annotations, and with defaults in one way of writing."""
    plain = re.sub(r"\s*->.*$", "", signature)
    plain = re.sub(r":\s*[^,=()\[\]]+(\[[^\]]*\])?[^,=()]*(?=[,=)])", "", plain)
    return plain.replace(" ", "").replace('"', "'").replace("(self,", "(").replace("(self)", "()")


def test_fakes_match_the_host(client: Client) -> None:
    real = client.ask("/probe/signatures", names=",".join(fakes.SIGNATURES))
    differ = {
        name: (parameters(str(inspect.signature(fake))), parameters(real[name]))
        for name, fake in fakes.SIGNATURES.items()
        if parameters(str(inspect.signature(fake))) != parameters(real[name])
    }
    assert differ == {}


def test_what_else_is_used_is_there(client: Client) -> None:
    found = client.ask("/probe/signatures", names=",".join(fakes.PRESENT))
    assert [name for name, told in found.items() if told.startswith("missing")] == []
