"""The host that the extension runs in: found once, and asked through its adapter.

An adapter is a module with

- ``NAME``: for the log; ``HAS_PLACE``: whether the setting *Where an expert waits* acts;
- ``make_models()``: what stays loaded between requests, with ``sizes``, ``bytes``, ``free``, ``settle``,
  ``shortage``, and ``remedy``, a clause on what helps where memory is short;
- ``register(runtime)``: puts on the host's callbacks that it needs;
- ``prepare(runtime, p, settings, masks)``: called before every sampling, never raises; what it returns is called inside
  the sampler's launch and makes the pass (``sampling/launch.py:SamplingPass``), or raises what is wrong;
- ``training()``: why nothing can be trained in this host, or empty.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def is_forge() -> bool:
    """Whether the host samples with Forge's own backend (Forge, Forge Neo, ersatzForge)."""
    return find_spec("modules_forge") is not None and find_spec("backend") is not None


adapter: Any = import_module(f"lib_fusion.webui.{'forge' if is_forge() else 'a1111'}.adapter")
