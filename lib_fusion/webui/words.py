"""What the server tells in the panel, in the language that the WebUI's page has."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from modules import localization, shared

from lib_fusion.requests.translation import Translation


def translate(text: str) -> str:
    """A text in the page's language, as far as the WebUI's localisation files have it; else as it is."""
    files = localization.localizations.get(getattr(shared.opts, "localization", None) or "None", ())
    files = (files,) if isinstance(files, str) else tuple(files)
    return _translation(files)(text) if files else text


@lru_cache(maxsize=2)
def _translation(files: tuple[str, ...]) -> Translation:
    words: dict[str, str] = {}
    for file in files:
        try:
            found = json.loads(Path(file).read_text("utf-8"))
        except (OSError, ValueError):
            continue  # which the WebUI itself reports
        words |= {key: told for key, told in found.items() if isinstance(told, str)} if isinstance(found, dict) else {}
    return Translation(words)
