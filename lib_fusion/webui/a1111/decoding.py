"""Memory for the VAE between a pass and the next: where it has too little, the experts on the device give theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lib_fusion.errors import is_out_of_memory, release
from lib_fusion.log import logger

#: The methods of the host's model by which its VAE turns latents into pictures, and pictures into latents.
METHODS = ("decode_first_stage", "encode_first_stage")
MADE_ROOM = ("Denoiser Fusion: the VAE ran out of memory, so the experts were unloaded and it was tried again; "
             "Settings > Denoiser Fusion > Where an expert waits keeps them in RAM")  # fmt: skip


class RoomForVae:
    """On a model instance: the VAE runs again without the experts where it runs out of memory with them.

    ``free`` unloads them, ``tell`` reports it. Comes off at ``remove``, and by itself once it has acted.
    """

    def __init__(self, sd_model: Any, free: Callable[[], None], tell: Callable[[str], None]) -> None:
        self._sd_model, self._free, self._tell = sd_model, free, tell
        self._put: dict[str, Callable[..., Any]] = {}
        for name in METHODS:
            if name not in sd_model.__dict__ and hasattr(sd_model, name):  # else another extension has its own way
                self._put[name] = self._wrap(getattr(sd_model, name))
                setattr(sd_model, name, self._put[name])

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except Exception as error:
                self.remove()
                if not is_out_of_memory(error):
                    raise
                release(error)
            self._free()  # not while the error is handled, which holds what the VAE had computed
            logger.warning(MADE_ROOM)
            self._tell(MADE_ROOM)
            return original(*args, **kwargs)

        return run

    def remove(self) -> None:
        """Takes it off; may be called again. What another extension has put over it stays, and calls it in vain."""
        for name, ours in self._put.items():
            if self._sd_model.__dict__.get(name) is ours:
                delattr(self._sd_model, name)
        self._put = {}
