"""Fakes of what the extension uses of the host's ``modules``, with the real signatures.

A live test compares each function's parameters with the real one's (``SIGNATURES``), so that these can't drift.
"""

from __future__ import annotations

import contextlib
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, onchange=None, section=None,
                 refresh=None, comment_before="", comment_after="", infotext=None, restrict_api=False,
                 category_id=None):  # fmt: skip
        self.default, self.label = default, label

    def info(self, info):
        return self


class CompVisTimestepsDenoiser(nn.Module):
    def forward(self, input, timesteps, **kwargs):  # noqa: A002
        return input


class CompVisTimestepsVDenoiser(nn.Module):
    def forward(self, input, timesteps, **kwargs):  # noqa: A002
        return input


class CFGDenoiserTimesteps:
    pass


class SdConditioning(list):
    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None, copy_from=None):
        super().__init__(prompts)
        source = copy_from if copy_from is not None else prompts
        self.is_negative_prompt = is_negative_prompt or getattr(source, "is_negative_prompt", False)
        self.width = width or getattr(source, "width", None)
        self.height = height or getattr(source, "height", None)


def reconstruct_multicond_batch(c, current_step):
    return None, torch.stack([part.states for image in c.batch for part in image])


def reconstruct_cond_batch(c, current_step):
    return torch.stack(c)


def get_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    return list(model.get_learned_conditioning(prompts))


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    return composed(model.get_learned_conditioning(prompts))


def parse_prompts(prompts):
    return prompts, {"lora": ["x"]} if any("<" in prompt for prompt in prompts) else {}


def read_state_dict(checkpoint_file, print_global_state=False, map_location=None):
    raise NotImplementedError


def repair_config(sd_config, state_dict=None):
    raise NotImplementedError


def get_obj_from_str(string, reload=False):
    raise NotImplementedError


def instantiate_from_config(config, state_dict=None):
    raise NotImplementedError


class EmbeddingsWithFixes(nn.Module):
    def __init__(self, wrapped, embeddings, textual_inversion_key="clip_l"):
        super().__init__()


class FrozenCLIPEmbedderWithCustomWords(nn.Module):
    def __init__(self, wrapped, hijack):
        super().__init__()


class FrozenOpenCLIPEmbedderWithCustomWords(nn.Module):
    def __init__(self, wrapped, hijack):
        super().__init__()


class EmbeddingDatabase:
    def register_embedding(self, embedding, model):
        raise NotImplementedError


def find_checkpoint_config(state_dict, info):
    raise NotImplementedError


def find_checkpoint_config_near_filename(info):
    raise NotImplementedError


def guess_model_config_from_state_dict(sd, filename):
    raise NotImplementedError


def sha256(filename, title, use_addnet_hash=False):
    raise NotImplementedError


def is_enabled(sd_model):
    return False


def torch_gc():
    pass


def autocast(disable=False):
    return contextlib.nullcontext()


def report(message, *, exc_info=False):
    pass


#: Functions and classes whose parameters must be those of the real ``modules``.
SIGNATURES: dict[str, Any] = {
    "modules.options:OptionInfo": OptionInfo,
    "modules.sd_samplers_timesteps:CompVisTimestepsDenoiser.forward": CompVisTimestepsDenoiser.forward,
    "modules.sd_samplers_timesteps:CompVisTimestepsVDenoiser.forward": CompVisTimestepsVDenoiser.forward,
    "modules.prompt_parser:SdConditioning": SdConditioning,
    "modules.prompt_parser:reconstruct_multicond_batch": reconstruct_multicond_batch,
    "modules.prompt_parser:reconstruct_cond_batch": reconstruct_cond_batch,
    "modules.prompt_parser:get_learned_conditioning": get_learned_conditioning,
    "modules.prompt_parser:get_multicond_learned_conditioning": get_multicond_learned_conditioning,
    "modules.extra_networks:parse_prompts": parse_prompts,
    "modules.sd_models:read_state_dict": read_state_dict,
    "modules.sd_models:repair_config": repair_config,
    "modules.sd_models:get_obj_from_str": get_obj_from_str,
    "modules.sd_models:instantiate_from_config": instantiate_from_config,
    "modules.sd_hijack:EmbeddingsWithFixes": EmbeddingsWithFixes,
    "modules.sd_hijack_clip:FrozenCLIPEmbedderWithCustomWords": FrozenCLIPEmbedderWithCustomWords,
    "modules.sd_hijack_open_clip:FrozenOpenCLIPEmbedderWithCustomWords": FrozenOpenCLIPEmbedderWithCustomWords,
    "modules.textual_inversion.textual_inversion:EmbeddingDatabase.register_embedding":
        EmbeddingDatabase.register_embedding,
    "modules.sd_models_config:find_checkpoint_config": find_checkpoint_config,
    "modules.sd_models_config:find_checkpoint_config_near_filename": find_checkpoint_config_near_filename,
    "modules.sd_models_config:guess_model_config_from_state_dict": guess_model_config_from_state_dict,
    "modules.hashes:sha256": sha256,
    "modules.lowvram:is_enabled": is_enabled,
    "modules.devices:torch_gc": torch_gc,
    "modules.devices:autocast": autocast,
    "modules.errors:report": report,
}

#: Other names that must exist in the real ``modules``; what they hold is the host's affair.
PRESENT = ("modules.sd_models:checkpoint_aliases", "modules.sd_models:checkpoints_list", "modules.sd_unet:current_unet",
           "modules.sd_hijack:model_hijack.circular_enabled",
           "modules.sd_hijack:model_hijack.embedding_db.skipped_embeddings",
           "modules.sd_hijack:model_hijack.embedding_db.word_embeddings",
           "modules.devices:dtype_unet", "modules.devices:cpu",
           "modules.sd_samplers_timesteps:CFGDenoiserTimesteps", "modules.shared:opts.data",
           "modules.sd_models_xl:get_learned_conditioning", "modules.processing:process_images",
           "modules.processing:get_fixed_seed", "modules.images:save_image", "modules.images:image_grid",
           "modules.images:draw_grid_annotations", "modules.images:GridAnnotation",
           "modules.images:get_font", "modules.shared:cmd_opts.hide_ui_dir_config",
           "modules.shared:cmd_opts.opt_channelslast", "modules.sd_models:model_data.sd_model",
           "modules.paths:paths", "modules.ui_components:DropdownEditable")  # fmt: skip


def composed(states: torch.Tensor, weights: tuple[float, ...] | None = None) -> SimpleNamespace:
    """The host's composed conditioning: each image's parts (one, or with ``weights`` several)."""
    weights = weights or (1.0,)
    parts = [SimpleNamespace(states=s, weight=weights[i % len(weights)]) for i, s in enumerate(states)]
    size = len(weights)
    return SimpleNamespace(batch=[parts[i : i + size] for i in range(0, len(parts), size)])


def install(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Puts the fakes where the extension imports them from, for one test; returns the fake ``shared.opts``."""
    options = SimpleNamespace(data={}, use_old_scheduling=False, pad_cond_uncond_v0=False)
    here = globals()
    contents: dict[str, dict[str, Any]] = {
        "devices": {"device": torch.device("cpu"), "cpu": torch.device("cpu"), "dtype_unet": torch.float32},
        "localization": {"localizations": {}},
        "shared": {"opts": options, "sd_model": None, "OptionInfo": OptionInfo,
                   "state": SimpleNamespace(interrupted=False, skipped=False)},
        "sd_models": {"checkpoint_aliases": {}, "checkpoints_list": {}},
        "sd_unet": {"current_unet": None},
        "sd_hijack": {"model_hijack": SimpleNamespace(circular_enabled=False)},
        "sd_samplers_timesteps": {"CFGDenoiserTimesteps": CFGDenoiserTimesteps},
        "sd_samplers_cfg_denoiser": {}, "sd_hijack_clip": {}, "sd_hijack_open_clip": {}, "textual_inversion": {},
        "textual_inversion.textual_inversion": {},
        "sd_disable_initialization": {}, "sd_models_config": {}, "sd_models_xl": {}, "lowvram": {}, "errors": {},
        "script_callbacks": {}, "hashes": {}, "extra_networks": {}, "prompt_parser": {}, "images": {}, "processing": {},
        "paths": {"models_path": "models"},
    }  # fmt: skip
    for name in SIGNATURES:
        module, _, path = name.removeprefix("modules.").partition(":")
        if module in contents:
            contents[module][path.split(".")[0]] = here[path.split(".")[0]]
    package = types.ModuleType("modules")
    monkeypatch.setitem(sys.modules, "modules", package)
    for name, attributes in contents.items():
        module = types.ModuleType(f"modules.{name}")
        module.__dict__.update(attributes)
        setattr(package, name.rpartition(".")[2], module)
        monkeypatch.setitem(sys.modules, f"modules.{name}", module)
    encoders = types.ModuleType("ldm.modules.encoders.modules")
    encoders.FrozenCLIPEmbedder = encoders.FrozenOpenCLIPEmbedder = None
    for name in ("ldm", "ldm.modules", "ldm.modules.encoders"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, encoders.__name__, encoders)
    omegaconf = types.ModuleType("omegaconf")
    omegaconf.OmegaConf = SimpleNamespace()
    fastapi = types.ModuleType("fastapi")
    fastapi.HTTPException = HTTPError
    monkeypatch.setitem(sys.modules, "omegaconf", omegaconf)
    monkeypatch.setitem(sys.modules, "fastapi", fastapi)
    for name in [name for name in sys.modules if name.startswith("lib_fusion.webui")]:
        monkeypatch.delitem(sys.modules, name)
    return options


class HTTPError(Exception):
    def __init__(self, status_code: int, detail: Any = None) -> None:
        self.status_code, self.detail = status_code, detail
