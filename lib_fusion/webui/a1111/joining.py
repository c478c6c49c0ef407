"""AFA in the host: one pass's models in lockstep, on the host's own U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules import devices
from torch import nn

from lib_fusion.fusion.lockstep import Lockstep
from lib_fusion.requests.settings import FusionSettings
from lib_fusion.unet.model_file import LoraFile
from lib_fusion.webui.a1111.loras import acting_calls
from lib_fusion.webui.a1111.placement import holder
from lib_fusion.webui.models.aggregators import AfaBase, AfaModel, AggregatorCache


def make_lockstep(
    cache: AggregatorCache, settings: FusionSettings, sd_model: nn.Module, experts: Sequence[Any]
) -> Lockstep:
    """The pass's models in lockstep, with trained aggregators or a control; raises SettingError."""
    unet = sd_model.model.diffusion_model
    base = AfaBase(unet, "v" if sd_model.parameterization == "v" else "epsilon", devices.dtype_unet)
    acting = [(sd_model.sd_checkpoint_info, acting_calls()), *((expert.info, expert.loras) for expert in experts)]
    models = [AfaModel(info.filename, tuple(LoraFile(Path(c.file), c.unet) for c in calls if c.dyn is None))
              for info, calls in acting]  # fmt: skip
    aggregators = cache.choose(settings, base, models, devices.device)
    held = holder(expert.unet for expert in experts if expert.unet is not None)
    return Lockstep(unet, [expert.unet or unet for expert in experts], aggregators, held=held,
                    wearing=[expert.wearing for expert in experts])  # fmt: skip
