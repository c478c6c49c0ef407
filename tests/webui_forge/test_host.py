"""The fork starts with the extension, and can load and draw with each kind of the tests' checkpoints."""

from __future__ import annotations

import re

import pytest

from tests.webui_live.client import Client
from tests.webui_live.host import EXTENSION, REPOSITORY, Host

KINDS = ("general", "tiny_xl", "tiny_xl_v")
#: How our files are named in frames, and in the lines in which the WebUI reports what failed.
OURS = re.compile("|".join(map(re.escape, (EXTENSION, str(REPOSITORY), "lib_fusion", "denoiser_fusion"))))


def failures(log: str) -> list[str]:
    """The tracebacks in a WebUI's log, each with the line before it where that is the WebUI's report."""
    found, lines = [], log.splitlines()
    for i, line in enumerate(lines):
        if not line.lstrip().startswith("Traceback (most recent call last)"):
            continue
        indent = len(line) - len(line.lstrip())
        end = next((j for j in range(i + 1, len(lines)) if lines[j].strip()
                    and len(lines[j]) - len(lines[j].lstrip()) <= indent), len(lines) - 1)  # fmt: skip
        begin = i - 1 if i and lines[i - 1].startswith("*** ") else i
        found.append("\n".join(lines[begin : end + 1]))
    return found


@pytest.mark.parametrize("model", KINDS)
def test_each_kind_of_checkpoint_draws(client: Client, model: str) -> None:
    first, second = (client.draw(model=model, steps=2) for _ in range(2))
    assert first.same_as(second)
    assert first.pixels[0].std() > 1
    assert f"Model: {model}" in first.infotexts[0]


def test_nothing_of_the_extension_fails_at_the_start(host: Host) -> None:
    """What a fork brings with it may miss packages of its own; what fails because of us names our files."""
    log = host.log[: host.log.index("Startup time")]
    assert [failure for failure in failures(log) if OURS.search(failure)] == []
    assert re.search(r"Denoiser Fusion \d.* in Forge", log)  # what it says when all of it is registered


REPORT = """\
INFO [denoiser_fusion] Denoiser Fusion 0.1.0 (commit 12345678) in Forge
*** Error {what}
    Traceback (most recent call last):
      File "/forge/modules/scripts.py", line 525, in load_scripts
        script_module = load_module(path)
      File "{file}", line 19, in <module>
        import joblib
    ModuleNotFoundError: No module named '{module}'
---
Startup time: 9.9s
"""


@pytest.mark.parametrize(
    ("what", "file", "module", "is_ours"),
    [
        ("loading script: soft.py", "/forge/extensions-builtin/soft-inpainting/scripts/soft.py", "joblib", False),
        ("loading script: denoiser_fusion.py", "/forge/modules/script_loading.py", "joblib", True),
        ("executing callback ui", f"/data/extensions/{EXTENSION}/scripts/x.py", "joblib", True),
        ("executing callback ui", "/forge/modules/x.py", "lib_fusion.webui", True),
    ],
)
def test_whose_failure_it_is(what: str, file: str, module: str, is_ours: bool) -> None:
    (failure,) = failures(REPORT.format(what=what, file=file, module=module))
    assert failure.endswith(f"No module named '{module}'")
    assert bool(OURS.search(failure)) is is_ours
