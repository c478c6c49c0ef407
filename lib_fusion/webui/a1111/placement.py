"""Where the weights of experts wait, and how they come to the device: for good, for a pass, or block by block.

Weights that wait in RAM stay there while a copy of them computes on the device. Afterwards the copy is dropped; it is
written back only where something has changed it, as LoRAs do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from modules import devices, lowvram
from torch import nn

from lib_fusion.fusion.hooks import Hooks
from lib_fusion.requests.settings import PLACES
from lib_fusion.webui.options import read_option


def chosen_place() -> str:
    return read_option("place")


def waits_in_ram(sd_model: nn.Module) -> bool:
    """Whether experts are in RAM between pictures: where the setting says so, or the host's own model is, too."""
    return chosen_place() != PLACES[0] or bool(lowvram.is_enabled(sd_model))


def home_of(sd_model: nn.Module) -> torch.device:
    """The device on which experts wait."""
    return devices.cpu if waits_in_ram(sd_model) else devices.device


def bring(module: nn.Module) -> None:
    """Lets a module compute on the device, on copies of those of its weights that are in RAM."""
    if devices.device.type == "cpu":
        return
    # CUDA copies ordinary memory without waiting for what it computes; the source is not changed meanwhile.
    at_once = devices.device.type == "cuda"
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, home in table.items():
                if home is None or home.device.type != "cpu":
                    continue
                copy = home.detach().to(devices.device, non_blocking=at_once)
                if isinstance(home, nn.Parameter):
                    copy = nn.Parameter(copy, requires_grad=False)
                copy.home, copy.unchanged = home, copy._version
                table[name] = copy


def put_back(module: nn.Module) -> None:
    """The opposite of ``bring``: the module has its weights in RAM again, and the device's memory is free."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, copy in table.items():
                if copy is None:
                    continue
                home = getattr(copy, "home", None)
                if home is None:
                    table[name] = _moved(copy, devices.cpu)
                    continue
                if copy._version != copy.unchanged:
                    with torch.no_grad():
                        home.copy_(copy)
                table[name] = home


def settle(module: nn.Module, device: torch.device) -> None:
    """Moves a module's weights for good: to RAM, or to the device, where no second copy stays in RAM."""
    if device.type == "cpu":
        put_back(module)
    else:
        module.to(device)


def _moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter or buffer that has no copy elsewhere on another device; a parameter stays the same object."""
    if isinstance(value, nn.Parameter):
        value.data = value.data.to(device)
        return value
    return value.to(device)


@contextmanager
def on_device(module: nn.Module) -> Iterator[None]:
    """Within, a module that waits in RAM computes on the device."""
    bring(module)
    try:
        yield
    finally:
        put_back(module)


def blocks_of(unet: nn.Module) -> list[nn.Module]:
    """The parts of which a U-Net runs one at a time: embeddings, each block, and ``out``."""
    return [block for child in unet.children() for block in (child if isinstance(child, nn.ModuleList) else [child])]


def stream(unet: nn.Module) -> Hooks:
    """Lets a U-Net compute block by block: each of its blocks is on the device for its own forward only.

    After an error in a block, ``put_back`` of the whole brings home what has stayed.
    """
    hooks = Hooks()
    for block in blocks_of(unet):
        hooks.before(block, lambda block, _: bring(block))
        hooks.after(block, lambda block, _, __: put_back(block))
    return hooks


def holder(unets: Iterable[nn.Module]) -> Callable[[nn.Module], AbstractContextManager[None]]:
    """The same for blocks whose ``forward`` is called past their hooks; other U-Nets' blocks stay where they are."""
    if chosen_place() != PLACES[2]:
        return nullcontext
    own = {block for unet in unets for block in blocks_of(unet)}

    def held(block: nn.Module) -> AbstractContextManager[None]:
        return on_device(block) if block in own else nullcontext()

    return held
