"""A host extension of the tests alone: tells what is hooked and loaded, and makes the next sampling fail or stop."""

import hashlib
import inspect
import sys

import torch
from ldm.modules.diffusionmodules.util import GroupNorm32
from modules import devices, script_callbacks, scripts, sd_models, sd_unet, shared

armed = {}
armed_norm = []
counted, counting = [0, 0], []
traced, tracing = [], []


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
        "replaced": sorted(set(model.__dict__) & {"apply_model", "decode_first_stage", "encode_first_stage"})
        + sorted(set(unet.__dict__) & {"forward"}),
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
        "experts": [name for name, _ in runtime.models.experts.sizes()],
        "bytes": sum(size for _, size in runtime.models.experts.sizes()),
        "text_bytes": runtime.models.texts.bytes,
        "told": runtime.describe_memory(),
    }


def weights():
    """The base's parameters as objects: their digest, which of them are an expert's, and layers without their names."""
    from lib_fusion.webui.runtime import runtime

    model = sd_models.model_data.sd_model
    own = [id(p) for p in model.parameters()]
    wearable = runtime.models.experts.loras._worn.values()
    worn = {id(value) for worn in wearable for _, _, value in getattr(worn, "changes", ())}
    layers = getattr(model, "network_layer_mapping", {})
    return {
        "objects": hashlib.sha256(repr(own).encode()).hexdigest(),
        "worn": len(worn & set(own)),
        "unnamed": [name for name, layer in layers.items() if getattr(layer, "network_layer_name", None) is None],
    }


def arm(what: str, step: int = 1):
    """At a step the U-Net raises (``fail``), predicts ``nan`` or ``inf``; or ``interrupt``, ``skip`` as the buttons."""
    armed.update(what=what, step=step)
    return {}


def half(on: bool):
    """As with --upcast-sampling: the U-Net computes in half precision, here bfloat16, which a CPU can.

    The group norms stay in float32, as the host keeps them then where there is CUDA.
    """
    norm = GroupNorm32
    if on:
        armed_norm.append(norm.forward)
        norm.forward = lambda self, x: armed_norm[0](self.float(), x)
    elif armed_norm:
        norm.forward = armed_norm.pop()
    devices.dtype_unet = torch.bfloat16 if on else torch.float32
    devices.unet_needs_upcast = on
    unet = shared.sd_model.model.diffusion_model
    unet.to(devices.dtype_unet)
    unet.dtype = devices.dtype_unet
    return {}


def count(on: bool):
    """Counts the base U-Net's calls and rows while on; when switched off, tells them."""
    if on:
        counted[:] = [0, 0]

        def add(_, args):
            counted[0] += 1
            counted[1] += args[0].shape[0]

        counting.append(shared.sd_model.model.diffusion_model.register_forward_pre_hook(add))
    else:
        while counting:
            counting.pop().remove()
    return counted


def trace(on: bool):
    """Keeps the first picture's latent of each step, as the sampler holds it, and whether the base U-Net ran in it.

    When switched off, tells them: a list of [latent, ran].
    """
    if on:
        traced[:] = []

        def note(_, args):
            traced[-1][1] = True

        counting.append(shared.sd_model.model.diffusion_model.register_forward_pre_hook(note))
        tracing.append(True)
    else:
        tracing.clear()
        while counting:
            counting.pop().remove()
    return [] if on else traced


def encode(text: str, expert: str = ""):
    """A text's states, as a digest: by the host's own conditioner, or by one that is built for an expert."""
    model, before = shared.sd_model, torch.get_rng_state()
    if expert:
        from lib_fusion.webui.a1111 import text_encoders as encoders
        from lib_fusion.webui.models import checkpoints

        model = encoders.build_encoder(checkpoints.find_checkpoint(expert, "expert"), "expert")
        encoders.share_embeddings(model)
    with torch.no_grad(), devices.autocast():
        states = model([text]) if expert else model.get_learned_conditioning([text])
    return {
        "digest": hashlib.sha256(states.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "shape": list(states.shape),
        "random": torch.equal(before, torch.get_rng_state()),
    }


class ProbeScript(scripts.Script):
    """Keeps the comments of the last generation, which the API does not tell."""

    comments = []

    def title(self):
        return "Probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def postprocess(self, p, processed, *args):
        ProbeScript.comments = list(p.comments)


def comments():
    return ProbeScript.comments


class ProbeEngine(sd_unet.SdUnet):
    """A U-Net engine as TensorRT's is one: the host's U-Net is not asked any more."""

    def forward(self, x, timesteps, context, *args, **kwargs):
        return torch.zeros_like(x)


class ProbeEngineOption(sd_unet.SdUnetOption):
    label = "[probe] engine"

    def create_unet(self):
        return ProbeEngine()


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
    if tracing:
        traced.append([params.x[0].flatten().tolist(), False])
    if not armed or params.denoiser.step < armed["step"]:
        return
    what = armed.pop("what")
    armed.clear()
    if what == "interrupt":
        shared.state.interrupt()
    elif what == "skip":
        shared.state.skip()
    elif what in ("nan", "inf"):
        unet = shared.sd_model.model.diffusion_model

        def spoil(_, __, output):
            spoiling.remove()
            output = output.clone()
            output[(-1,) * output.dim()] = float(what)
            return output

        spoiling = unet.register_forward_hook(spoil)
    elif what == "fail":
        unet = shared.sd_model.model.diffusion_model

        def fail(*_):
            handle.remove()
            raise RuntimeError("the probe made the U-Net fail")

        handle = unet.register_forward_pre_hook(fail)


def shrink_controlnet():
    """Lets the ControlNet extension take one for a U-Net of 32 channels; it knows real sizes only."""
    guess = sys.modules.get("scripts.controlnet_model_guess")
    if guess is not None:
        guess.controlnet_default_config["model_channels"] = 32


def add_routes(_, app):
    shrink_controlnet()
    handlers = (state, fusion, weights, arm, half, signatures, count, trace, encode, comments)
    for name, handler in ((handler.__name__, handler) for handler in handlers):
        app.add_api_route(f"/probe/{name}", handler, methods=["GET"])


script_callbacks.on_app_started(add_routes)
script_callbacks.on_cfg_denoiser(on_step)
script_callbacks.on_list_unets(lambda unets: unets.append(ProbeEngineOption()))


def train(values: str):
    """Starts a training as the tab does, from the form's values as JSON; what it is refused with, or nothing.

    Its process is told of the small OpenCLIP models that this one knows.
    """
    import json
    import os
    from unittest import mock

    from lib_fusion.errors import FusionError
    from lib_fusion.webui.training import start as training

    with mock.patch.dict(os.environ, PYTHONPATH=f"{shared.data_path}/tiny-openclip"):
        try:
            training.start(json.loads(values))
        except FusionError as error:
            return {"refused": str(error)}
    return {"refused": ""}


def condition(text: str, width: int, height: int, negative: bool = False, lora: str = "", weight: float = 1.0):
    """What the host's model is told of a prompt, under a LoRA: states (T,D), and of SDXL the vector (V,)."""
    import networks
    from modules.prompt_parser import SdConditioning

    batch = SdConditioning([text], is_negative_prompt=negative, width=width, height=height)
    named = [lora] if lora else []
    networks.load_networks(named, [weight], [weight], [None])
    with torch.no_grad(), devices.autocast():
        found = shared.sd_model.get_learned_conditioning(batch)
    networks.load_networks([])
    if not isinstance(found, dict):
        return {"states": found[0].tolist()}
    return {"states": found["crossattn"][0].tolist(), "vector": found["vector"][0].tolist()}


def add_more_routes(_, app):
    for handler in (train, condition):
        app.add_api_route(f"/probe/{handler.__name__}", handler, methods=["GET"])


script_callbacks.on_app_started(add_more_routes)
