"""How a request is refused so that everybody hears it."""

from __future__ import annotations

from fastapi import HTTPException

from lib_fusion.errors import FusionError, one_line


class RequestRefusedError(FusionError, HTTPException):
    """Ends a generation with one sentence: the API answers 422 with it, the panel shows it under the gallery.

    As an HTTPException it is the caller's fault to the host, which then prints no traceback for API requests.
    """

    def __init__(self, message: str, status_code: int = 422) -> None:
        HTTPException.__init__(self, status_code=status_code, detail=one_line(message))
        self.args = (self.detail,)

    def __str__(self) -> str:
        return str(self.detail)
