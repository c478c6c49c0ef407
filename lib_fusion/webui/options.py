"""The extension's settings in the host: read by their rows, since config.json and the API can hold anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules import paths, shared

from lib_fusion.errors import SettingError
from lib_fusion.log import logger
from lib_fusion.requests import presets
from lib_fusion.requests.settings import HOST_OPTIONS

PREFIX = "denoiser_fusion_"
#: What has been reported, so that one wrong value is one line in the log.
_reported: set[tuple[str, str]] = set()


def read_option(key: str) -> Any:
    """The value of a row in ``HOST_OPTIONS``; where it is not allowed, the default, and a line in the log."""
    row, name = HOST_OPTIONS[key], f"{PREFIX}{key}"
    try:
        return row.read(shared.opts.data.get(name, row.default), name)
    except SettingError as error:
        if (name, str(error)) not in _reported:
            _reported.add((name, str(error)))
            logger.warning("setting %s; %s is used", error, row.show(row.default) or "the default")
        return row.default


def all_presets() -> presets.Presets:
    """The shipped presets, and a person's own in the host's data directory."""
    return presets.Presets(Path(paths.data_path) / presets.FILE)
