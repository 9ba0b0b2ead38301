"""What a forward pass holds at its peak: the stored tensors, one decoded layer, the activations."""

import tracemalloc

import pytest
import torch
from test_quantized import random_code
from torch import nn

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.shapes import LiveBytes
from vqdm.layers import decode as decoding
from vqdm.layers.functional import free_scratch
from vqdm.layers.quantized import decoded_once, quantized_layers, swap


@pytest.fixture(autouse=True)
def by_torch(monkeypatch):
    """Without measuring backends first, and with an empty buffer."""
    monkeypatch.setattr(decoding, "_wanted", "torch")
    free_scratch()
    yield
    free_scratch()


SPEC = CodeSpec(3, 8, 8)
SHAPES = [(512, 512), (1024, 512), (512, 1024), (512, 512)]


def model_of_four():
    model = nn.Sequential(*[nn.Linear(columns, rows) for rows, columns in SHAPES]).requires_grad_(False)
    for index, shape in enumerate(SHAPES):
        swap(model, str(index), SPEC).set_code(random_code(SPEC, *shape))
    return model


def peak(run):
    """Bytes of tensors, and of numpy's arrays, at their peaks, beyond what was there before; and what is left."""
    tracemalloc.start()
    with torch.no_grad(), LiveBytes() as live:
        run()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return live.peak + numpy_peak, live.now


def test_a_forward_pass_holds_one_decoded_layer(monkeypatch):
    monkeypatch.setattr(decoding, "GROUPS_PER_BLOCK", 2**11)
    model, x = model_of_four(), torch.randn(4, 512)
    largest = 4 * 1024 * 512
    activations = 4 * 4 * (1024 + 512) * 2  # an input and an output, and a copy of each
    block = 2**11 * (3 * 4 * SPEC.in_group_size + 3 * (4 + 8 + 8))  # values before and after scaling, and indices
    working = block + 4 * 3 * 256 * 8 * 2 + 2**16  # codebooks in float32, Python's own
    held, left = peak(lambda: model(x))
    assert largest < held <= largest + activations + working
    assert left <= largest  # the buffer


def test_the_measure_sees_what_is_kept():
    model, x = model_of_four(), torch.randn(4, 512)
    with decoded_once(model):
        held, left = peak(lambda: model(x))
    assert left >= sum(4 * rows * columns for rows, columns in SHAPES)
    assert held >= left


def test_a_backward_pass_holds_the_weight_and_its_gradient():
    model, x = model_of_four(), torch.randn(4, 512, requires_grad=True)
    layer = quantized_layers(model)["1"]
    layer.scales = nn.Parameter(layer.scales.float())
    y = model(x)
    with LiveBytes() as live:
        y.sum().backward()
    assert layer.scales.grad is not None
    assert live.peak < 4 * 4 * 1024 * 512


def test_a_copy_of_the_weight_is_its_own():
    model = model_of_four()
    first, second = (decoding.decode(layer._stored(), torch.float32) for layer in (model[0], model[3]))
    assert first.data_ptr() != second.data_ptr()
