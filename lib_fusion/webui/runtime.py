"""The one owner of what outlives a request: loaded experts, encoded prompts, and the pass that is running."""

from __future__ import annotations

import html
from typing import Any

from lib_fusion.errors import FusionError
from lib_fusion.log import logger
from lib_fusion.webui.host import adapter
from lib_fusion.webui.words import translate


class Runtime:
    """``models``: what the host keeps loaded; ``current``: the running pass."""

    def __init__(self) -> None:
        self.models = adapter.make_models()
        self.current: Any = None
        self._room: Any = None

    def begin_step(self, params: Any) -> None:
        self._guard("begin_step", params)

    def end_step(self, params: Any) -> None:
        self._guard("end_step", params)

    def keep_room(self, room: Any) -> None:
        """From a pass to the next, or to the end of the generation, the VAE may have the experts' memory."""
        if self._room is not None:
            self._room.remove()
        self._room = room

    def drop_leftovers(self) -> None:
        """The backstop: takes off a pass that has not ended by itself. One that still runs ends with an error."""
        self.keep_room(None)
        fusion, self.current = self.current, None
        if fusion is not None:
            logger.warning("a sampling pass had not ended by itself; it was taken off")
            fusion.fail(FusionError("Denoiser Fusion was taken off while the picture was being made"))
            fusion.detach()

    def free(self) -> None:
        """Forgets all that is loaded; what a running pass uses goes with its end."""
        if self.models.sizes():
            logger.info("unloaded %s", ", ".join(name for name, _ in self.models.sizes()))
        self.models.free()

    def settle(self) -> None:
        """Moves what is loaded to where the settings let it wait; not while a picture is being made."""
        if self.current is None:
            self.models.settle()

    def close(self) -> None:
        """The UI is reloaded, and this module with it."""
        self.drop_leftovers()
        self.free()

    def describe_memory(self, *checkpoints: str | None) -> str:
        """The loaded experts and their size in memory, as HTML, and whether those that are chosen are too large."""
        sizes = self.models.sizes()
        names = ", ".join(html.escape(name) for name, _ in sizes)
        told = translate("No expert is loaded.")
        if sizes:
            told = translate(f"Loaded: {names} ({_mib(self.models.bytes)} with text encoders)")
        lacking = self.models.shortage(checkpoints)
        if lacking is None:
            return told
        need, room, remedy = lacking
        needs = translate(f"The chosen experts need {_mib(int(need))} of GPU memory, and {_mib(int(room))} are free")
        return f"{told} <b>{needs}: {translate(remedy)}.</b>"

    def _guard(self, step: str, params: Any) -> None:
        """Calls the running pass. The host swallows what a callback raises, so the pass raises it where it is heard."""
        fusion = self.current
        if fusion is None:
            return
        try:
            getattr(fusion, step)(params)
        except Exception as error:
            logger.debug("%s failed; the pass's next model call raises it", step, exc_info=True)
            fusion.fail(error)


def _mib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


runtime = Runtime()
