"""The noise levels of a pass, and whether its sampler adds noise: read from the host's sampling function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any


def levels_of(arguments: Mapping[str, Any], steps: int) -> list[float]:
    """The noise levels of a pass, from the arguments of the host's sampling function: its sigmas, or its timesteps.

    Timesteps are ascending there, and the pass ends at the first. DPM fast and adaptive have neither: they go from one
    sigma to another, in steps that are even in the logarithm.
    """
    sigmas = arguments.get("sigmas", arguments.get("sigma_sched"))
    if sigmas is not None:
        return sigmas.tolist()
    if "timesteps" in arguments:
        return arguments["timesteps"].flip(0).tolist()
    first, last = (math.log(float(arguments[f"sigma_{end}"])) for end in ("max", "min"))
    return [math.exp(first + (last - first) * i / steps) for i in range(steps + 1)]


def adds_noise(function: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    """Whether the host's sampling function adds noise in its steps, by its own parameters and these arguments of it.

    Those that do have ``eta``, the amount, or at least a ``noise_sampler`` (LCM); others may churn.
    """
    parameters = inspect.signature(function).parameters
    if "eta" in parameters:
        return arguments.get("eta", parameters["eta"].default) > 0 or bool(arguments.get("s_churn", 0))
    return "noise_sampler" in parameters or bool(arguments.get("s_churn", 0))
