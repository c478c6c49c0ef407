"""What the extension says in a WebUI that lacks what it needs."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest

from tests.webui_fake import fakes


@pytest.fixture
def other_hosts(monkeypatch: pytest.MonkeyPatch) -> Any:
    fakes.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    from lib_fusion.webui import other_hosts

    return other_hosts


def test_the_forge_family_is_recognised_before_anything_else_is_imported(
    other_hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge = types.ModuleType("modules_forge")
    forge.__spec__ = importlib.machinery.ModuleSpec("modules_forge", None)
    monkeypatch.setitem(sys.modules, "modules_forge", forge)
    assert "Forge" in other_hosts.why_not()
    assert "lib_fusion.webui.script" not in sys.modules


def test_in_a_fork_that_lacks_a_name_the_sentence_has_it(other_hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_hosts, "ROOMS", ("models.text_encoders",))
    monkeypatch.delattr(sys.modules["modules.sd_hijack"], "model_hijack")
    reason = other_hosts.why_not()
    assert reason.startswith("Denoiser Fusion needs AUTOMATIC1111's stable-diffusion-webui v1.10.1. ")
    assert "model_hijack" in reason
