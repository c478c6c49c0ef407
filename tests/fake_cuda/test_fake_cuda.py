"""The stand-in behaves as a CUDA device does. Without pytest: ``python -m tests.fake_cuda.test_fake_cuda``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from tests import fake_cuda


@contextlib.contextmanager
def refused(words: str, kind: type[Exception] = RuntimeError) -> Iterator[None]:
    """As pytest.raises, which the WebUI's Python does not have."""
    message = ""
    try:
        yield
    except kind as error:
        message = str(error)
    assert words in message, message


def test_tensors_of_two_devices_do_not_mix(cuda):
    gpu, cpu = torch.ones(3, device="cuda"), torch.ones(3)
    mixed: list[Callable] = [
        lambda: gpu + cpu, lambda: cpu + gpu, lambda: torch.cat([gpu, cpu]), lambda: cpu.mul_(gpu),
        lambda: torch.where(gpu > 0, gpu, cpu), lambda: torch.stack([cpu, gpu]),
        lambda: cpu + torch.ones((), device="cuda"), lambda: nn.Linear(3, 3).cuda()(cpu),
    ]  # fmt: skip
    for act in mixed:
        with refused("Expected all tensors to be on the same device"):
            act()
    with refused("indices should be either on cpu"):
        cpu[torch.tensor([0, 1], device="cuda")]
    with refused("can't convert cuda", TypeError):
        gpu.numpy()
    assert (gpu + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert gpu[torch.tensor([0, 2])].shape == (2,)


def test_it_computes_what_the_cpu_computes(cuda):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 4, 3))
    x, q = torch.randn(2, 4, 16, 16), torch.randn(2, 8, 64, 40)
    with torch.no_grad():
        expected = net(x)
        weight = net[0].weight
        net.cuda()
        assert net[0].weight is weight
        assert weight.device == torch.device("cuda:0")
        assert torch.allclose(net(x.cuda()).cpu(), expected, atol=1e-6)
        attended = F.scaled_dot_product_attention(*[q.cuda()] * 3)
        assert torch.allclose(attended.cpu(), F.scaled_dot_product_attention(q, q, q), atol=1e-5)


def test_views_share_memory_and_outputs_grow(cuda):
    x = torch.arange(24, device="cuda").view(2, 3, 4)
    x.transpose(1, 2)[:, 1:].zero_()
    assert x[:, :, 1:].abs().sum().item() == 0
    assert x[0, 1, 0].item() == 4
    out = torch.empty(0, device="cuda")
    torch.arange(5, out=out)
    assert out.tolist() == [0, 1, 2, 3, 4]
    x[x > 4] = 1
    assert int(x.max()) == 4
    assert torch.polar(torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")).real.tolist() == [1, 1, 1]


def test_half_precision_overflows(cuda):
    big = torch.full((1, 4096), 30.0, device="cuda", dtype=torch.half)
    assert torch.isinf(big @ big.T)  # 3.7 million; the largest is 65504
    assert (big @ big.T).dtype == torch.half
    assert F.softmax(big, -1, dtype=torch.float32).dtype == torch.float32
    with refused("dtype"):
        nn.Linear(4, 4).cuda()(torch.ones(1, 4, device="cuda", dtype=torch.half))
    if torch.__version__.startswith("2.1."):  # later versions have other operators for it
        with refused("expected scalar type Half but found Float"):
            nn.GroupNorm(2, 4).cuda()(torch.ones(1, 4, 2, 2, device="cuda", dtype=torch.half))


def test_autocast_goes_by_cudas_lists(cuda):
    x = torch.ones(2, 4, 8, 8, device="cuda")
    conv, norm = nn.Conv2d(4, 4, 3).cuda(), nn.GroupNorm(2, 4).cuda().half()
    with torch.no_grad(), torch.autocast("cuda"):
        assert conv(x).dtype == torch.half
        assert norm(conv(x)).dtype == torch.float32
        assert x.half().sum().dtype == torch.float32
        assert torch.bmm(x[0], x[0]).dtype == torch.half


def test_waits_are_recorded_with_their_place(cuda):
    x = torch.ones(4, device="cuda")
    pinned = torch.ones(3).pin_memory()
    with cuda.recording(("tests/",), operators=True) as found:
        float(x[0])
        x.tolist()
        bool((x > 0).all())
        x[[0, 1]]
        x[x > 0]
        x.unique()
        torch.tensor([1.0], device="cuda")
        torch.ones(3).to("cuda", non_blocking=True)
        pinned.to("cuda", non_blocking=True)
        x[1:3], x.sum(), torch.full((3,), 2.0, device="cuda")  # these do not wait
    kinds = {kind: sum(n for n, k, *_ in found.waits() if k == kind) for kind in fake_cuda.WAITS}
    # float and bool; tolist; the list of indices, the new tensor and the memory that is not pinned; the mask
    assert kinds == {"item": 2, "d2h": 1, "h2d": 3, "index": 1, "wait": 1, "synchronize": 0}, found.waits()
    assert [n for n, *_ in found.of("h2d async")] == [1]
    assert all("test_fake_cuda.py" in place for *_, place in found.waits())
    assert found.num_operators > 5


def test_dtypes_that_a_device_should_not_see_are_recorded(cuda):
    half, single = torch.ones(4, device="cuda", dtype=torch.half), torch.ones(4, device="cuda")
    with cuda.recording(("tests/",)) as found:
        half.mul_(2.0)
        half.mul_(half)
        half.copy_(single)
    assert not found.of("wide", "mixed")
    with cuda.recording(("tests/",)) as found:
        half.mul_(single)
        single.double()
        torch.polar(single, single)
    assert [op for _, _, op, _ in found.of("mixed")] == ["aten::mul_"]
    assert {op for _, _, op, _ in found.of("wide")} == {"Double", "ComplexFloat"}


def test_memory_is_counted_and_limited(cuda):
    before, _ = cuda.memory()
    x = torch.empty(1 << 20, device="cuda")
    assert cuda.memory()[0] - before == 4 << 20
    cuda.set_limit(before + (5 << 20))
    assert torch.cuda.mem_get_info() == (1 << 20, before + (5 << 20))
    with refused("CUDA out of memory", torch.cuda.OutOfMemoryError):
        torch.empty(1 << 20, device="cuda")
    with refused("CUDA out of memory", torch.cuda.OutOfMemoryError):
        x + 1
    cuda.set_limit(0)
    del x
    assert cuda.memory()[0] == before


def check_gradients() -> None:
    """Gradients, the scaler, saving. In a process of its own: autograd must start when the device is there."""
    x = torch.ones(2, 3, device="cuda", dtype=torch.half, requires_grad=True)
    F.softmax(x * 2, -1, dtype=torch.float32).square().sum().backward()
    assert x.grad.dtype == torch.half
    assert x.grad.device.type == "cuda"
    file = io.BytesIO()
    torch.save({"x": x.detach()}, file)
    file.seek(0)
    assert torch.load(file, map_location="cpu")["x"].tolist() == x.tolist()
    linear = nn.Linear(3, 3).cuda()
    optimizer, scaler = torch.optim.AdamW(linear.parameters()), torch.cuda.amp.GradScaler(init_scale=2.0**10)
    for factor in (1.0, float("inf")):
        before = linear.weight.detach().clone()
        scaler.scale(linear(torch.ones(3, device="cuda")).sum() * factor).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(linear.parameters(), 1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, linear.weight) == (factor > 1)
    assert scaler.get_scale() == 2.0**9


if __name__ == "__main__":
    with fake_cuda.installed():
        for test in [value for name, value in globals().items() if name.startswith("test_")]:
            test(fake_cuda)
        check_gradients()
