"""Weights come to the device and go again, what failed is let go of, and the VAE may have the experts' memory."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lib_fusion.errors import release
from tests.webui_fake import fakes

META = torch.device("meta")  # stands for the device: what is there has no numbers on the CPU


@pytest.fixture
def placement(monkeypatch: pytest.MonkeyPatch) -> Any:
    fakes.install(monkeypatch)
    from lib_fusion.webui.a1111 import placement

    monkeypatch.setattr(placement.devices, "device", META)
    return placement


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_weights_stay_in_ram_while_a_copy_computes(placement: Any) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    homes = weights_of(module)
    with placement.on_device(module):
        copies = weights_of(module)
        assert {value.device for value in copies} == {META}
        assert [type(copy) for copy in copies] == [type(home) for home in homes]
    assert all(now is home for now, home in zip(weights_of(module), homes, strict=True))
    gone = [weakref.ref(copy) for copy in copies]
    del copies
    assert not any(ref() is not None for ref in gone)


def test_only_changed_weights_are_written_back(placement: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    weight, bias = module.weight, module.bias
    placement.bring(module)
    changed = module.weight
    changed.add_(1)  # as LoRAs do, in place
    written: list[tuple[Any, Any]] = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *both: written.append(both))
    placement.put_back(module)
    assert [(a is weight, b is changed) for a, b in written] == [(True, True)]
    assert module.weight is weight
    assert module.bias is bias


def test_a_weight_that_came_while_on_the_device_goes_to_ram(placement: Any) -> None:
    module = nn.Linear(2, 2, bias=False).requires_grad_(False)
    placement.bring(module)
    module.bias = nn.Parameter(torch.zeros(2))
    placement.put_back(module)
    assert {value.device.type for value in weights_of(module)} == {"cpu"}


def test_a_streamed_unet_has_one_block_on_the_device(placement: Any) -> None:
    unet = nn.Module()
    unet.input_blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    unet.out = nn.Linear(2, 2)
    unet.requires_grad_(False)
    blocks = [*unet.input_blocks, unet.out]
    seen = []
    for block in blocks:
        block.forward = lambda x: seen.append([b.weight.device == META for b in blocks]) or x
    hooks = placement.stream(unet)
    for block in blocks:
        block(torch.zeros(1, 2))
    hooks.remove()
    assert seen == [[i == j for j in range(4)] for i in range(4)]
    assert {value.device.type for value in weights_of(unet)} == {"cpu"}


def test_release_lets_go_of_what_a_failed_function_held() -> None:
    held = []

    def compute() -> None:
        features = torch.zeros(3)
        held.append(weakref.ref(features))
        try:
            raise MemoryError
        except MemoryError as error:
            raise RuntimeError("out of memory") from error

    kept = None
    try:
        compute()
    except RuntimeError as error:
        kept = error
        gc.collect()
        assert held[0]() is not None  # by the traceback
        release(error)
    assert kept is not None
    assert held[0]() is None


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Any:
    fakes.install(monkeypatch)
    from lib_fusion.webui.a1111 import decoding

    return decoding


class Vae(nn.Module):
    def __init__(self, failing: list[Exception]) -> None:
        super().__init__()
        self.failing = failing

    def decode_first_stage(self, latent: int) -> int:
        if self.failing:
            raise self.failing.pop(0)
        return latent + 1


def test_the_vae_runs_again_without_the_experts(decoding: Any) -> None:
    vae, done = Vae([RuntimeError("CUDA out of memory")]), []
    decoding.RoomForVae(vae, lambda: done.append("freed"), done.append)
    assert vae.decode_first_stage(1) == 2
    assert done == ["freed", decoding.MADE_ROOM]
    assert "decode_first_stage" not in vae.__dict__


def test_the_vaes_other_errors_and_a_second_lack_are_the_hosts(decoding: Any) -> None:
    vae, done = Vae([RuntimeError("a bug")]), []
    decoding.RoomForVae(vae, lambda: done.append("freed"), done.append)
    with pytest.raises(RuntimeError, match="a bug"):
        vae.decode_first_stage(1)
    assert not done
    vae.failing = [RuntimeError("out of memory"), RuntimeError("out of memory again")]
    decoding.RoomForVae(vae, lambda: done.append("freed"), done.append)
    with pytest.raises(RuntimeError, match="again"):
        vae.decode_first_stage(1)
    assert "decode_first_stage" not in vae.__dict__


def test_room_for_the_vae_comes_off_and_leaves_others_alone(decoding: Any) -> None:
    vae = Vae([])
    room = decoding.RoomForVae(vae, lambda: None, print)
    assert vae.decode_first_stage(1) == 2
    room.remove()
    assert not {"decode_first_stage", "encode_first_stage"} & set(vae.__dict__)
    vae.decode_first_stage = other = lambda latent: latent
    decoding.RoomForVae(vae, lambda: None, print).remove()
    assert vae.decode_first_stage is other


def encoder_loads(monkeypatch: pytest.MonkeyPatch, cache: int, experts: int, prompts: int) -> int:
    """How often text encoders are made for some experts of their own, over some prompts."""
    options = fakes.install(monkeypatch)
    options.data["denoiser_fusion_cache"] = cache
    from lib_fusion.webui.a1111 import conditioning

    made = []
    monkeypatch.setattr(conditioning, "clone_encoder", lambda *_: made.append(1) or nn.Linear(1, 1))
    monkeypatch.setattr(conditioning, "log_loaded", lambda *_: None)
    kind = SimpleNamespace(kind="sd1")
    monkeypatch.setattr(conditioning, "kind_of_model", lambda _: kind)
    texts, model = conditioning.TextCache(), SimpleNamespace(cond_stage_model=nn.Linear(1, 1))
    for _ in range(prompts):
        for i in range(experts):
            loaded = SimpleNamespace(info=SimpleNamespace(name=str(i)), model=kind)
            texts._own(loaded, _Key(i), model, "", None, experts)
    return len(made)


class _Key(int):
    loras = ()


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_text_encoders_of_all_experts_are_kept(monkeypatch: pytest.MonkeyPatch, experts: int) -> None:
    assert encoder_loads(monkeypatch, cache=1, experts=experts, prompts=3) == experts


def test_a_load_that_cannot_fit_is_announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    options = fakes.install(monkeypatch)
    from lib_fusion.webui.a1111 import room
    from lib_fusion.webui.runtime import Runtime

    tensors = {"input_blocks.0.0.weight": torch.zeros(100, 10), "out.2.weight": torch.zeros(30, 10)}
    save_file({f"model.diffusion_model.{key}": value for key, value in tensors.items()}, tmp_path / "a.safetensors")
    info = SimpleNamespace(filename=str(tmp_path / "a.safetensors"))
    room.sd_models.checkpoint_aliases["a"] = info
    monkeypatch.setattr(room.devices, "fp8", False, raising=False)
    monkeypatch.setattr(room, "free_memory", lambda: 4500.0)
    assert room.shortage(["a", "none", None], {}) == (5200, 4500)
    assert room.shortage(["a"], {"other": 700}) is None  # which makes room
    assert room.shortage(["a"], {info.filename: 5200}) is None
    assert "need 0.0 MiB of GPU memory, and 0.0 MiB are free" in Runtime().describe_memory("a")
    assert "free" not in Runtime().describe_memory("none")
    options.data["denoiser_fusion_place"] = "RAM between U-Net calls"
    assert room.shortage(["a"], {}) is None  # its largest block has 4000 bytes
    monkeypatch.setattr(room, "free_memory", lambda: 3999.0)
    assert room.shortage(["a"], {}) == (4000, 3999)
    monkeypatch.setattr(room, "free_memory", lambda: float("inf"))
    assert room.shortage(["a"], {}) is None
