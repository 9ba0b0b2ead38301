import json

import pytest
import torch
from safetensors.torch import load_file
from test_hf_text import KINDS, quantized_text_encoder
from torch import nn

from vqdm.additive.code import CodeSpec
from vqdm.conversion import common_spec, export_aqlm, signed
from vqdm.errors import UserError
from vqdm.layers.int8 import int8_layers
from vqdm.layers.quantized import quantized_layers, swap
from vqdm.storage.hf import short_name

SPECS = [CodeSpec(2, 8, 8), CodeSpec(1, 12, 4, out_group_size=2), CodeSpec(3, 3, 4, codebook_value_nbits=5)]


def plain_dequantize(codes, codebooks, scales):
    """Entry by entry, codes read back modulo 2^b."""
    (R, G, M), (_, K, p, g) = codes.shape, codebooks.shape
    out = torch.zeros(R, p, G, g)
    for r in range(R):
        for j in range(G):
            for m in range(M):
                out[r, :, j] += codebooks[m, int(codes[r, j, m]) % K].float()
    return (out * scales.float().view(R, 1, 1, 1)).reshape(R * p, G * g)


def dequantize(codes, codebooks, scales):
    """aqlm's own function where it is installed."""
    try:
        from aqlm.utils import _dequantize_weight, unpack_int_data
    except ImportError:
        return plain_dequantize(codes, codebooks, scales)
    nbits = codebooks.shape[1].bit_length() - 1
    return _dequantize_weight(unpack_int_data(codes, nbits), codebooks.float(), scales.float())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("part", KINDS)
def test_every_layer_decodes_to_the_same_weight(tmp_path, part, spec):
    model = quantized_text_encoder(part, spec)
    weights = {name: layer.decoded_matrix() for name, layer in quantized_layers(model).items()}
    rounded = next(iter(int8_layers(model)))
    expected_plain = model.get_submodule(rounded).weight
    export_aqlm(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, expected in weights.items():
        codes, codebooks, scales = (tensors[f"{name}.{key}"] for key in ("codes", "codebooks", "scales"))
        assert codes.dtype == (torch.int8 if spec.nbits_per_codebook <= 8 else torch.int16)
        assert codebooks.dtype == torch.float16 and scales.shape == (codes.shape[0], 1, 1, 1)
        torch.testing.assert_close(dequantize(codes, codebooks, scales), expected)
        assert f"{name}.bias" in tensors
    assert torch.equal(tensors[f"{rounded}.weight"], expected_plain)
    config = json.loads((tmp_path / "config.json").read_text())
    written = config["quantization_config"]
    assert written["quant_method"] == "aqlm" and written["num_codebooks"] == spec.num_codebooks
    assert short_name(rounded) in written["linear_weights_not_to_quantize"]
    assert ("text_projection" in written["linear_weights_not_to_quantize"]) == (part == "text_encoder_2")
    assert not any(short_name(name) in written["linear_weights_not_to_quantize"] for name in weights)


def test_stock_transformers_loads_it(tmp_path):
    pytest.importorskip("aqlm")
    model = quantized_text_encoder("text_encoder", CodeSpec(1, 12, 8))
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).last_hidden_state
    export_aqlm(model, tmp_path)
    again = KINDS["text_encoder"].from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).last_hidden_state, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("nbits", [1, 7, 8, 9, 16])
def test_signed_codes_come_back_modulo_their_range(nbits):
    codes = torch.arange(2**nbits, dtype=torch.int32)
    packed = signed(codes, nbits)
    assert packed.min() == -(2 ** (nbits - 1)) and torch.equal(packed.long() % 2**nbits, codes.long())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (CodeSpec(2, 4, 4, scale_nbits=4), "layer 0 has scale_nbits 4; aqlm holds 0 only"),
        (CodeSpec(1, 4, 4, shared_codebooks="shared", row_bits=5), "layer 0 has row_bits 5; aqlm holds 0 only"),
        (CodeSpec(2, 4, 4, groupwise_codebooks=True), "layer 0 has groupwise_codebooks True"),
        (CodeSpec(2, 4, 4, input_channel_scales=True), "layer 0 has input_channel_scales True"),
        (CodeSpec(3, 4, 4), "layer 1 has num_codebooks 2, 0 has 3; aqlm holds one for all layers"),
    ],
)
def test_what_the_format_cannot_hold_is_named(spec, words):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(4, 4, 1))
    for name, own in (("0", spec), ("1", CodeSpec(2, 4, 4))):
        swap(model, name, own)  # what is refused is seen without a code
    with pytest.raises(UserError, match=words):
        common_spec(quantized_layers(model))


def test_convolutions_and_plain_models_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    with pytest.raises(UserError, match="no layer is quantized"):
        common_spec(quantized_layers(model))
    swap(model, "0", CodeSpec(2, 4, 4))
    with pytest.raises(UserError, match="layer 0 is a convolution"):
        common_spec(quantized_layers(model))
