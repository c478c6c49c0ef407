"""WebUIs with Forge's backend as a host: what the rooms that know no host ask of it (``webui/host.py``)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from lib_fusion.errors import SettingError
from lib_fusion.requests.settings import FusionSettings
from lib_fusion.unet.model_file import LoraFile
from lib_fusion.webui.forge.engines import Engines, Expert, check_base, kind_of, loras_of_picture
from lib_fusion.webui.forge.fusion_pass import FusionPass, check_guidance
from lib_fusion.webui.forge.texts import Texts
from lib_fusion.webui.models.aggregators import AfaBase, AfaModel, AggregatorCache
from lib_fusion.webui.models.masks import Masks, places_of
from lib_fusion.webui.sampling.launch import SamplingPass, check_parts, check_passes, weights_of

NAME = "Forge"
#: Where an expert waits is the host's affair.
HAS_PLACE = False


class Models:
    """What this host keeps loaded for experts between requests; ``remedy``: what helps where memory is short."""

    remedy = "fewer experts or a smaller picture needs less, and so does Diffusion in Low Bits where the WebUI has it"

    def __init__(self) -> None:
        self.experts, self.texts, self.aggregators = Engines(), Texts(), AggregatorCache()

    def sizes(self) -> list[tuple[str, int]]:
        """(name, bytes) of the loaded experts."""
        return self.experts.sizes()

    @property
    def bytes(self) -> int:
        """The size of all, with the text encoders."""
        return self.experts.bytes

    def free(self) -> None:
        """Forgets all; what a running pass uses goes with its end."""
        self.texts.free()
        self.aggregators.free()
        self.experts.free()

    def settle(self) -> None:
        """The host's memory manager moves models."""

    def shortage(self, checkpoints: Collection[str | None]) -> None:
        """The host's memory manager makes do with any memory."""
        return


make_models = Models


def register(runtime: Any) -> None:
    """The pass needs no callbacks of the host."""


def prepare(runtime: Any, p: Any, settings: FusionSettings, masks: Masks) -> Callable[[], SamplingPass]:
    """Makes the pass at once, since the host loads models before the sampler's launch; there errors are raised."""
    try:
        fusion = make_pass(runtime.models, p, settings, masks)
    except Exception as found:
        error = found

        def fail() -> SamplingPass:
            raise error

        return fail
    return lambda: fusion


def make_pass(models: Models, p: Any, settings: FusionSettings, masks: Masks) -> FusionPass:
    """Checks, loads and encodes what a pass needs; raises SettingError or CheckpointError."""
    check_passes(p, settings)
    check_refiner(p)
    is_afa = settings.method == "AFA" and bool(settings.experts)
    check_base(p.sd_model, is_afa or settings.freeu != "Off")
    experts = models.experts.acquire(settings.experts, p.sd_model, is_afa)
    cond = p.hr_c if getattr(p, "is_hr_pass", False) else p.c
    conditionings = []
    for i, (expert, setting) in enumerate(zip(experts, settings.experts)):
        found = models.texts.encode(p, expert, setting, f"experts[{i}]", p.sd_model)
        if found is not None:
            check_parts(weights_of(cond), weights_of(found.cond), setting.prompt, f"experts[{i}]")
        conditionings.append(found)
    aggregators = choose_aggregators(models, p, settings, experts) if is_afa else None
    fusion = FusionPass(settings, p, experts, conditionings, places_of(p, settings, masks), aggregators)
    check_guidance(fusion.session, p)
    patchers = [expert.patcher for expert in experts if not expert.is_base]
    fusion.take_place(list({id(patcher): patcher for patcher in patchers}.values()))
    return fusion


def choose_aggregators(models: Models, p: Any, settings: FusionSettings, experts: list[Expert]) -> torch.nn.Module:
    """AFA's aggregators on the U-Net's device; raises SettingError."""
    unet = p.sd_model.forge_objects.unet
    base = AfaBase(unet.model.diffusion_model, kind_of(p.sd_model).prediction, unet.model.computation_dtype)
    acting = [(p.sd_model.sd_checkpoint_info, loras_of_picture(p.sd_model)), *((e.info, e.loras) for e in experts)]
    given = [AfaModel(info.filename, tuple(LoraFile(Path(lora.file), lora.unet) for lora in loras))
             for info, loras in acting]  # fmt: skip
    return models.aggregators.choose(settings, base, given, unet.load_device)


def check_refiner(p: Any) -> None:
    """Refuses a refiner, which the host loads in the middle of a pass; raises SettingError."""
    info = getattr(p, "refiner_checkpoint_info", None)
    if info is not None and p.refiner_switch_at and info != p.sd_model.sd_checkpoint_info:
        problem = "allowed with Denoiser Fusion in this WebUI: none, since it replaces the base in the middle of a pass"
        raise SettingError("refiner", info.name_for_extra, problem)


def training() -> str:
    """Why nothing can be trained here; empty where it can."""
    return "Nothing can be trained in this WebUI yet: train on the command line, or in AUTOMATIC1111's WebUI."
