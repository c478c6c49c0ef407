"""The one owner of what outlives a request: loaded experts, encoded prompts, and the pass that is running."""

from __future__ import annotations

import html
from typing import Any

from modules import devices, sd_models

from lib_fusion.errors import FusionError
from lib_fusion.log import logger
from lib_fusion.webui.models.aggregators import AggregatorCache
from lib_fusion.webui.models.conditioning import TextCache
from lib_fusion.webui.models.experts import ExpertCache
from lib_fusion.webui.models.placement import PLACES, chosen_place, waits_in_ram
from lib_fusion.webui.models.room import shortage
from lib_fusion.webui.sampling.decoding import RoomForVae
from lib_fusion.webui.sampling.hooked_pass import FusionPass


class Runtime:
    def __init__(self) -> None:
        self.experts, self.texts, self.aggregators = ExpertCache(), TextCache(), AggregatorCache()
        self.current: FusionPass | None = None
        self._room: RoomForVae | None = None

    def begin_step(self, params: Any) -> None:
        self._guard("begin_step", params)

    def end_step(self, params: Any) -> None:
        self._guard("end_step", params)

    def keep_room(self, room: RoomForVae | None) -> None:
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
        if self.experts.sizes():
            logger.info("unloaded %s", ", ".join(name for name, _ in self.experts.sizes()))
        self.experts.free()
        self.texts.free()
        self.aggregators.free()
        devices.torch_gc()

    def settle(self) -> None:
        """Moves all that is loaded into RAM, where the settings let it wait there; not while a picture is being made.

        To the GPU nothing is moved before it is used.
        """
        sd_model = sd_models.model_data.sd_model
        if self.current is None and sd_model is not None and waits_in_ram(sd_model):
            for cache in (self.experts, self.texts, self.aggregators):
                cache.settle(devices.cpu)
            devices.torch_gc()

    def close(self) -> None:
        """The UI is reloaded, and this module with it."""
        self.drop_leftovers()
        self.free()

    def describe_memory(self, *checkpoints: str | None) -> str:
        """The loaded experts and their size in memory, as HTML, and whether those that are chosen are too large."""
        sizes = self.experts.sizes()
        total = sum(size for _, size in sizes) + self.texts.bytes
        names = ", ".join(html.escape(name) for name, _ in sizes)
        told = f"Loaded: {names} ({_mib(total)} with text encoders)" if sizes else "No expert is loaded."
        lacking = shortage(checkpoints, self.experts.on_gpu())
        if lacking is None:
            return told
        if chosen_place() == PLACES[2]:
            remedy = "the host's <i>FP8 weight</i> or --medvram spares memory"
        else:
            remedy = f"Settings > Denoiser Fusion > Where an expert waits: <i>{PLACES[2]}</i> needs less"
        need, room = (_mib(int(size)) for size in lacking)
        return f"{told} <b>The chosen experts need {need} of GPU memory, and {room} are free: {remedy}.</b>"

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
