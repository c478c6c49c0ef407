"""What a person or a program asks for: panel values and API dict, read by the one table. Host-free."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib_fusion.errors import SettingError
from lib_fusion.requests.infotext import NO_CHECKPOINT, Field, list_fields, panel_default, takes_part
from lib_fusion.requests.parameters import Parameter
from lib_fusion.requests.settings import (
    AUTO,
    COMPARE,
    ENABLED,
    EXPERT_PARAMETERS,
    FREEU_CUSTOM,
    MAX_EXPERTS,
    PAINTED,
    PARAMETERS,
    PREVIEWS,
    TIMESTEPS,
    UNUSED_ROWS,
    ExpertSettings,
    FusionSettings,
)

#: The API's key for a whole preset, and a plot's axis for it, in addition to the fields' elements.
PRESET = "preset"
#: The controls of a window, and the axes for one end of it.
WINDOW_ENDS = ("start", "end")
FREEU_CUSTOM_KEYS = {row.key for row in FREEU_CUSTOM}


def default_values() -> list[Any]:
    """The panel's values as it opens: off, the table's defaults, no comparison, canvases without a picture, and
    the previews that the WebUI's settings name."""
    values: list[Any] = [False]
    for field in list_fields():
        values += list(field.row.default) if field.width == 2 else [panel_default(field)]
    return [*values, COMPARE.default, *[None] * MAX_EXPERTS, None]


def values_of(args: Sequence[Any]) -> Mapping[str, Any]:
    """The API dict of a script's arguments: one dict (the API's), or the panel's values; raises SettingError.

    Other arguments after a dict are the host's own: defaults, or what it read from an infotext. The dict wins.
    """
    if is_panel(args):
        return panel_to_dict(args)
    if any(isinstance(arg, Mapping) for arg in args[1:]):
        raise SettingError("args", "a list with more than one thing in it", "allowed: one object of settings")
    return args[0]


def read_args(
    args: Sequence[Any], axes: Mapping[str, Any] | None = None,
    preset: Callable[[str], Mapping[str, Any]] | None = None,
) -> FusionSettings | None:  # fmt: skip
    """Settings from a script's arguments; None where it is off.

    ``preset``: gives the values of the preset that the API's object may name; its other keys go before these.
    ``axes``: values that a cell of an X/Y/Z plot sets, by the fields' elements; they also switch it on. In the panel
    nothing that is off or hidden can refuse a picture; in the API's object every value is checked.
    """
    values = values_of(args)
    if preset is not None and PRESET in values:
        own = {key: value for key, value in values.items() if key != PRESET}
        values = {**preset(str(values[PRESET])), **own}
    if axes:
        values = put_axes(values, axes)
    if is_panel(args):
        if values.get(ENABLED.key) is False:
            return None
        values = forgive_unused(values)
    return read_dict(values)


def is_panel(args: Sequence[Any]) -> bool:
    """Whether a script's arguments are the panel's values, and not the API's object."""
    return not args or not isinstance(args[0], Mapping)


def forgive_unused(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A panel's values without those that are not allowed and have no part in the picture."""
    rows = {row.key: row for row in PARAMETERS if row.key in values}
    read = {}
    for key, row in rows.items():
        with contextlib.suppress(SettingError):
            read[key] = row.read(values[key])
    places = [str(expert.get("place", AUTO)) for expert in values.get("experts", ())]
    if not places and read.get("method") == "AFA" and read.get("afa_aggregator"):
        places = [AUTO]  # an aggregator brings its experts
    settings = FusionSettings(experts=tuple(ExpertSettings("", place=place) for place in places), **read)
    return {key: value for key, value in values.items() if key in read or key not in rows or takes_part(key, settings)}


def put_axes(values: Mapping[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    """An API dict with a plot's values in it: a preset's first, the others over it.

    A plot that takes away all there is to do switches off. FreeU's own factors count in the cells of "Custom" only,
    and what a method does not have of the experts not in its cells.
    """
    result = {**values, **axes.get(PRESET, {}), ENABLED.key: axes.get(ENABLED.key, True)}
    experts = result.get("experts", ())
    if not isinstance(experts, Sequence) or not all(isinstance(expert, Mapping) for expert in experts):
        return result  # to be refused by name
    experts = [dict(expert) for expert in experts]
    experts += [{} for _ in range(MAX_EXPERTS - len(experts))]
    for field in list_fields():
        target = result if field.expert is None else experts[field.expert]
        if field.element in axes:
            target[field.row.key] = axes[field.element]
            if field.row.key == "place" and str(axes[field.element]).strip().lower() != PAINTED:
                target.pop("mask", None)
        if field.width == 2:
            put_ends(target, field, axes)
    if "method" in axes or PRESET in axes:
        drop_unused(experts, result.get("method"))
    result["experts"] = [expert for expert in experts if expert.get("checkpoint", "") not in NO_CHECKPOINT]
    chosen = str(result.get("freeu", "Off")).strip().lower()
    if chosen != "custom" and ("freeu" in axes or PRESET in axes):
        result = {key: value for key, value in result.items() if key not in FREEU_CUSTOM_KEYS}
    removes = any(key in ("freeu", "skipping", "guidance") or (key.endswith("_checkpoint") and value in NO_CHECKPOINT)
                  for key, value in axes.items())  # fmt: skip
    is_off = all(str(result.get(key, "Off")).strip().lower() == "off" for key in ("freeu", "skipping"))
    is_off = is_off and str(result.get("guidance", "")).strip().lower() != "always"
    if removes and not result["experts"] and is_off:
        result[ENABLED.key] = False
    return result


def put_ends(target: dict[str, Any], field: Field, axes: Mapping[str, Any]) -> None:
    """Puts a plot's values for one end of a window, or for both, into an API dict or an expert's."""
    ends = [axes.get(f"{field.element}_{end}") for end in WINDOW_ENDS]
    if any(end is not None for end in ends):
        window = field.row.read(target.get(field.row.key, field.row.default))
        target[field.row.key] = [was if end is None else end for was, end in zip(window, ends)]


def read_dict(values: Mapping[str, Any]) -> FusionSettings | None:
    """Settings from an API dict, or None where it says that it is off; raises SettingError naming the field."""
    known = write_schema()["properties"]
    for key, value in values.items():
        if key not in known:
            raise SettingError(str(key), value, f"no such setting; there are: {', '.join(known)}")
    COMPARE.read(values.get(COMPARE.key, False))
    rest = {key: value for key, value in values.items() if key not in (ENABLED.key, COMPARE.key)}
    settings = FusionSettings.from_dict(rest)
    if not ENABLED.read(values.get(ENABLED.key, True)):
        return None
    if settings.is_idle or len(settings.experts) > MAX_EXPERTS:
        allowed = f"allowed: 1 to {MAX_EXPERTS} experts, each with a checkpoint, or none with FreeU or skipping on"
        raise SettingError("experts", [dict(vars(expert)) for expert in settings.experts], allowed)
    for i, expert in enumerate(settings.experts):
        if expert.checkpoint in NO_CHECKPOINT:
            raise SettingError(f"experts[{i}].checkpoint", expert.checkpoint, "allowed: a checkpoint's name")
    return settings


def panel_to_dict(args: Sequence[Any]) -> dict[str, Any]:
    """The API dict that says what the panel's values say, without what it hides: experts without a checkpoint, what
    the method does not have of them, and FreeU's own factors where published ones are chosen."""
    defaults = default_values()
    values = [default if value is None else value for default, value in zip(defaults, args)]
    values += defaults[len(values) :]
    result: dict[str, Any] = {ENABLED.key: values.pop(0)}
    experts: list[dict[str, Any]] = [{} for _ in range(MAX_EXPERTS)]
    for field in list_fields():
        value = [values.pop(0) for _ in range(field.width)]
        target = result if field.expert is None else experts[field.expert]
        target[field.row.key] = value if field.width == 2 else value[0]
    result[COMPARE.key], previews = values.pop(0), values.pop()
    if previews is not None:
        result["previews"] = previews
    for expert, canvas in zip(experts, values):
        if str(expert["place"]).strip().lower() == PAINTED and (mask := read_canvas(canvas)):
            expert["mask"] = mask
    drop_unused(experts, result["method"])
    result["experts"] = [expert for expert in experts if expert["checkpoint"] not in NO_CHECKPOINT]
    if result["freeu"] != "Custom":
        result = {key: value for key, value in result.items() if key not in FREEU_CUSTOM_KEYS}
    return result


def drop_unused(experts: Sequence[dict[str, Any]], method: Any) -> None:
    """Takes out of the experts what a method, however it is written, does not have of them."""
    names = {name.lower(): name for name in UNUSED_ROWS}
    unused, _ = UNUSED_ROWS.get(names.get(str(method).strip().lower(), ""), ((), ""))
    for expert in experts:
        for key in (*unused, "mask") if "place" in unused else unused:
            expert.pop(key, None)


def read_canvas(value: Any) -> Any:
    """The mask that a canvas gives, as base64 of a picture file; an empty text where nothing is painted.

    Gradio 3's canvas gives its picture and what is painted on it, white on black; that of Forge only the strokes, on
    nothing. Both are pictures of the library Pillow. Text is taken as it is.
    """
    image: Any = value.get("mask") if isinstance(value, Mapping) else value
    if not hasattr(image, "convert"):
        return image
    grey = image.convert("L") if isinstance(value, Mapping) else image.convert("RGBA").getchannel("A")
    if not grey.getextrema()[1]:
        return ""
    file = io.BytesIO()
    grey.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def dict_to_panel(values: Mapping[str, Any]) -> list[Any]:
    """The panel's values (without its switch) for an API dict that may hold a few keys only; None: leave as it is."""
    experts = values.get("experts")
    result: list[Any] = []
    for field in list_fields():
        if field.expert is None:
            value = values.get(field.row.key)
        elif experts is None:
            value = None
        elif field.expert < len(experts):
            value = experts[field.expert].get(field.row.key, field.row.default)
        else:
            value = panel_default(field)
        if field.width == 2:
            result += [None, None] if value is None else list(field.row.read(value))
        else:
            result.append(value)
    return result


def write_schema() -> dict[str, Any]:
    """JSON schema of the API's one object."""
    expert = {row.key: _schema_of(row) for row in EXPERT_PARAMETERS}
    expert["mask"] = {"type": "string", "description": "A painted mask: base64 of a picture file, white where the "
                      "expert draws; with place \"mask\".", "default": ""}  # fmt: skip
    experts = {
        "type": "array", "maxItems": MAX_EXPERTS, "description": "The experts, in order.",
        "items": {"type": "object", "properties": expert, "required": ["checkpoint"], "additionalProperties": False},
    }  # fmt: skip
    previews = {
        "type": "array", "items": {"type": "string", "enum": list(PREVIEWS)},
        "description": "Pictures about the picture that are shown after it; without the key those that the WebUI's "
                       "settings name.",
    }  # fmt: skip
    preset = {"type": "string", "description": "A preset's name; the other keys go before its values."}
    rows = [ENABLED, COMPARE, *(row for row in PARAMETERS if "panel" in row.where)]
    own = {PRESET: preset, "experts": experts, "previews": previews}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Denoiser Fusion",
        "description": 'The one element of alwayson_scripts["Denoiser Fusion"]["args"]; every key is optional.',
        "type": "object",
        "properties": {**own, **{row.key: _schema_of(row) for row in rows}},
        "additionalProperties": False,
    }


def _schema_of(row: Parameter) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": row.help}
    if row.kind == "window":
        number = {"type": "number", "minimum": 0, "maximum": TIMESTEPS}
        schema |= {"type": "array", "items": number, "minItems": 2, "maxItems": 2, "default": list(row.default)}
        return schema
    kinds = {"bool": "boolean", "int": "integer", "float": "number", "choice": "string", "text": "string"}
    schema |= {"type": kinds[row.kind], "default": row.default}
    if row.kind == "choice":
        schema["enum"] = list(row.choices)
    if row.kind in ("int", "float"):
        limits = {"minimum": row.low, "maximum": row.high}
        schema |= {name: limit for name, limit in limits.items() if abs(limit) != float("inf")}
    return schema
