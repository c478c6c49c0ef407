"""LoRAs of one expert alone: those that its own prompt names, loaded by the host's code, and kept.

How they act, on layers that the expert shares with the base: ``worn.py``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from modules import devices, sd_hijack, shared
from safetensors import safe_open
from torch import nn

from lib_fusion.errors import SettingError
from lib_fusion.log import logger
from lib_fusion.requests.settings import PLACES, ExpertSettings
from lib_fusion.webui.a1111.placement import chosen_place
from lib_fusion.webui.a1111.worn import NAME, MergedAtEachCall, Wearable, Worn, merge_all, restore, touched
from lib_fusion.webui.models.lora_files import LoraCall, file_of, find, find_loras, host

#: How much of a GPU's free memory merged layers may take; for more they are merged at each call.
SHARE = 0.5
#: Names of the host's layers of the U-Net begin with this; all others are the text encoders'.
UNET = "diffusion_model_"


def acting_calls() -> tuple[LoraCall, ...]:
    """The LoRAs that the host has switched on for the picture."""
    networks = host()
    return () if networks is None else tuple(
        LoraCall(n.name, n.te_multiplier, n.unet_multiplier, n.dyn_dim, *file_of(n.network_on_disk))
        for n in networks.loaded_networks
    )  # fmt: skip


def loras_of(expert: ExpertSettings, field: str) -> tuple[LoraCall, ...]:
    """All LoRAs that act on an expert: the picture's where that is asked for, then its own; raises SettingError."""
    own = find_loras(expert.prompt, f"{field}.prompt")[1]
    named = [call.name for call in own]
    return (*(call for call in (acting_calls() if expert.loras else ()) if call.name not in named), *own)


class Networks:
    """The host's LoRA objects for experts. Its own are shared by name and hold one weight, so each call has a copy."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, tuple[int, int]], Any] = {}
        self._of: Any = None

    def get(self, call: LoraCall, sd_model: nn.Module, field: str) -> Any:
        """Raises SettingError where the file can't be read, or is for another kind of model."""
        networks = host()
        if self._of is not sd_model.network_layer_mapping:  # they hold its layers
            self._loaded, self._of = {}, sd_model.network_layer_mapping
        acting = (n for n in networks.loaded_networks if (n.name, n.network_on_disk.filename) == (call.name, call.file))
        loaded = next(acting, None) or self._load(call, field)
        net = copy.copy(loaded)
        net.te_multiplier, net.unet_multiplier, net.dyn_dim = call.te, call.unet, call.dyn
        net.mentioned_name = call.name
        net.modules = {name: copy.copy(module) for name, module in loaded.modules.items()}
        for module in net.modules.values():
            module.network = net
        return net

    def keep_only(self, calls: Iterable[LoraCall]) -> None:
        """Forgets all but these."""
        wanted = {(call.file, call.changed) for call in calls}
        self._loaded = {key: net for key, net in self._loaded.items() if key in wanted}

    def free(self) -> None:
        self._loaded, self._of = {}, None

    def _load(self, call: LoraCall, field: str) -> Any:
        key = (call.file, call.changed)
        if key not in self._loaded:
            try:
                with safe_open(call.file, "pt") as file:
                    layers = {name.partition(".")[0] for name in file.keys()} - {"bundle_emb"}  # noqa: SIM118
                net = host().load_network(call.name, find(call.name, field))
            except SettingError:
                raise
            except Exception as error:
                raise SettingError(field, call.name, f"this LoRA can't be read ({error})") from error
            # Some names are the same in all kinds of models, and the host would use these few.
            if 2 * len(net.modules) < len(layers) or not (layers or net.bundle_embeddings):
                problem = f"only {len(net.modules)} of the {len(layers)} layers that it is for are in this base"
                raise SettingError(field, call.name, f"{problem}; allowed: a LoRA for the base's kind of model")
            self._loaded[key] = net
        return self._loaded[key]


@contextmanager
def with_embeddings(nets: Iterable[Any]) -> Iterator[None]:
    """Within, the host knows the textual inversions that these LoRAs bring with them, and no other LoRA's."""
    known = sd_hijack.model_hijack.embedding_db
    theirs = [e for net in nets for e in net.bundle_embeddings.values()]
    loaded = [e for net in host().loaded_networks for e in net.bundle_embeddings.values() if e.loaded]
    away = [e for e in loaded if e.name not in [own.name for own in theirs]]
    brought = [e for e in theirs if e.name not in known.word_embeddings and known.expected_shape in (-1, e.shape)]
    for embedding in away:
        known.register_embedding_by_name(None, shared.sd_model, embedding.name)
    for embedding in brought:
        known.register_embedding(embedding, shared.sd_model)
    try:
        yield
    finally:
        for embedding in brought:
            known.register_embedding_by_name(None, shared.sd_model, embedding.name)
        for embedding in away:
            known.register_embedding(embedding, shared.sd_model)


class LoraCache:
    """The LoRAs of experts, and what those on the base's own weights wear, by their LoRAs and the picture's."""

    def __init__(self) -> None:
        self.networks = Networks()
        self._worn: dict[Any, Wearable] = {}
        self._of: Any = None

    def acquire(self, wanted: Sequence[tuple[tuple[LoraCall, ...], str]], sd_model: nn.Module) -> list[Wearable | None]:
        """For each expert, by the LoRAs that act on it and the field that names them, what it wears; None: nothing.

        Raises SettingError. What no expert of this pass wears is forgotten.
        """
        base = acting_calls()
        of = (weakref.ref(sd_model), sd_model.sd_checkpoint_info.filename, str(devices.dtype_unet), devices.fp8)
        if self._of != of:
            self._worn.clear()
            self._of = of
        functional = bool(shared.opts.data.get("lora_functional", False))
        how = (functional, chosen_place() == PLACES[2])
        keys = [None if calls == base else (calls, base, how) for calls, _ in wanted]
        self._worn = {key: worn for key, worn in self._worn.items() if key in keys}
        for key, (calls, name) in zip(keys, wanted):
            if key is not None and key not in self._worn:
                self._worn[key] = self._make_for_unet(calls, sd_model, name)
        if functional and any(keys):
            restore(sd_model)
        return [None if key is None else self._worn[key] for key in keys]

    def nets(self, calls: Iterable[LoraCall], sd_model: nn.Module, field: str) -> list[Any]:
        """The host's objects for these LoRAs; raises SettingError."""
        return [self.networks.get(call, sd_model, field) for call in calls]

    def for_text(self, calls: Sequence[LoraCall], sd_model: nn.Module, field: str) -> Worn:
        """What the base's own text encoder wears under these LoRAs."""
        encoder = sd_model.conditioner if hasattr(sd_model, "conditioner") else sd_model.cond_stage_model
        layers = {module.network_layer_name: module for module in encoder.modules() if hasattr(module, NAME)}
        nets = self.nets(calls, sd_model, field)
        acting = touched([*host().loaded_networks, *nets], layers)
        if not shared.opts.data.get("lora_functional", False):
            return Worn(merge_all(acting, nets, field), list(acting.values()))
        pieces = {name: layer for name, layer in acting.items() if isinstance(layer, nn.MultiheadAttention)}
        return Worn(merge_all(pieces, nets, field), list(pieces.values()), nets)  # these the host merges even so

    @property
    def bytes(self) -> int:
        return sum(worn.bytes for worn in list(self._worn.values()))

    def settle(self, device: torch.device) -> None:
        """Moves what is kept to where it waits."""
        for worn in self._worn.values():
            worn.to(device)

    def free(self) -> None:
        self._worn.clear()
        self.networks.free()
        self._of = None

    def _make_for_unet(self, calls: Sequence[LoraCall], sd_model: nn.Module, field: str) -> Wearable:
        nets = self.nets(calls, sd_model, field)
        layers = {name: layer for name, layer in sd_model.network_layer_mapping.items() if name.startswith(UNET)}
        acting = touched([*host().loaded_networks, *nets], layers)
        if shared.opts.data.get("lora_functional", False):
            merge_all(acting, nets, field, keep=False)  # to refuse what does not fit
            return Worn([], [], nets)
        size = sum(p.numel() * p.element_size() for layer in acting.values() for p in layer.parameters())
        if chosen_place() == PLACES[2] or size > SHARE * free_memory():
            merge_all(acting, nets, field, keep=False)
            logger.info("%s: %d layers (%.1f MiB) are merged at each call", field, len(acting), size / 2**20)
            return MergedAtEachCall(acting, nets, field)
        worn = Worn(merge_all(acting, nets, field), list(acting.values()))
        logger.info("%s: %d layers merged, %.1f MiB", field, len(acting), worn.bytes / 2**20)
        return worn


def free_memory() -> float:
    """Bytes that the GPU has left, with what torch has reserved and not in use; without a GPU, no limit."""
    if devices.device.type != "cuda":
        return float("inf")
    idle = torch.cuda.memory_reserved(devices.device) - torch.cuda.memory_allocated(devices.device)
    return torch.cuda.mem_get_info(devices.device)[0] + idle
