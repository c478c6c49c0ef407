"""A host extension of the tests alone: tells what is hooked and loaded, and makes the next sampling fail or stop."""

import hashlib
import inspect

from modules import script_callbacks, sd_models, shared

armed = {}


def state():
    """What must be as before after any generation."""
    model = sd_models.model_data.sd_model
    unet = model.model.diffusion_model
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    callbacks = {name: len(found) for name, found in script_callbacks.callback_map.items()}
    hooks = sum(
        len(getattr(module, table))
        for module in model.modules()
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )
    return {
        "hooks": hooks,
        "replaced": sorted(set(model.__dict__) & {"apply_model"}) + sorted(set(unet.__dict__) & {"forward"}),
        "checkpoint": model.sd_checkpoint_info.name,
        "unet": [type(unet).__module__, type(unet).__name__],
        "digest": digest.hexdigest(),
        "callbacks": callbacks,
        "modules": sum(1 for _ in model.modules()),
    }


def fusion():
    """What the extension holds."""
    from lib_fusion.webui.runtime import runtime

    return {
        "running": runtime.current is not None,
        "experts": [name for name, _ in runtime.experts.sizes()],
        "bytes": sum(size for _, size in runtime.experts.sizes()),
        "text_bytes": runtime.texts.bytes,
        "told": runtime.describe_memory(),
    }


def arm(what: str, step: int = 1):
    """``fail``: the U-Net raises at a step; ``interrupt``, ``skip``: as the buttons do."""
    armed.update(what=what, step=step)
    return {}


def signatures(names: str):
    """Signatures of things in ``modules``, as ``module:attribute.attribute``, comma-separated."""
    import importlib

    result = {}
    for name in names.split(","):
        module, _, path = name.partition(":")
        try:
            found = importlib.import_module(module)
            for part in filter(None, path.split(".")):
                found = getattr(found, part)
            result[name] = str(inspect.signature(found)) if callable(found) else type(found).__name__
        except (AttributeError, ImportError, ValueError) as error:
            result[name] = f"missing: {error}"
    return result


def on_step(params):
    if not armed or params.denoiser.step < armed["step"]:
        return
    what = armed.pop("what")
    armed.clear()
    if what == "interrupt":
        shared.state.interrupt()
    elif what == "skip":
        shared.state.skip()
    elif what == "fail":
        unet = shared.sd_model.model.diffusion_model

        def fail(*_):
            handle.remove()
            raise RuntimeError("the probe made the U-Net fail")

        handle = unet.register_forward_pre_hook(fail)


def add_routes(_, app):
    for name, handler in {"state": state, "fusion": fusion, "arm": arm, "signatures": signatures}.items():
        app.add_api_route(f"/probe/{name}", handler, methods=["GET"])


script_callbacks.on_app_started(add_routes)
script_callbacks.on_cfg_denoiser(on_step)
