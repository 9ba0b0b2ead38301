import pytest
import torch
from test_quantized import SPECS, random_code
from torch import nn

from vqdm.layers.decoded import DecodedWeight
from vqdm.layers.int8 import round_layer
from vqdm.layers.quantized import QuantizedConv2d, swap


def layers() -> list[nn.Module]:
    """One of each kind."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(8, 4, 3), nn.Linear(16, 8), nn.Conv2d(8, 4, 3))
    swap(model, "0", SPECS[0]).set_code(random_code(SPECS[0], 8, 16))
    swap(model, "1", SPECS[0]).set_code(random_code(SPECS[0], 4, 72))
    round_layer(model, "2")
    round_layer(model, "3")
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
