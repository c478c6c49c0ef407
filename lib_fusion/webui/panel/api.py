"""Routes that the extension adds to the host's API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lib_fusion.errors import FusionError
from lib_fusion.requests.request import write_schema
from lib_fusion.webui.models import aggregators
from lib_fusion.webui.options import all_presets


def list_presets() -> dict[str, dict[str, Any]]:
    """The values of each preset, or the ``error`` in it, by its name: the shipped ones, the best first, then others."""
    store = all_presets()
    return {name: or_error(lambda name=name: store.get(name)) for name in store.names()}


def list_aggregators() -> list[dict[str, Any]]:
    """Each aggregator file: its ``name``, the ``models`` that it is for, the base first, or the ``error`` in it."""
    names = aggregators.list_aggregators()
    return [{"name": name, **or_error(lambda name=name: describe(name))} for name in names]


def describe(name: str) -> dict[str, Any]:
    card = aggregators.card_of(name)
    return {"models": [model.name for model in card.models], "architecture": card.architecture}


def or_error(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``read`` gives, or why it gives nothing."""
    try:
        return read()
    except FusionError as error:
        return {"error": str(error)}


def add_routes(_demo: Any, app: Any) -> None:
    """``GET /denoiser-fusion/schema``: what the one object in ``args`` may hold; and ``presets``, ``aggregators``.

    ``app`` is the host's FastAPI, whose documentation shows the schema as the first one's example.
    """
    shown = {200: {"description": "A JSON schema", "content": {"application/json": {"example": write_schema()}}}}
    get = {"methods": ["GET"], "tags": ["Denoiser Fusion"]}
    app.add_api_route("/denoiser-fusion/schema", write_schema, name="Settings", responses=shown, **get)
    app.add_api_route("/denoiser-fusion/presets", list_presets, name="Presets", **get)
    app.add_api_route("/denoiser-fusion/aggregators", list_aggregators, name="Aggregators", **get)
