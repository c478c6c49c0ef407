"""The extension's settings in the host's config.json, which may hold anything."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from lib_fusion.requests.settings import HOST_OPTIONS, FusionSettings
from tests.webui_fake import fakes

NONSENSE = ("lots", None, [], {}, -1, 1.5, 10**9, float("nan"), "\0", True, "")


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return fakes.install(monkeypatch).data


def test_each_is_read_as_it_was_set(data: dict[str, Any]) -> None:
    from lib_fusion.webui.options import read_option

    good = {"int": 3, "choice": "RAM between pictures", "bool": True, "text": "900 500"}
    for key, row in HOST_OPTIONS.items():
        assert read_option(key) == row.default
        data[f"denoiser_fusion_{key}"] = good[row.kind]
        assert read_option(key) == good[row.kind]


@pytest.mark.parametrize("key", HOST_OPTIONS)
def test_nonsense_is_the_default_and_one_line_in_the_log(
    data: dict[str, Any], key: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib_fusion.log import logger
    from lib_fusion.webui.options import read_option

    monkeypatch.setattr(logger, "propagate", True)
    row = HOST_OPTIONS[key]
    for value in NONSENSE:
        data[f"denoiser_fusion_{key}"] = value
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = [read_option(key) for _ in range(3)]
        is_allowed = (row.kind == "bool" and value is True) or (row.kind == "text" and value in ("lots", ""))
        assert found == [value if is_allowed else row.default] * 3
        assert len(caplog.records) == (0 if is_allowed else 1)
        if not is_allowed:
            assert f"denoiser_fusion_{key}" in caplog.records[0].getMessage()


def test_a_pass_and_the_caches_take_what_is_read(data: dict[str, Any]) -> None:
    from lib_fusion.webui.a1111.hooked_pass import wanted_records
    from lib_fusion.webui.a1111.placement import waits_in_ram

    for key in HOST_OPTIONS:
        data[f"denoiser_fusion_{key}"] = ["lots"]
    assert wanted_records(FusionSettings()).kinds == frozenset()
    assert wanted_records(FusionSettings(previews=("skips",))).kinds == {"skips"}
    assert not waits_in_ram(None)
