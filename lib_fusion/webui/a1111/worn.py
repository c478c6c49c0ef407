"""LoRAs on one model of a fusion alone: layers that it shares with the base wear other parameters during its calls.

Nothing of the host's is written to. A layer that a LoRA touches gets, for the expert's calls, other parameters, which
the host's own code has merged before on a stand-in for the layer. So every kind of LoRA that the host knows acts bit
for bit as in the host, and whatever else acts on the base's U-Net (ControlNet, token merging, low memory) acts on the
expert, too. Where the host adds LoRAs to outputs instead (its setting ``lora_functional``), its list is exchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from modules import devices
from torch import nn

from lib_fusion.errors import SettingError
from lib_fusion.fusion.hooks import Hooks
from lib_fusion.webui.models.lora_files import host

#: The layers that the host puts LoRAs on.
KINDS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)
#: What LoRAs of attention in one piece (nn.MultiheadAttention) are named after the layer.
PARTS = ("_q_proj", "_k_proj", "_v_proj", "_out_proj")
NAME = "network_layer_name"
CURRENT, WEIGHTS, BIAS = "network_current_names", "network_weights_backup", "network_bias_backup"

#: (module, a parameter's name, its value) of a layer under LoRAs.
Change = tuple[nn.Module, str, "torch.Tensor | None"]


class Wearable(Protocol):
    """What layers of the host's have during an expert's calls."""

    bytes: int

    def on(self, part: nn.Module | None = None) -> AbstractContextManager[None]:
        """Within, the layers (or only those in ``part``) have it."""

    def to(self, device: torch.device) -> None:
        """Moves what is kept."""


def touched(nets: Iterable[Any], layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers, by the host's names, whose parameters these LoRAs change."""
    result = {}
    for net in nets:
        for name in net.modules:
            wholes = [whole for part in PARTS if (whole := name.removesuffix(part)) != name]
            whole = next((w for w in wholes if isinstance(layers.get(w), nn.MultiheadAttention)), name)
            if isinstance(layers.get(whole), KINDS):
                result[whole] = layers[whole]
    return result


@contextmanager
def listed(nets: Sequence[Any]) -> Iterator[None]:
    """Within, the host's list of LoRAs is this one."""
    networks = host()
    before = list(networks.loaded_networks)
    networks.loaded_networks[:] = nets
    try:
        yield
    finally:
        networks.loaded_networks[:] = before


@contextmanager
def heard(field: str) -> Iterator[None]:
    """Raises SettingError where the host could not merge a layer within: it counts such errors and continues."""
    errors = host().extra_network_lora.errors
    before = dict(errors)
    errors.clear()
    try:
        yield
        if errors:
            name, count = next(iter(errors.items()))
            problem = f"{count} of its layers do not fit the base, or the memory"
            raise SettingError(field, name, f"{problem}; allowed: a LoRA for the base's kind of model")
    finally:
        errors.clear()
        errors.update(before)


def pristine(layer: nn.Module) -> tuple[Any, Any]:
    """A layer's weight (of attention in one piece, both weights) and bias without any LoRA, wherever the host has them.

    It merges into its layers at their next call, and keeps what they were.
    """
    if getattr(layer, CURRENT, ()) and getattr(layer, WEIGHTS, None) is not None:
        return getattr(layer, WEIGHTS), getattr(layer, BIAS, None)
    if isinstance(layer, nn.MultiheadAttention):
        return (layer.in_proj_weight, layer.out_proj.weight), layer.out_proj.bias
    return layer.weight, layer.bias


def stand_in(module: nn.Module, **values: torch.Tensor | None) -> nn.Module:
    """A shallow copy of a layer with copies of these values as its parameters, in the layer's own precision."""
    shell = copy.copy(module)
    shell.__dict__["_modules"], own = dict(module._modules), dict(module._parameters)
    for key, value in values.items():
        if value is None:
            own[key] = None
            continue
        dtype = value.dtype if own[key] is None else own[key].dtype
        made = torch.empty_like(value, dtype=dtype, device=devices.device).copy_(value)
        own[key] = nn.Parameter(made, requires_grad=False)
    shell.__dict__["_parameters"] = own
    return shell


def merge(layer: nn.Module, name: str, nets: Sequence[Any]) -> list[Change]:
    """A layer's parameters under these LoRAs, by the host's own code on a stand-in. Its list must be these LoRAs."""
    weight, bias = pristine(layer)
    if isinstance(layer, nn.MultiheadAttention):
        shell = stand_in(layer, in_proj_weight=weight[0])
        shell._modules["out_proj"] = stand_in(layer.out_proj, weight=weight[1], bias=bias)
        wanted = [(layer, shell, "in_proj_weight"), (layer.out_proj, shell.out_proj, "weight"),
                  (layer.out_proj, shell.out_proj, "bias")]  # fmt: skip
    else:
        shell = stand_in(layer, weight=weight, bias=bias)
        wanted = [(layer, shell, "weight"), (layer, shell, "bias")]
    shell.__dict__.update({NAME: name, CURRENT: (), WEIGHTS: weight, BIAS: bias})  # with backups it makes none
    if nets:
        host().network_apply_weights(shell)
    return [(module, key, made._parameters[key]) for module, made, key in wanted]


def merge_all(layers: Mapping[str, nn.Module], nets: Sequence[Any], field: str, keep: bool = True) -> list[Change]:
    """As ``merge``, of many layers; raises SettingError where a LoRA does not fit one of them."""
    changes = []
    try:
        with heard(field), listed(nets), torch.no_grad(), devices.autocast():
            for name, layer in layers.items():
                made = merge(layer, name, nets)
                changes += made if keep else []
    except (TypeError, ValueError, AttributeError, AssertionError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(field, ", ".join(net.name for net in nets), f"can't be merged ({error})") from error
    return changes


def merge_into(model: nn.Module, nets: Sequence[Any], field: str) -> None:
    """Merges LoRAs into a model of one's own whose layers have the host's names, for good, and takes the names off."""
    layers = {module.network_layer_name: module for module in model.modules() if hasattr(module, NAME)}
    for module, key, value in merge_all(touched(nets, layers), nets, field):
        module._parameters[key] = value
    for module in layers.values():
        del module.network_layer_name


@dataclass
class Worn:
    """Merged parameters that layers have during an expert's calls.

    ``layers``: those that they belong to; the host's LoRA code passes them over meanwhile. ``nets``: what its list is
    meanwhile, in its functional mode.
    """

    changes: list[Change]
    layers: list[nn.Module]
    nets: list[Any] | None = None
    _parts: dict[nn.Module, tuple[list[Change], list[nn.Module]]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(v.numel() * v.element_size() for _, _, v in self.changes if v is not None)

    @contextmanager
    def on(self, part: nn.Module | None = None) -> Iterator[None]:
        changes, layers = self._within(part)
        with ExitStack() as stack:
            if self.nets is not None:
                stack.enter_context(listed(self.nets))
            stack.enter_context(put_on(changes, layers))
            yield

    def to(self, device: torch.device) -> None:
        for _, _, value in self.changes:
            if value is not None:
                value.data = value.data.to(device)

    def _within(self, part: nn.Module | None) -> tuple[list[Change], list[nn.Module]]:
        if part is None:
            return self.changes, self.layers
        if part not in self._parts:
            inside = set(part.modules())
            self._parts[part] = ([change for change in self.changes if change[0] in inside],
                                 [layer for layer in self.layers if layer in inside])  # fmt: skip
        return self._parts[part]


@contextmanager
def put_on(changes: Sequence[Change], layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within, layers have these parameters and no names; whatever happens, they get back what they had."""
    names: list[tuple[nn.Module, str]] = []
    own: list[tuple[nn.Module, str, Any, Any]] = []
    try:
        for layer in layers:
            if NAME in layer.__dict__:
                names.append((layer, layer.__dict__.pop(NAME)))
        for module, key, value in changes:
            old = module._parameters[key]
            follow(value, old)
            own.append((module, key, old, value))
            module._parameters[key] = value
        yield
    finally:
        for module, key, old, _ in own:
            module._parameters[key] = old
        for layer, name in names:
            layer.network_layer_name = name
        for _, _, old, value in own:
            follow(old, value)  # with little memory the host moves what a module has at the time


def follow(value: torch.Tensor | None, other: torch.Tensor | None) -> None:
    """Moves a tensor's data to where another one is."""
    if value is not None and other is not None and value.device != other.device:
        value.data = value.data.to(other.device)


class MergedAtEachCall:
    """As ``Worn``, without keeping anything: each layer is merged before its call, and has its own again after it.

    Takes the memory of one layer, and some reads and writes of the touched weights at every call.
    """

    bytes = 0

    def __init__(self, layers: Mapping[str, nn.Module], nets: Sequence[Any], field: str) -> None:
        self.layers, self.nets, self.field = layers, nets, field

    def to(self, device: torch.device) -> None:
        """Nothing is kept, so nothing is moved."""

    @contextmanager
    def on(self, part: nn.Module | None = None) -> Iterator[None]:
        inside = None if part is None else set(part.modules())
        entered: dict[nn.Module, ExitStack] = {}

        def before(layer: nn.Module, _: Any, name: str) -> None:
            with listed(self.nets):
                changes = merge(layer, name, self.nets)
            entered[layer] = ExitStack()
            entered[layer].enter_context(put_on(changes, [layer]))

        def after(layer: nn.Module, *_: Any) -> None:
            entered.pop(layer).close()

        with heard(self.field), Hooks() as hooks:
            try:
                for name, layer in self.layers.items():
                    if inside is None or layer in inside:
                        hooks.before(layer, partial(before, name=name))
                        hooks.after(layer, after)
                yield
            finally:
                while entered:  # its own call has failed
                    entered.popitem()[1].close()


def restore(sd_model: nn.Module) -> None:
    """Takes merged LoRAs out of the base's layers, as the host's functional mode does at each layer's next call.

    It does not where its list is empty, as it is during the calls of an expert without LoRAs.
    """
    networks = host()
    for layer in sd_model.network_layer_mapping.values():
        if getattr(layer, CURRENT, ()) and isinstance(layer, KINDS):
            with torch.no_grad():
                networks.network_restore_weights_from_backup(layer)
            networks.network_reset_cached_weight(layer)
