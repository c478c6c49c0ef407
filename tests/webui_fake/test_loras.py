"""LoRAs of one expert on layers that it shares with the base, on a fake of the host's LoRA extension."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lib_fusion.errors import SettingError
from lib_fusion.requests.settings import ExpertSettings
from tests.webui_fake import fakes

FIELD = "experts[0].prompt"
CHECKPOINT = SimpleNamespace(filename="base.safetensors")


class Net:
    """The host's ``Network``: layers by name, each with what it adds to the weight; the bias gets half of it."""

    def __init__(self, name: str, filename: str, layers: dict[str, torch.Tensor]) -> None:
        self.name = self.mentioned_name = name
        self.network_on_disk = SimpleNamespace(filename=filename, shorthash=name)
        self.te_multiplier = self.unet_multiplier = 1.0
        self.dyn_dim, self.bundle_embeddings = None, {}
        self.modules = {key: SimpleNamespace(delta=delta, network=self) for key, delta in layers.items()}


def make_networks(folder: Path, layers: dict[str, nn.Module]) -> ModuleType:
    """A ``networks`` module with a LoRA a on the first layer, b on both, and some that are to be refused."""
    module = ModuleType("networks")
    deltas = {name: torch.full_like(layer.weight, i + 1) for i, (name, layer) in enumerate(layers.items())}
    first = next(iter(deltas))
    files = {"a": {first: deltas[first]}, "b": deltas, "wrong": {first: torch.ones(7, 7)}, "other": {}}
    for name, found in files.items():
        tensors = {f"{key}.w": torch.zeros(1) for key in found or ("elsewhere",)}
        save_file(tensors, folder / f"{name}.safetensors")
    entries = {name: SimpleNamespace(filename=str(folder / f"{name}.safetensors")) for name in files}
    entries["pickle"] = SimpleNamespace(filename=str(folder / "pickle.pt"))

    def network_apply_weights(layer: nn.Module) -> None:
        wanted = tuple(net.name for net in module.loaded_networks)
        if not hasattr(layer, "network_layer_name") or getattr(layer, "network_current_names", ()) == wanted:
            return
        if getattr(layer, "network_weights_backup", None) is None:
            layer.network_weights_backup = layer.weight.clone()
            layer.network_bias_backup = layer.bias.clone()
        layer.weight.copy_(layer.network_weights_backup)
        layer.bias.copy_(layer.network_bias_backup)
        for net in module.loaded_networks:
            found = net.modules.get(layer.network_layer_name)
            try:
                if found is not None:
                    layer.weight += found.delta.to(layer.weight.device) * found.network.unet_multiplier
                    layer.bias += 0.5 * found.network.unet_multiplier
            except RuntimeError:
                module.extra_network_lora.errors[net.name] = module.extra_network_lora.errors.get(net.name, 0) + 1
        layer.network_current_names = wanted

    module.loaded_networks, module.forbidden_network_aliases = [], {}
    module.available_networks = module.available_network_aliases = entries
    module.extra_network_lora = SimpleNamespace(errors={})
    module.update_available_networks_by_names = lambda names: None
    module.load_network = lambda name, on_disk: Net(name, on_disk.filename, files[name])
    module.network_apply_weights = network_apply_weights
    return module


class Base(nn.Module):
    """A model of two layers, which call the host's LoRA code as the real ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.requires_grad_(False)
        self.sd_checkpoint_info = CHECKPOINT
        self.network_layer_mapping = {}
        for name in ("one", "two"):
            layer = getattr(self, name)
            layer.network_layer_name = f"diffusion_model_{name}"
            self.network_layer_mapping[layer.network_layer_name] = layer
            layer.forward = self.forward_of(layer)

    @staticmethod
    def forward_of(layer: nn.Linear) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            sys.modules["networks"].network_apply_weights(layer)
            return torch.nn.functional.linear(x, layer.weight, layer.bias)

        return forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.sin(self.one(x)))


class Bench:
    """A base, the fake host and the modules under test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.options = fakes.install(monkeypatch)
        sys.modules["modules.devices"].fp8 = False
        self.base = Base()
        self.networks = make_networks(folder, self.base.network_layer_mapping)
        monkeypatch.setitem(sys.modules, "networks", self.networks)
        from lib_fusion.webui.a1111 import loras, worn

        self.loras, self.worn, self.cache = loras, worn, loras.LoraCache()
        self.x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    def calls(self, prompt: str) -> tuple[Any, ...]:
        return self.loras.loras_of(ExpertSettings("same as base", prompt=prompt), "experts[0]")

    def wear(self, prompt: str) -> Any:
        return self.cache.acquire([(self.calls(prompt), FIELD)], self.base)[0]

    def load(self, *names: str) -> None:
        """The picture's own LoRAs."""
        entries = self.networks.available_networks
        self.networks.loaded_networks[:] = [self.networks.load_network(name, entries[name]) for name in names]

    def hosts(self, *names: str) -> torch.Tensor:
        """What the host computes with these in the picture's prompt."""
        before = list(self.networks.loaded_networks)
        self.load(*names)
        try:
            return self.base(self.x)
        finally:
            self.networks.loaded_networks[:] = before

    def look(self) -> dict[str, Any]:
        """What must be as before: parameters as objects, names, hooks."""
        return {
            path: (*map(id, m.parameters()), m.__dict__.get("network_layer_name"), len(m._forward_hooks),
                   len(m._forward_pre_hooks))
            for path, m in self.base.named_modules()
        }  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(monkeypatch, tmp_path)


PLACES = ["GPU", "RAM between U-Net calls"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("picture", [(), ("a",), ("b",)])
@pytest.mark.parametrize("before", [(), ("b",)])
def test_an_experts_calls_are_the_hosts(bench: Bench, place: str | None, picture: tuple, before: tuple) -> None:
    """Whatever LoRAs the picture has, and whatever the last one has left in the layers."""
    wanted = {names: bench.hosts(*names) for names in ((), ("a",), ("b",), ("b", "a"))}
    bench.hosts(*before)
    bench.load(*picture)
    bench.options.data["denoiser_fusion_place"] = place
    look = bench.look()
    for names in wanted:
        worn = bench.wear(" ".join(f"<lora:{name}:1>" for name in names))
        if worn is None:
            assert names == picture
            continue
        with worn.on():
            assert torch.equal(bench.base(bench.x), wanted[names])
        assert bench.look() == look
    assert torch.equal(bench.base(bench.x), wanted[picture])


@pytest.mark.parametrize("place", PLACES)
def test_all_comes_off_after_an_error(bench: Bench, place: str | None) -> None:
    bench.options.data["denoiser_fusion_place"] = place
    look, plain = bench.look(), bench.base(bench.x)
    worn = bench.wear("<lora:b:1>")

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = bench.base.two.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError), worn.on():
        bench.base(bench.x)
    handle.remove()
    assert bench.look() == look
    assert torch.equal(bench.base(bench.x), plain)


def test_a_device_without_room_leaves_nothing_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving the second parameter fails, when the first one is on already."""
    worn, look = bench.wear("<lora:b:1>"), bench.look()
    moved = []

    def follow(*_: Any) -> None:
        moved.append(1)
        if len(moved) == 2:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(bench.worn, "follow", follow)
    with pytest.raises(RuntimeError), worn.on():
        pass
    assert bench.look() == look


@pytest.mark.parametrize("place", PLACES)
def test_only_a_part_of_the_model(bench: Bench, place: str | None) -> None:
    bench.options.data["denoiser_fusion_place"] = place
    worn = bench.wear("<lora:b:1>")
    plain = bench.base.one(bench.x), bench.base.two(bench.x)
    with worn.on():
        whole = bench.base.one(bench.x), bench.base.two(bench.x)
    with worn.on(bench.base.two):
        assert torch.equal(bench.base.one(bench.x), plain[0])
        assert torch.equal(bench.base.two(bench.x), whole[1])
    assert not torch.equal(plain[1], whole[1])


def test_what_is_kept_and_what_is_merged_again(bench: Bench) -> None:
    first = bench.wear("<lora:b:0.5>")
    assert bench.wear("<lora:b:0.5>") is first
    assert bench.cache.bytes == first.bytes == 2 * (9 + 3) * 4
    other = bench.wear("<lora:b:0.6>")
    assert other is not first
    bench.load("a")
    with_picture = bench.wear("<lora:b:0.6>")
    assert with_picture is not other
    assert bench.wear("<lora:a:1>") is None
    assert bench.cache.bytes == 0
    bench.load()
    bench.base.sd_checkpoint_info = SimpleNamespace(filename="another.safetensors")  # in the same object
    assert bench.wear("<lora:b:0.6>") is not other
    assert bench.wear("") is None


def test_no_room_for_merged_layers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = bench.hosts("b")
    monkeypatch.setattr(bench.loras, "free_memory", lambda: 2 * 96 - 1)  # half of it is less than what b touches
    worn = bench.wear("<lora:b:1>")
    assert isinstance(worn, bench.worn.MergedAtEachCall)
    assert worn.bytes == 0
    with worn.on():
        assert torch.equal(bench.base(bench.x), wanted)


@pytest.mark.parametrize("place", PLACES)
def test_layers_that_the_host_moves_while_they_are_worn(bench: Bench, cuda: ModuleType, place: str | None) -> None:
    """As with --medvram and --lowvram: what a module has at the time moves, and the base's own goes where it went."""
    device = torch.device("cuda:0")
    sys.modules["modules.devices"].device = device
    bench.options.data["denoiser_fusion_place"] = place
    plain, wanted, look = bench.base(bench.x), bench.hosts("b"), bench.look()
    worn = bench.wear("<lora:b:1>")
    bench.base.two.register_forward_pre_hook(lambda layer, _: layer.to(device) and None)
    for _ in range(2):  # the second time the base's are there already, and then back
        with worn.on():
            bench.base.one.to(device)
            drawn = bench.base(bench.x.to(device))
        torch.testing.assert_close(drawn.cpu(), wanted)
        assert {p.device for p in bench.base.parameters()} == {device}
        torch.testing.assert_close(bench.base(bench.x.to(device)).cpu(), plain)
        worn.to(torch.device("cpu"))
    bench.base.two._forward_pre_hooks.clear()
    bench.base.to("cpu")
    with worn.on():
        torch.testing.assert_close(bench.base(bench.x), wanted)
    assert bench.look() == look


def test_loras_of_the_picture_where_they_are_asked_for(bench: Bench) -> None:
    bench.load("a")
    both = ExpertSettings("same as base", prompt="<lora:b:0.5>", loras=True)
    assert [call.name for call in bench.loras.loras_of(both, "experts[0]")] == ["a", "b"]
    own = ExpertSettings("same as base", prompt="<lora:a:0.5>", loras=True)
    assert [(call.name, call.unet) for call in bench.loras.loras_of(own, "experts[0]")] == [("a", 0.5)]
    assert bench.loras.loras_of(ExpertSettings("same as base"), "experts[0]") == ()
    net = bench.cache.networks.get(bench.calls("<lora:a:0.5>")[0], bench.base, FIELD)
    assert net.unet_multiplier == 0.5
    assert bench.networks.loaded_networks[0].unet_multiplier == 1  # the picture's own has its weight still


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("<lora:B:1>", "no such LoRA; near it: b"),
        ("<lora:pickle:1>", "allowed: .safetensors files"),
        ("<lora:other:1>", "only 0 of the 1 layers that it is for are in this base"),
        ("<lora:wrong:1>", "1 of its layers do not fit"),
    ],
)
def test_refused_by_name(bench: Bench, prompt: str, problem: str) -> None:
    bench.networks.extra_network_lora.errors["the picture's"] = 2
    with pytest.raises(SettingError, match=problem) as caught:
        bench.wear(prompt)
    assert caught.value.field == FIELD
    assert bench.networks.extra_network_lora.errors == {"the picture's": 2}


def test_a_layer_that_could_not_be_merged_in_a_call(bench: Bench) -> None:
    """As for want of memory, which the host counts and then draws without the layer."""
    bench.options.data["denoiser_fusion_place"] = PLACES[1]
    worn, look = bench.wear("<lora:b:1>"), bench.look()
    next(iter(worn.nets[0].modules.values())).delta = torch.ones(7, 7)
    with pytest.raises(SettingError, match="do not fit the base, or the memory"), worn.on():
        bench.base(bench.x)
    assert bench.look() == look


def test_refused_without_the_hosts_lora_extension(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "networks")
    with pytest.raises(SettingError, match="own extension Lora is switched off"):
        bench.loras.find_loras("a cat <lora:a:1>", FIELD)
    assert bench.loras.find_loras("a cat", FIELD) == ("a cat", ())
    assert bench.loras.acting_calls() == ()


def test_hashes_beside_the_hosts_own(bench: Bench) -> None:
    from lib_fusion.requests.settings import FusionSettings
    from lib_fusion.webui.models import file_hashes

    class Entry(SimpleNamespace):
        def read_hash(self) -> None:
            self.shorthash = "0123456789ab"

    for name, entry in list(bench.networks.available_networks.items()):
        bench.networks.available_networks[name] = Entry(filename=entry.filename, get_alias=lambda name=name: name)
    bench.networks.extra_network_lora.remove_symbols = str.maketrans("", "", ":,")
    settings = FusionSettings(experts=(ExpertSettings("same as base", prompt="<lora:a:1>"),))
    for before in ({}, {"Lora hashes": "x: 1"}, {"Lora hashes": "a: 0123456789ab"}):
        params = dict(before)
        for _ in range(2):  # in both passes
            file_hashes.add(params, settings, ["same as base"])
        texts = [*before.values(), "a: 0123456789ab"]
        assert params == {"Lora hashes": ", ".join(dict.fromkeys(texts))}
        file_hashes.remove(params)  # for the next cell of a plot
        assert params == before
    bench.networks.available_network_hash_lookup = {"0123456789ab": bench.networks.available_networks["b"]}
    told = {"Lora hashes": "old: 0123456789ab, x: 1"}
    assert file_hashes.rename_loras("<lora:old:1> <lora:x:1>", told) == "<lora:b:1> <lora:x:1>"
    bench.options.data["lora_add_hashes_to_infotext"] = False
    params = {}
    file_hashes.add(params, settings, ["same as base"])
    assert params == {}


def test_controlnets_marker_comes_back_for_experts_that_are_the_base(bench: Bench) -> None:
    from lib_fusion.webui.a1111.contexts import keep_marker, strip_marker

    states, host = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    token = torch.tensor([1024.0, -1024.0])[:, None, None].expand(2, 1, 4)
    call = {"c_crossattn": [torch.cat([token, host], dim=1)], "c_concat": []}
    marked = keep_marker({"c_crossattn": [states], "c_concat": []}, call)
    assert torch.equal(marked["c_crossattn"][0], torch.cat([token, states], dim=1))
    assert keep_marker(strip_marker(call), call)["c_crossattn"][0].equal(call["c_crossattn"][0])
    own = {"crossattn": states, "vector": host}
    assert keep_marker(own, {"crossattn": host}) is own
    assert torch.equal(keep_marker(own, {"crossattn": torch.cat([token, host], 1)})["crossattn"][:, 1:], states)
