"""The errors that a user sees: one line that names the field, the value, and what is allowed."""

from __future__ import annotations

import gc
import reprlib
import traceback

#: Characters of a refused value, or of a field's name, that an error repeats; and of all that it says.
LONGEST_SHOWN, LONGEST_MESSAGE = 120, 2000

_repr = reprlib.Repr()  # of a value as it came: any length, any depth
_repr.maxstring = _repr.maxother = 2 * LONGEST_SHOWN
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 8
_repr.maxlevel = 4


class FusionError(ValueError):
    """Base of all errors that are the request's or a file's fault; the message is one line for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class SettingError(FusionError):
    """A setting has a value that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{shorten(field)}: {shorten(_repr.repr(value))} is not allowed; {allowed}")


def shorten(text: str, longest: int = LONGEST_SHOWN) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."


def one_line(text: str) -> str:
    """Text in one printable line: errors repeat names out of requests and files, whatever characters are in them."""
    text = shorten(" ".join(text[: 2 * LONGEST_MESSAGE].split()), LONGEST_MESSAGE)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class CheckpointError(FusionError):
    """A checkpoint file can't be used; says what was found in it."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine has no memory left, in the words of torch's several backends."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def release(error: BaseException) -> None:
    """Lets go of all that the functions held in which an error came up: models, features, latents.

    Else that lives as long as the error, which others keep, and what comes next has no memory either.
    """
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    gc.collect()  # errors and frames refer to each other
