"""A host extension of the tests alone: tells what is hooked and held, and makes the next sampling fail or stop."""

from __future__ import annotations

import hashlib
from typing import Any

from modules import script_callbacks, sd_models, shared

REPLACEABLE = {"forward", "apply_model"}
armed: dict[str, Any] = {}


def state() -> dict:
    """What must be as before after any generation."""
    objects = sd_models.model_data.sd_model.forge_objects
    patcher, model = objects.unet, objects.unet.model
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    options = dict(patcher.model_options)
    # Neo itself keeps the last pass's noise levels there.
    options["transformer_options"] = options.get("transformer_options", {}).keys() - {"sampling_sigmas"}
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "hooks": sum(len(getattr(module, table)) for module in model.modules() for table in tables),
        "replaced": sorted(name for module in model.modules() for name in REPLACEABLE & set(vars(module))),
        "options": sorted(key for key, value in options.items() if value),
        "extra": len(patcher.extra_model_patchers_during_sampling),
        "digest": digest.hexdigest(),
        "callbacks": {name: len(found) for name, found in script_callbacks.callback_map.items()},
    }


def fusion() -> dict:
    """What the extension holds."""
    from lib_fusion.webui.runtime import runtime

    sizes = runtime.models.sizes()
    return {"running": runtime.current is not None, "experts": [name for name, _ in sizes],
            "bytes": sum(size for _, size in sizes), "told": runtime.describe_memory()}  # fmt: skip


def arm(what: str, step: int = 1) -> dict:
    """At a step the U-Net raises (``fail``); or ``interrupt``, ``skip`` as the buttons."""
    armed.update(what=what, step=step)
    return {}


def on_step(params: Any) -> None:
    if not armed or params.sampling_step < armed["step"]:
        return
    what = armed["what"]
    armed.clear()
    if what == "interrupt":
        shared.state.interrupt()
    elif what == "skip":
        shared.state.skip()
    elif what == "fail":
        unet = shared.sd_model.forge_objects.unet.model.diffusion_model

        def fail(*_: object) -> None:
            handle.remove()
            raise RuntimeError("the probe made the U-Net fail")

        handle = unet.register_forward_pre_hook(fail)


def add_routes(_: Any, app: Any) -> None:
    for handler in (state, fusion, arm):
        app.add_api_route(f"/probe/{handler.__name__}", handler, methods=["GET"])


script_callbacks.on_app_started(add_routes)
script_callbacks.on_cfg_denoiser(on_step)
