"""Routes that the extension adds to the host's API."""

from __future__ import annotations

from typing import Any

from lib_fusion.requests.request import write_schema


def add_routes(_demo: Any, app: Any) -> None:
    """``GET /denoiser-fusion/schema``: what the one object in ``args`` may hold. ``app`` is the host's FastAPI."""
    app.add_api_route("/denoiser-fusion/schema", write_schema, methods=["GET"], name="Denoiser Fusion's settings")
