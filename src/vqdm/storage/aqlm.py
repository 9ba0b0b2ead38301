"""Text encoders in the `aqlm` format, which stock transformers loads beside the `aqlm` package.

It holds Linear layers of one shape of code, with codebooks of the layer's own and a scale per row (arXiv 2401.06118).

Letters: R, G row and column groups; M codebooks of K = 2^b entries; p, g out and in group size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AqlmConfig, PreTrainedModel

from vqdm.additive.code import CodeSpec
from vqdm.errors import UserError
from vqdm.layers.int8 import dequantize_int8
from vqdm.layers.quantized import QuantizedConv2d, QuantizedLinear, quantized_layers
from vqdm.storage.files import save_json, save_tensors
from vqdm.storage.hf import short_name

SAME = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")
# What the format has no place for, and the only value that it can hold.
NEUTRAL = {"scale_nbits": 0, "groupwise_codebooks": False, "input_channel_scales": False, "row_bits": 0}


def export_aqlm(model: PreTrainedModel, folder: Path) -> AqlmConfig:
    """Write a text encoder as `config.json` and `model.safetensors` in the aqlm format; layers in 8 bit become plain.

    Raises:
        UserError: nothing is quantized, or something that the format cannot hold; names the layer and the setting.
    """
    layers = quantized_layers(model)
    spec = common_spec(layers)
    dequantize_int8(model)
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    config = AqlmConfig(
        **{name: getattr(spec, name) for name in SAME},
        linear_weights_not_to_quantize=[short_name(name) for name in others],
    )
    written = model.config.to_dict() | {"architectures": [type(model).__name__]}
    written["quantization_config"] = config.to_dict() | {"quant_method": "aqlm"}
    save_tensors(aqlm_tensors(model, layers), folder / "model.safetensors", {"format": "pt"})
    save_json(written, folder / "config.json")
    return config


def common_spec(layers: dict[str, nn.Module]) -> CodeSpec:
    """The settings that all layers share. Raises UserError as `export_aqlm`."""
    if not layers:
        raise UserError("no layer is quantized, so there is nothing to export to aqlm")
    first = next(iter(layers))
    for name, layer in layers.items():
        if isinstance(layer, QuantizedConv2d):
            raise UserError(f"layer {name} is a convolution; aqlm holds Linear layers only")
        for key, value in NEUTRAL.items():
            if getattr(layer.spec, key) != value:
                raise UserError(f"layer {name} has {key} {getattr(layer.spec, key)}; aqlm holds {value} only")
        for key in SAME:
            own, others = getattr(layer.spec, key), getattr(layers[first].spec, key)
            if own != others:
                raise UserError(f"layer {name} has {key} {own}, {first} has {others}; aqlm holds one for all layers")
    return layers[first].spec


def aqlm_tensors(model: nn.Module, layers: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """The state of a model with its quantized layers' tensors as aqlm names and lays them out."""
    coded = {f"{name}.{key}" for name, layer in layers.items() for key in layer.stored_tensors()}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in coded}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in layer_tensors(layer).items()}
    return tensors


def layer_tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """`codes` [R, G, M] as signed integers, `codebooks` [M, K, p, g] and `scales` [R, 1, 1, 1] in float16."""
    code = layer.code()
    return {
        "codes": signed(code.codes, layer.spec.nbits_per_codebook),
        "codebooks": code.codebooks.to(torch.float16),
        "scales": code.scales.to(torch.float16)[:, :, None, None],  # [R, 1] → [R, 1, 1, 1]
    }


def signed(codes: Tensor, nbits: int) -> Tensor:
    """Codes 0..2^nbits-1 in two's complement of `nbits` bits, in the narrowest type that aqlm reads them from."""
    wrapped = torch.where(codes >= 2 ** (nbits - 1), codes - 2**nbits, codes)
    return wrapped.to(torch.int8 if nbits <= 8 else torch.int16)
