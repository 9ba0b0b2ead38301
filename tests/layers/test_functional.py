"""Gradients of coded layers against autograd through the decoded weight, and what stays in memory meanwhile."""

import gc
import threading
import weakref

import pytest
import torch
from stored_layers import VARIABLE, stored_of, trellis_of
from test_quantized import SPECS, random_code
from torch import nn
from torch.utils.checkpoint import checkpoint

from vqdm.additive.code import CodeSpec
from vqdm.layers import functional
from vqdm.layers.decode import pointwise
from vqdm.layers.functional import Convolution, DecodedWeight, Linear, _idle, coded, free_scratch, scratch
from vqdm.layers.int8 import quantize_int8
from vqdm.layers.quantized import QuantizedConv2d, QuantizedLinear, swap

CONVOLUTIONS = [
    Convolution((3, 3), (1, 1), (1, 1), (1, 1), True),
    Convolution((3, 3), (2, 2), (1, 1), (1, 1), False),
    Convolution((3, 3), (2, 1), (0, 2), (2, 1), True),
    Convolution((1, 1), (1, 1), (0, 0), (1, 1), True),
]


def learned(stored):
    """`stored` with leaves that need gradients, and these."""
    names = [
        name for name in ("codebooks", "scales", "scale_values", "input_scales") if getattr(stored, name) is not None
    ]
    leaves = {name: getattr(stored, name).detach().float().requires_grad_() for name in names}
    return stored._replace(**leaves), list(leaves.values())


def compare(operation, x, stored, bias):
    stored, leaves = learned(stored)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    latent = torch.zeros(stored.shape, requires_grad=True)
    W = stored.working().dequantize()
    plain = operation.forward(x, W, bias)
    weights = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * weights).sum(), [x, bias, *leaves, W])
    found = coded(operation, x, stored, bias, latent)
    torch.testing.assert_close(found, plain)
    gradients = torch.autograd.grad((found * weights).sum(), [x, bias, *leaves, latent])
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


FORMATS = [*SPECS, CodeSpec(2, 3, 4, scale_nbits=3, input_channel_scales=True), CodeSpec(2, 3, 4, out_group_size=4)]
FORMATS += VARIABLE[:2]


@pytest.mark.parametrize("spec", FORMATS, ids=str)
@pytest.mark.parametrize("at_once", [7, 2**14])
def test_gradients_of_a_linear_map(spec, at_once, monkeypatch):
    monkeypatch.setattr(functional, "GROUPS_AT_ONCE", at_once)
    stored, _ = stored_of(spec, 8, 16)
    compare(Linear(), torch.randn(2, 3, 16), stored, torch.randn(8))


@pytest.mark.parametrize("operation", CONVOLUTIONS)
@pytest.mark.parametrize("spec", FORMATS[1:3], ids=str)
def test_gradients_of_a_convolution(operation, spec):
    C = 8
    taps = operation.kernel_size[0] * operation.kernel_size[1]
    stored, _ = stored_of(spec, 6, C * taps)
    compare(operation, torch.randn(2, C, 7, 9), stored, torch.randn(6))


def test_gradients_of_a_trellis_are_zero_where_there_are_no_bits():
    """Whichever way the weight is decoded: in a call, as a matrix, or to be compiled."""
    stored, code = trellis_of(48, 17, 8, log_scales=False)
    compare(Linear(), torch.randn(2, 3, 17), stored, torch.randn(48))
    stored, (_, _, scales) = learned(stored)
    empty = code.widths == 0
    for W in (coded(Linear(), torch.eye(17), stored, None).T, stored.working().dequantize(), pointwise(stored)):
        (found,) = torch.autograd.grad((W * torch.randn(48, 17)).sum(), [scales])
        assert empty.any() and not found[empty].any() and found[~empty].all()


def test_only_what_is_needed_gets_a_gradient():
    stored, _ = stored_of(SPECS[0], 8, 16)
    x = torch.randn(3, 16, requires_grad=True)
    y = coded(Linear(), x, stored, None)
    (found,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(found, stored.working().dequantize().sum(0).expand(3, -1))
    assert not coded(Linear(), x.detach(), stored, None).requires_grad


def test_mixed_types_train():
    layer = QuantizedLinear.like(nn.Linear(16, 8), SPECS[0])
    layer.set_code(random_code(SPECS[0], 8, 16))
    layer.scales = nn.Parameter(layer.scales.float())
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.scales.grad.dtype == torch.float32
    wanted = (x.sum(0) * layer.weight.detach().float()).sum(1) / layer.scales.detach()
    torch.testing.assert_close(layer.scales.grad, wanted, rtol=0.05, atol=0.05)


class Saved:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out."""

    def __init__(self, model):
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes(self, run):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            run()
        return sum(self.kept.values())


def test_no_weight_is_kept_for_the_backward_pass():
    model = nn.Sequential(*[QuantizedLinear.like(nn.Linear(64, 64), CodeSpec(2, 4, 4)) for _ in range(3)])
    for layer in model:
        layer.set_code(random_code(CodeSpec(2, 4, 4), 64, 64))
        layer.scales = nn.Parameter(layer.scales.float())
    x = torch.randn(2, 64)
    assert Saved(model).bytes(lambda: model(x)) == 3 * x.nbytes


def test_activations_of_a_checkpointed_block_are_freed():
    layer = QuantizedConv2d.like(nn.Conv2d(8, 8, 3, padding=1), SPECS[0])
    layer.set_code(random_code(SPECS[0], 8, 72))
    layer.scales = nn.Parameter(layer.scales.float())
    seen = []

    def block(x):
        hidden = x * 2
        seen.append(weakref.ref(hidden))
        return layer(hidden)

    y = checkpoint(block, torch.randn(1, 8, 5, 5, requires_grad=True), use_reentrant=False)
    gc.collect()
    assert seen[0]() is None
    y.sum().backward()
    assert layer.scales.grad.abs().sum() > 0


def layers() -> list[nn.Module]:
    """One of each kind."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(8, 4, 3), nn.Linear(16, 8), nn.Conv2d(8, 4, 3))
    swap(model, "0", SPECS[0]).set_code(random_code(SPECS[0], 8, 16))
    swap(model, "1", SPECS[0]).set_code(random_code(SPECS[0], 4, 72))
    quantize_int8(model, "2")
    quantize_int8(model, "3")
    return list(model)


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
def test_a_weight_reads_as_a_tensor_and_refuses_to_be_set(layer):
    weight = layer.weight
    assert isinstance(weight, DecodedWeight) and type(weight.data) is type(weight + 1) is torch.Tensor
    assert torch.equal(weight.data, layer.plain().weight) and type(layer.plain().weight) is nn.Parameter
    with pytest.raises(RuntimeError, match=r"no adapter can be fused into it; .* call dequantize\(\)"):
        layer.weight.data += 1
    with pytest.raises(RuntimeError, match="cannot be changed"):
        layer.weight.data = weight.data.clone()
    assert torch.equal(layer.weight.data, weight.data)


def test_gradients_pass_a_decoded_weight():
    layer = layers()[0]
    layer.codebooks = nn.Parameter(layer.codebooks.float())
    layer.weight.square().sum().backward()
    assert layer.codebooks.grad.abs().sum() > 0


def test_a_convolution_made_by_numbers_is_a_plain_one():
    assert type(QuantizedConv2d(8, 4, 3, 1, 1, bias=False)) is nn.Conv2d


CPU = torch.device("cpu")


def test_one_buffer_serves_all_and_grows_to_the_largest():
    free_scratch()
    pointers = []
    for shape in ((4, 8), (2, 3), (16, 8), (4, 8)):
        with scratch(shape, torch.float32, CPU) as out:
            assert out.shape == shape
            pointers.append(out.data_ptr())
    assert pointers[0] == pointers[1] and pointers[2] == pointers[3]
    assert [buffer.memory.numel() for buffer in _idle.values()] == [128]


def test_types_have_buffers_of_their_own():
    free_scratch()
    with scratch((4, 4), torch.float32, CPU) as a, scratch((4, 4), torch.float16, CPU) as b:
        assert a.dtype == torch.float32 and b.dtype == torch.float16
    assert len(_idle) == 2


def test_a_nested_call_does_not_overwrite():
    with scratch((4, 4), torch.float32, CPU) as outer:
        outer.fill_(1)
        with scratch((8, 8), torch.float32, CPU) as inner:
            inner.fill_(2)
        with scratch((4, 4), torch.float32, CPU) as again:
            again.fill_(3)
        assert (outer == 1).all()


def test_threads_do_not_share_what_is_lent():
    wrong = []

    def work(value):
        for _ in range(200):
            with scratch((32, 32), torch.float32, CPU) as out:
                out.fill_(value)
                if not (out == value).all():
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_comes_back_after_an_error_and_works_in_and_out_of_inference_mode():
    free_scratch()
    try:
        with torch.inference_mode(), scratch((4, 4), torch.float32, CPU):
            raise KeyError
    except KeyError:
        pass
    assert len(_idle) == 1
    with torch.no_grad(), scratch((4, 4), torch.float32, CPU) as out:
        out.fill_(1)
