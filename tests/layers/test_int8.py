import copy

import pytest
import torch
from torch import nn

from vqdm.layers.int8 import Int8Conv2d, Int8Linear, dequantize_int8, int8_layers, quantize_int8, quantize_rows

CONVOLUTIONS = [
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=(1, 3), dilation=2, padding="same", padding_mode="reflect", bias=False),
    dict(kernel_size=3, groups=2),
]


def decoded(values, scales):
    return values.float() * scales.float().view(-1, *[1] * (values.dim() - 1))


def test_every_row_is_at_least_as_near_as_with_its_largest_value_over_127():
    weight = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    values, scales = quantize_rows(weight)
    plain = (weight.abs().amax(1, keepdim=True) / 127).half().float()
    by_rule = (weight / plain).round() * plain
    ours, rule = ((weight - guess).square().sum(1) for guess in (decoded(values, scales), by_rule))
    assert values.dtype == torch.int8 and scales.dtype == torch.float16
    assert (ours <= rule * 1.0001).all() and ours.sum() < 0.97 * rule.sum()


def test_what_8_bits_hold_comes_back():
    exact = torch.tensor([[-127.0, 3, 127], [0, 0, 0], [0.25, 0, -0.5]])
    values, scales = quantize_rows(exact[:2] / 64)
    assert torch.equal(decoded(values, scales), exact[:2] / 64)
    assert torch.equal(decoded(*quantize_rows(torch.zeros(2, 3))), torch.zeros(2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_values_beyond_float16_scales_are_refused(bad):
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data[1, 2] = bad
    with pytest.raises(ValueError, match="layer 0: the weight has values that are not finite"):
        quantize_int8(model, "0")


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_a_plain_layer_of_the_decoded_weight(bias):
    model = nn.Sequential(nn.Linear(16, 8, bias=bias)).eval()
    plain = model[0]
    layer = quantize_int8(model, "0")
    x = torch.randn(3, 5, 16)
    expected = nn.functional.linear(x, decoded(layer.values, layer.scales), plain.bias)
    torch.testing.assert_close(layer(x), expected)
    assert (layer(x) - plain(x)).norm() < 0.01 * plain(x).norm()
    assert isinstance(layer, nn.Linear) and not layer.training
    assert set(layer.state_dict()) == {"values", "scales"} | ({"bias"} if bias else set())


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_conv_equals_a_plain_layer_of_the_decoded_weight(options):
    model = nn.Sequential(nn.Conv2d(8, 4, **options))
    plain = model[0]
    layer, x = quantize_int8(model, "0"), torch.randn(2, 8, 7, 9)
    plain.weight.data = decoded(layer.values, layer.scales)
    torch.testing.assert_close(layer(x), plain(x))
    dequantize_int8(model)
    assert type(model[0]) is nn.Conv2d and not int8_layers(model)
    torch.testing.assert_close(model.float()(x), plain(x), rtol=1e-2, atol=1e-2)


def test_state_dict_and_deepcopy_keep_the_weight():
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(2, 3, 1))
    for name in ("0", "1"):
        quantize_int8(model, name)
    twin, other = copy.deepcopy(model), nn.Sequential(nn.Linear(16, 8), nn.Conv2d(2, 3, 1))
    for name in ("0", "1"):
        quantize_int8(other, name)
    other.load_state_dict(model.state_dict())
    for k in range(2):
        assert torch.equal(twin[k].weight, model[k].weight) and torch.equal(other[k].weight, model[k].weight)


def test_gradients_reach_the_scales():
    layer = quantize_int8(nn.Sequential(nn.Linear(16, 8)), "0")
    layer.scales = nn.Parameter(layer.scales.float())
    layer(torch.randn(2, 16)).square().sum().backward()
    assert layer.scales.grad.abs().sum() > 0


def test_a_convolution_made_by_numbers_is_a_plain_one():
    assert type(Int8Conv2d(8, 4, 3, 1, 1, bias=False)) is nn.Conv2d
    assert isinstance(Int8Linear(nn.Linear(4, 4)), Int8Linear)
