"""The fork starts with the extension, and can load and draw with each kind of the tests' checkpoints."""

from __future__ import annotations

import pytest

from tests.webui_live.client import Client
from tests.webui_live.host import Host

KINDS = ("general", "tiny_xl", "tiny_xl_v")


@pytest.mark.parametrize("model", KINDS)
def test_each_kind_of_checkpoint_draws(client: Client, model: str) -> None:
    first, second = (client.draw(model=model, steps=2) for _ in range(2))
    assert first.same_as(second)
    assert first.pixels[0].std() > 1
    assert f"Model: {model}" in first.infotexts[0]


def test_nothing_of_the_extension_fails_at_the_start(host: Host) -> None:
    assert "Traceback" not in host.log
