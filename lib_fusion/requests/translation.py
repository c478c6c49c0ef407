"""Sentences that are composed as they are told, in another language: by whole texts and by templates. Host-free.

The WebUI's page translates texts that it finds in a localisation file letter by letter. A sentence with a name or a
number in it is none of those, so the file has a template for it, ``{0} is being trained: choose it to watch.``
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PLACE = re.compile(r"\{(\d)\}")
#: Between sentences, between a name and what is said of it, and before what explains more.
_MARKS = ("; ", ": ", " (")


class Translation:
    """``words``: a localisation's texts and templates, each with its translation."""

    def __init__(self, words: Mapping[str, str]) -> None:
        self._words = {text: told for text, told in words.items() if not _PLACE.search(text)}
        templates = [text for text in words if _PLACE.search(text)]
        templates.sort(key=lambda text: len(_PLACE.sub("", text)), reverse=True)  # the one that says most comes first
        self._templates = [(_pattern(text), words[text]) for text in templates]

    def __call__(self, text: str) -> str:
        """The text in the other language as far as the file has it: whole, by a template, or part by part."""
        if text in self._words:
            return self._words[text]
        for pattern, told in self._templates:
            if found := pattern.fullmatch(text):
                return self._fill(told, found.groupdict())
        for mark in _MARKS:
            head, between, tail = text.partition(mark)
            if between and tail:
                return f"{self(head)}{mark}{self(tail)}"
        return self._of_list(text)

    def _fill(self, told: str, parts: Mapping[str, str]) -> str:
        return _PLACE.sub(lambda place: self(parts[f"p{place[1]}"]), told)

    def _of_list(self, text: str) -> str:
        """A list of choices, if the file has each of them."""
        parts = text.split(", ")
        return ", ".join(self._words[part] for part in parts) if all(part in self._words for part in parts) else text


def _pattern(template: str) -> re.Pattern[str]:
    literal, places = _PLACE.split(template)[::2], _PLACE.findall(template)
    groups = [f"(?P<p{place}>.+?)" for place in places] + [""]
    return re.compile("".join(re.escape(text) + group for text, group in zip(literal, groups)), re.DOTALL)
