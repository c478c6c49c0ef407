"""Parameters: what a setting is called, which values it allows, and how it is read from and written as text.

A settings class declares each of its parameters as a field, ``strength: float = row(1.0, "strength", "...", high=2)``;
``rows_of`` derives the table that panel, API, infotext, XYZ plot, presets and command line are built from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from lib_fusion.errors import SettingError

T = TypeVar("T")

#: The most characters of a text, such as an expert's prompt.
LONGEST_TEXT = 10_000
#: Values of ``Parameter.where`` for parameters that only one surface has.
CLI = ("cli",)
PANEL = ("panel",)
#: The key of a row's description in its field's metadata.
_METADATA = "row"


@dataclass(frozen=True)
class Parameter:
    """One row: ``key`` in the API, ``label`` in panel and XYZ plot, ``--key`` as flag, "Fusion ``name``" in infotext.

    ``kind`` is one of bool, int, float, choice, text, window; numbers lie in ``low..high`` inclusive; ``step`` is the
    slider's; ``where`` names the surfaces that have the row: "panel" (with API, infotext, XYZ), "cli". ``earlier``:
    the former default, by which infotexts and presets are read that do not name the row. ``name`` is the label unless
    it says otherwise: pictures carry it, so it stays when a label becomes clearer.
    """

    key: str
    kind: str
    default: Any
    label: str
    help: str
    low: float = -math.inf
    high: float = math.inf
    step: float | None = None
    choices: tuple[str, ...] = ()
    where: tuple[str, ...] = ("panel", "cli")
    multiple_of: int = 1
    earlier: Any = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.label)

    @property
    def unsaid(self) -> Any:
        """The value that infotext without the row's entry means: ``earlier``, else the default."""
        return self.default if self.earlier is None else self.earlier

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def allowed(self) -> str:
        """The allowed values in words, for help texts and errors."""
        if self.kind == "bool":
            return "allowed: true or false"
        if self.kind == "choice":
            return f"allowed: {', '.join(self.choices)}"
        if self.kind == "window":
            return f"allowed: START:END, timesteps with {self.high:g} >= START >= END >= {self.low:g}"
        if self.kind == "text":
            return f"allowed: text of at most {LONGEST_TEXT} characters, valid UTF-8 without NUL"
        number = "a whole number" if self.kind == "int" else "a number"
        multiple = f" divisible by {self.multiple_of}" if self.multiple_of > 1 else ""
        limits = [f"at least {self.low:g}"] if self.low > -math.inf else []
        limits += [f"at most {self.high:g}"] if self.high < math.inf else []
        return f"allowed: {number}{multiple}{' ' if limits else ''}{' and '.join(limits)}"

    def read(self, value: Any, field_name: str | None = None) -> Any:
        """Converts a value from JSON, the command line or infotext to the row's type.

        Raises SettingError, which names ``field_name`` (default: the key), where the value is not allowed.
        """
        try:
            result = _READERS[self.kind](self, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise SettingError(field_name or self.key, value, self.allowed) from error
        return result

    def show(self, value: Any) -> str:
        """Writes a value as text that ``read`` accepts."""
        if self.kind == "window":
            return ":".join(map(_number, value))
        return _number(value) if self.kind == "float" else str(value)


def row(
    default: T,
    label: str,
    help_text: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    step: float | None = None,
    choices: tuple[str, ...] = (),
    where: tuple[str, ...] = ("panel", "cli"),
    multiple_of: int = 1,
    earlier: Any = None,
    name: str = "",
    required: bool = False,
) -> T:
    """Declares a dataclass field as a parameter; the arguments are as in ``Parameter``.

    The field's name becomes the key, and its annotation the kind: bool, int, float, str ("choice" with ``choices``,
    else "text") or ``tuple[float, float]`` ("window"). With ``required`` the class can't be constructed without the
    field, while ``read_rows`` still fills in the default.
    """
    described = {
        "default": default, "label": label, "help": help_text, "low": low, "high": high, "step": step,
        "choices": choices, "where": where, "multiple_of": multiple_of, "earlier": earlier, "name": name,
    }  # fmt: skip
    if required:
        return field(metadata={_METADATA: described})
    return field(default=default, metadata={_METADATA: described})


def rows_of(settings: type) -> tuple[Parameter, ...]:
    """The parameters that a dataclass declares with ``row``, in order; it may have other fields too.

    Raises TypeError for a field whose annotation is of no kind.
    """
    types = get_type_hints(settings)
    return tuple(
        Parameter(key=found.name, kind=_kind_of(found.name, types[found.name], described["choices"]), **described)
        for found in fields(settings)
        if (described := found.metadata.get(_METADATA))
    )


def _kind_of(name: str, annotation: Any, choices: tuple[str, ...]) -> str:
    kind = _KINDS.get(annotation)
    if kind is None or (choices and kind != "text"):
        raise TypeError(f"{name}: a row of type {annotation} is of no kind")
    return "choice" if choices else kind


def read_rows(rows: Iterable[Parameter], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Reads the values of all ``rows`` by key, with defaults for the keys that ``values`` lacks.

    Raises SettingError for a value that is not allowed and for an unknown key; it names ``prefix`` and the key.
    """
    rows = list(rows)
    known = {row.key for row in rows}
    for key in values:
        if key not in known:
            raise SettingError(f"{prefix}{key}", values[key], f"no such setting; there are: {', '.join(sorted(known))}")
    return {row.key: row.read(values.get(row.key, row.default), f"{prefix}{row.key}") for row in rows}


def _number(value: float) -> str:
    """The number in six digits if they say the same, else in as many as it takes."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _refuse(condition: bool) -> None:
    if condition:
        raise ValueError


def _read_bool(_: Parameter, value: Any) -> bool:
    text = str(value).strip().lower() if isinstance(value, (bool, str)) else ""
    _refuse(text not in ("true", "false"))
    return text == "true"


def _read_number(row: Parameter, value: Any) -> float | int:
    _refuse(isinstance(value, bool) or not isinstance(value, (int, float, str)))
    number = float(value)
    _refuse(not math.isfinite(number) or not row.low <= number <= row.high)
    if row.kind == "int":
        _refuse(number != int(number) or int(number) % row.multiple_of != 0)
        return int(number)
    return number


def _read_choice(row: Parameter, value: Any) -> str:
    _refuse(isinstance(value, bool) or not isinstance(value, (str, int)))
    by_name = {choice.lower(): choice for choice in row.choices}
    name = str(value).strip().lower()
    _refuse(name not in by_name)
    return by_name[name]


def _read_text(_: Parameter, value: Any) -> str:
    _refuse(not isinstance(value, str) or len(value) > LONGEST_TEXT or "\0" in value)
    value.encode()  # raises for half a surrogate pair: JSON allows it, but it can be neither tokenised nor saved
    return value


def _read_window(row: Parameter, value: Any) -> tuple[float, float]:
    parts = value.split(":") if isinstance(value, str) else list(value)
    _refuse(len(parts) != 2 or any(isinstance(part, bool) for part in parts))
    start, end = (float(part) for part in parts)
    _refuse(not (row.high >= start >= end >= row.low))
    return start, end


_READERS: dict[str, Callable[[Parameter, Any], Any]] = {
    "bool": _read_bool, "int": _read_number, "float": _read_number, "choice": _read_choice, "text": _read_text,
    "window": _read_window,
}  # fmt: skip
#: Kinds by a field's annotation; a text with choices is a "choice".
_KINDS: dict[Any, str] = {bool: "bool", int: "int", float: "float", str: "text", tuple[float, float]: "window"}
