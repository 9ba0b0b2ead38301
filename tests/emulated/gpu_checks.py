"""What must hold on the emulated GPUs themselves; a function is a test of test_emulated_cuda.py."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def refused(action, kind: type[Exception] = RuntimeError, words: str = "same device") -> None:
    with pytest.raises(kind, match=words):
        action()


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3))


def check_devices_of_tensors() -> None:
    ours, host = torch.randn(3, 4, device="cuda"), torch.randn(3, 4)
    other = torch.randn(3, 4, device="cuda:1")
    assert [x.device for x in (ours, other, host)] == [FIRST, SECOND, torch.device("cpu")]
    assert ours.is_cuda and other.get_device() == 1 and host.is_cpu and not host.is_cuda
    assert ours.new_zeros(3).device == FIRST and torch.zeros_like(other).device == SECOND
    assert torch.zeros_like(ours, device="cpu").is_cpu and torch.as_tensor(host, device=1).device == SECOND
    assert ours.to(host).is_cpu and host.to(other).device == SECOND and ours.to(SECOND).cpu().is_cpu
    assert copy.deepcopy(other).device == SECOND and ours[:, 1:].T.device == FIRST
    refused(lambda: torch.zeros(2, device="cuda:2"), words="invalid device ordinal")


def check_tensors_of_two_devices() -> None:
    ours, host, other = torch.randn(3, 4, device="cuda"), torch.randn(3, 4), torch.randn(3, 4, device="cuda:1")
    for pair in ((ours, host), (ours, other), (host, other)):
        refused(lambda pair=pair: pair[0] + pair[1])
        refused(lambda pair=pair: torch.cat(pair))
        refused(lambda pair=pair: pair[0] @ pair[1].T)
        pair[0].copy_(pair[1])
    refused(lambda: host.add_(ours))
    assert (ours + torch.tensor(2.0)).device == FIRST
    refused(lambda: ours + torch.tensor(2.0, device=SECOND))


def check_indices() -> None:
    ours, host = torch.randn(3, 4, device="cuda"), torch.randn(3, 4)
    assert ours[torch.tensor([0])].is_cuda and ours[torch.tensor([0], device="cuda")].is_cuda
    refused(lambda: host[torch.tensor([0], device="cuda")])
    refused(lambda: ours.gather(0, torch.zeros(1, 4, dtype=torch.int64)))
    refused(lambda: nn.Embedding(5, 3).to("cuda")(torch.tensor([1])))


def check_what_cuda_lacks() -> None:
    ours = torch.arange(4, device="cuda").view(2, 2)
    refused(lambda: ours @ ours, words="not implemented for")
    refused(ours.numpy, TypeError, "can't convert cuda:0")
    refused(ours.pin_memory, words="cannot pin")
    assert ours.numpy(force=True).shape == ours.cpu().numpy().shape == (2, 2)


def check_generators() -> None:
    for device in ("cuda", "cuda:1"):
        generator = torch.Generator(device).manual_seed(0)
        assert torch.randn(2, device=device, generator=generator).device == generator.device
        refused(lambda generator=generator: torch.randn(2, generator=generator), words="for generator")
    refused(lambda: torch.randn(2, device="cuda", generator=torch.Generator()), words="for generator")
    refused(lambda: torch.randn(2, device="cuda", generator=torch.Generator(1)), words="for generator")
    refused(lambda: torch.zeros(2, device="cuda").normal_(generator=torch.Generator()), words="generator")


def check_modules_and_backward() -> None:
    net = small_net()
    weight, x = net[0].weight, torch.randn(2, 3, 8, 8)
    net.to("cuda:1")
    assert net[0].weight is weight and weight.is_leaf and weight.device == SECOND
    refused(lambda: net(x))
    net(x.to(SECOND)).square().mean().backward()
    assert weight.grad.device == SECOND and copy.deepcopy(net)[0].weight.device == SECOND
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].device == SECOND and optimizer.state[weight]["step"].is_cpu
    assert net.half()[0].weight.dtype == torch.half and net[0].weight.device == SECOND


def check_gradients_find_their_device() -> None:
    host = nn.Parameter(torch.randn(3))
    (host.cuda() * 2).sum().backward()
    assert host.grad.is_cpu
    ours = torch.randn(4, 4, device="cuda", requires_grad=True)
    checkpoint(lambda x: x.sin().exp(), ours, use_reentrant=False).sum().backward()
    assert ours.grad.device == FIRST
    ours.grad = None
    ours[:, 1:][[0, 2]].gather(1, torch.zeros(2, 1, dtype=torch.long, device="cuda")).sum().backward()
    assert ours.grad.device == FIRST
    parts = [torch.ones(length, device="cuda") for length in (2, 3)]
    assert nn.utils.rnn.pad_sequence(parts).device == FIRST  # made by C++, then copied to


def check_autocast_and_scaler() -> None:
    with torch.autocast("cuda", torch.float16):
        product = torch.randn(4, 4, device="cuda") @ torch.randn(4, 4, device="cuda")
        assert product.dtype == torch.half and product.is_cuda
        assert {one.dtype for one in (product.softmax(-1), product.sum(), product.exp())} == {torch.float32}
    assert not torch.is_autocast_enabled("cuda")
    net = small_net().cuda()
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cuda")
    scaler.scale(net(torch.randn(2, 3, 8, 8, device="cuda")).mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16


def check_lists_of_tensors() -> None:
    first, second = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
    torch._foreach_mul_([first, torch.ones(3), second], 2.0)
    torch._foreach_add_([first, second], [first, second])
    assert first.sum().item() == second.sum().item() == 12
    refused(lambda: torch._foreach_add_([first], [second]))
    refused(lambda: torch._foreach_add_([first], [torch.ones(3)]))


def check_the_current_device() -> None:
    assert torch.cuda.current_device() == 0 and torch.zeros(1, device="cuda").device == FIRST
    with torch.cuda.device(1):
        assert torch.zeros(1, device="cuda").device == SECOND
        assert torch.zeros(1).cuda().device == SECOND and torch.cuda.max_memory_allocated() == 2
    with torch.cuda.device_of(torch.zeros(1, device="cuda:1")), torch.cuda.device_of(torch.zeros(1)):
        assert torch.cuda.current_device() == 1
    torch.cuda.set_device("cuda:1")
    assert torch.cuda.current_device() == 1 == torch.accelerator.current_device_index()
    with ThreadPoolExecutor(1) as pool:  # a thread begins with the first device
        assert pool.submit(torch.cuda.current_device).result() == 0
    assert not torch.equal(torch.cuda.get_rng_state("cuda:0"), torch.cuda.get_rng_state())


def check_threads() -> None:
    ours, wrong = torch.randn(2, device="cuda"), []

    def work() -> None:
        try:
            ours + torch.randn(2)
        except RuntimeError as error:
            wrong.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(wrong) == 1 and "same device" in wrong[0]


def check_triton_launches() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def double(x, n: tl.constexpr):
        at = tl.arange(0, n)
        tl.store(x + at, 2 * tl.load(x + at))

    for device in (FIRST, SECOND):
        x = torch.ones(4, device=device)
        with torch.cuda.device(device):
            double[(1,)](x, 4)
        assert x.tolist() == [2.0] * 4
    refused(lambda: double[(1,)](x, 4), words="launched on cuda:0 with tensors of cuda:1")


def check_a_violation_that_is_caught_is_reported() -> None:
    try:
        torch.ones(2, device="cuda") + torch.ones(2)
    except RuntimeError:
        return
    raise AssertionError("nothing was raised")


def main(words: list[str]) -> None:
    globals()[words[0]]()
