"""The errors that a user sees: one line that names the field, the value, and what is allowed."""

from __future__ import annotations

#: Characters of a refused value that an error repeats.
LONGEST_SHOWN = 120


class FusionError(ValueError):
    """Base of all errors that are the request's or a file's fault; the message is one line for a person."""


class SettingError(FusionError):
    """A setting has a value that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        shown = repr(value)
        shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."
        super().__init__(f"{field}: {shown} is not allowed; {allowed}")


class CheckpointError(FusionError):
    """A checkpoint file can't be used; says what was found in it."""
