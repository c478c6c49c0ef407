"""What the extension says in a WebUI that lacks what it needs."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest

from tests.webui_fake import fakes

NEEDED = "Denoiser Fusion needs AUTOMATIC1111's stable-diffusion-webui v1.10.1, Forge Neo or Forge. "
#: What tells the forks apart: the packages that each of them has.
UNSUPPORTED = {
    "reForge and Forge Classic": ("modules_forge", "ldm_patched"),
    "a fork with both backends": ("modules_forge", "ldm_patched", "backend", "backend.sampling"),
    "an unknown fork": ("modules_forge",),
    "an unknown fork with a backend of its own": ("modules_forge", "backend"),
}


@pytest.fixture
def other_hosts(monkeypatch: pytest.MonkeyPatch) -> Any:
    fakes.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    from lib_fusion.webui import other_hosts

    return other_hosts


def install(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for name in packages:
        package = types.ModuleType(name)
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)


@pytest.mark.parametrize("fork", UNSUPPORTED)
def test_an_unsupported_fork_is_recognised_before_anything_else_is_imported(
    other_hosts: Any, monkeypatch: pytest.MonkeyPatch, fork: str
) -> None:
    install(monkeypatch, *UNSUPPORTED[fork])
    assert other_hosts.why_not().startswith(f"{NEEDED}This WebUI is another fork")
    assert "lib_fusion.webui.script" not in sys.modules


@pytest.mark.parametrize("packages", [(), ("modules_forge", "backend", "backend.sampling"), ("ldm_patched",)])
def test_a_supported_host_goes_on_to_the_imports(
    other_hosts: Any, monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...]
) -> None:
    """AUTOMATIC1111's may have any package that an extension brings; the forks with Forge's backend are hosts."""
    install(monkeypatch, *packages)
    monkeypatch.setattr(other_hosts, "ROOMS", ())
    assert other_hosts.why_not() == ""


def test_in_a_fork_that_lacks_a_name_the_sentence_has_it(other_hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_hosts, "ROOMS", ("a1111.text_encoders",))
    monkeypatch.delattr(sys.modules["modules.sd_hijack"], "model_hijack")
    reason = other_hosts.why_not()
    assert reason.startswith(NEEDED)
    assert "model_hijack" in reason
