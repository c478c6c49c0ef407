"""What this host keeps loaded for experts between requests: U-Nets, text encoders and conditionings, aggregators."""

from __future__ import annotations

from collections.abc import Collection

from modules import devices, sd_models

from lib_fusion.requests.settings import PLACES
from lib_fusion.webui.a1111.conditioning import TextCache
from lib_fusion.webui.a1111.experts import ExpertCache
from lib_fusion.webui.a1111.placement import chosen_place, waits_in_ram
from lib_fusion.webui.a1111.room import shortage
from lib_fusion.webui.models.aggregators import AggregatorCache


class Models:
    """``remedy``: what helps where memory is short."""

    remedy = "Settings > Denoiser Fusion lets experts wait in RAM"

    def __init__(self) -> None:
        self.experts, self.texts, self.aggregators = ExpertCache(), TextCache(), AggregatorCache()

    def sizes(self) -> list[tuple[str, int]]:
        """(name, bytes) of the loaded experts."""
        return self.experts.sizes()

    @property
    def bytes(self) -> int:
        """The size of all, with the text encoders."""
        return sum(size for _, size in self.sizes()) + self.texts.bytes

    def free(self) -> None:
        """Forgets all; what a running pass uses goes with its end."""
        for cache in (self.experts, self.texts, self.aggregators):
            cache.free()
        devices.torch_gc()

    def settle(self) -> None:
        """Moves all into RAM, where the settings let it wait there. To the GPU nothing is moved before it is used."""
        sd_model = sd_models.model_data.sd_model
        if sd_model is not None and waits_in_ram(sd_model):
            for cache in (self.experts, self.texts, self.aggregators):
                cache.settle(devices.cpu)
            devices.torch_gc()

    def shortage(self, checkpoints: Collection[str | None]) -> tuple[float, float, str] | None:
        """(bytes that these experts need, bytes there are, the remedy) where that is too little, else None."""
        lacking = shortage(checkpoints, self.experts.on_gpu())
        if lacking is None:
            return None
        if chosen_place() == PLACES[2]:
            return (*lacking, "the host's <i>FP8 weight</i> or --medvram spares memory")
        where = "Settings > Denoiser Fusion > Where an expert waits"
        return (*lacking, f"{where}: <i>{PLACES[2]}</i> needs less")
