"""UNets with random weights and random codes, made where they run: time and memory do not depend on the values."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import nn

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import select_layers
from vqdm.layers.quantized import QuantizedLayer, SharedCodebookModule, cast_plain, quantized_layers, swap

SHARED = "random"


def random_plain(config: dict, dtype: torch.dtype, device: str) -> UNet2DConditionModel:
    """The UNet of a configuration, in full precision."""
    return _made(_empty(config, dtype), device)


def random_coded(config: dict, spec: CodeSpec, dtype: torch.dtype, device: str) -> UNet2DConditionModel:
    """The same with all default layers coded by `spec` and shared codebooks; never larger than that."""
    return _made(empty_coded(config, spec, dtype), device)


def empty_coded(config: dict, spec: CodeSpec, dtype: torch.dtype) -> UNet2DConditionModel:
    """The coded UNet on the meta device."""
    unet = _empty(config, dtype)
    for layer in select_layers(unet, "default", 0, spec.changed(shared_codebooks=SHARED), {}):
        swap(unet, layer.name, layer.spec)
    return unet


def stored_bits(unet: nn.Module) -> float:
    """Stored bits per weight of the coded layers, shared codebooks included."""
    layers = quantized_layers(unet).values()
    shared = {id(module): module for layer in layers for module in layer.shared}
    bits = sum(layer.stored_bits for layer in layers)
    bits += sum(16 * books.numel() for module in shared.values() for books in module.stored_tensors().values())
    return bits / sum(layer._rows * layer._columns for layer in layers)


def _empty(config: dict, dtype: torch.dtype) -> UNet2DConditionModel:
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
    cast_plain(unet, dtype)
    return unet


@torch.no_grad()
def _made(unet: UNet2DConditionModel, device: str) -> UNet2DConditionModel:
    """Memory and values for a model on the meta device."""
    unet = unet.to_empty(device=device)
    torch.manual_seed(0)
    for module in unet.modules():
        if isinstance(module, SharedCodebookModule):
            for books in module.stored_tensors().values():
                books.normal_(std=len(books) ** -0.5)
        elif isinstance(module, QuantizedLayer):
            _fill(module)
        else:
            _fill_plain(module)
    return unet


def _fill(layer: QuantizedLayer) -> None:
    """Codes at random, scales that keep activations in range."""
    layer.codes.random_(0, 256)
    layer.scales.fill_(layer._columns**-0.5)
    if layer.bias is not None:
        layer.bias.zero_()


def _fill_plain(module: nn.Module) -> None:
    for name, tensor in module.named_parameters(recurse=False):
        if tensor.dim() > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        else:
            tensor.fill_(float(name == "weight"))  # a norm's
