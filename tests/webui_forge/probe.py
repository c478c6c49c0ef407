"""A host extension of the tests alone: tells what is hooked and held, and makes the next sampling fail or stop."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
from typing import Any

import gradio as gr
import torch
from modules import script_callbacks, scripts, sd_models, shared

REPLACEABLE = {"forward", "apply_model"}
armed: dict[str, Any] = {}
#: By name: the backend's own class for a transformer, and arguments of a tiny one, of which it takes those it knows.
TRANSFORMERS = {
    "Flux": ("flux.IntegratedFluxTransformer2DModel", {
        "in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 8, "hidden_size": 16, "mlp_ratio": 2.0,
        "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [2, 2, 4], "theta": 100, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": False}),
    "Z-Image": ("lumina.NextDiT", {
        "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 8, "axes_dims": [2, 2, 4],
        "axes_lens": [8, 8, 8], "z_image_modulation": True}),
    "Qwen": ("qwen.QwenImageTransformer2DModel", {
        "in_channels": 16, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8,
        "axes_dims_rope": (2, 2, 4)}),
}  # fmt: skip
changed = contextlib.ExitStack()
#: Of a patcher, by name of what puts it on: what extensions do inside a U-Net. IP-Adapter and others change what
#: attention gives, Kohya HRFix a block's output, Forge's FreeU a decoder block's input and the skip that it joins.
PATCHES = {
    "attention": ("set_model_attn2_output_patch", lambda n, options: 1.5 * n),
    "replaced attention": ("set_model_replace_all", lambda q, k, v, options: q + 0.5 * v.mean(1, keepdim=True)),
    "encoder": ("set_model_input_block_patch", lambda h, options: 1.2 * h),
    "decoder": ("set_model_output_block_patch", lambda h, skip, options: (1.2 * h, 0.8 * skip)),
}


class Patched(scripts.Script):
    """Puts one of the patches on the U-Net's patcher of a pass, as other extensions do."""

    def title(self) -> str:
        return "Patched"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        return [gr.Textbox(visible=False)]

    def process_before_every_sampling(self, p: Any, name: str, **_: Any) -> None:
        if name:
            unet = p.sd_model.forge_objects.unet.clone()
            method, patch = PATCHES[name]
            getattr(unet, method)(patch, *(("attn2",) if method.endswith("all") else ()))
            p.sd_model.forge_objects.unet = unet


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


def turn(into: str = "") -> dict:
    """Until the next call, makes the loaded model one of another kind: a transformer, or "compiled".

    ``known``: whether this fork has such models.
    """
    changed.close()
    model = sd_models.model_data.sd_model.forge_objects.unet.model
    unet = model.diffusion_model
    if into == "compiled":
        model.diffusion_model = torch.compile(unet)
    elif into:
        name, arguments = TRANSFORMERS[into]
        module, _, kind = name.partition(".")
        try:
            made = getattr(importlib.import_module(f"backend.nn.{module}"), kind)
        except ModuleNotFoundError:
            return {"known": False}
        known = inspect.signature(made).parameters
        model.diffusion_model = made(**{key: value for key, value in arguments.items() if key in known})
    changed.callback(setattr, model, "diffusion_model", unet)
    return {"known": True}


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
    for handler in (state, fusion, arm, turn):
        app.add_api_route(f"/probe/{handler.__name__}", handler, methods=["GET"])


script_callbacks.on_app_started(add_routes)
script_callbacks.on_cfg_denoiser(on_step)
