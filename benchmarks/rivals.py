"""Other packages' weight-only quantization of a denoiser, each optional: `RIVALS[name](model)` changes a plain one.

Whatever a package raises says why it cannot: not installed, or not for this device, type or shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

GROUP = 32  # of weights that share a scale, where a format leaves it open


def bitsandbytes_nf4(model: nn.Module) -> nn.Module:
    """Linear layers in NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in linear_layers(model):
        device = layer.weight.device
        options = dict(bias=layer.bias is not None, compute_dtype=layer.weight.dtype, quant_type="nf4")
        packed = Linear4bit(layer.in_features, layer.out_features, **options, device="meta")
        packed.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4").to(device)
        packed.bias = layer.bias
        model.set_submodule(name, packed)
    return model


def torchao_int4(model: nn.Module) -> nn.Module:
    """Linear layers in int4 by groups, in the first of torchao's layouts that this device takes."""
    from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    if next(model.parameters()).device.type == "cuda":
        config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    else:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    quantize_(model, config, filter_fn=lambda layer, _: isinstance(layer, nn.Linear) and not layer.in_features % GROUP)
    return model


def sdnq(model: nn.Module, bits: int, convolutions: bool) -> nn.Module:
    """Linear layers, and convolutions if asked for, in unsigned integers of `bits` bits."""
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(model, weights_dtype=f"uint{bits}", quant_conv=convolutions, torch_dtype=model.dtype)


def gguf_q4_0(model: nn.Module) -> nn.Module:
    """Linear layers in GGUF's Q4_0, run by diffusers' layers."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q4_0
    for name, layer in linear_layers(model):
        if layer.in_features % GROUP:
            continue
        packed = GGUFLinear(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype, device="meta"
        )
        packed.weight = GGUFParameter(q4_0(layer.weight.data), quant_type=kind)
        packed.bias = layer.bias
        model.set_submodule(name, packed)
    return model


def q4_0(weight: Tensor) -> Tensor:
    """[O, I] as bytes [O, I/32·18]: of every 32 weights a float16 scale, then 4 bits each, the second half above."""
    blocks = weight.float().view(len(weight), -1, GROUP)  # [O, I/32, 32]
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # [O, I/32, 1]
    scale = largest / -8
    levels = (blocks / torch.where(scale == 0, 1, scale) + 8.5).clamp(0, 15).to(torch.uint8)
    low, high = levels.chunk(2, dim=-1)
    return torch.cat([scale.half().view(torch.uint8), low | high << 4], dim=-1).flatten(1)


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Names and modules of plain linear layers."""
    return [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]


RIVALS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bitsandbytes nf4": bitsandbytes_nf4,
    "torchao int4": torchao_int4,
    **{f"sdnq uint{bits}": partial(sdnq, bits=bits, convolutions=False) for bits in (4, 3, 2)},
    **{f"sdnq uint{bits} conv": partial(sdnq, bits=bits, convolutions=True) for bits in (4, 3, 2)},
    "gguf q4_0": gguf_q4_0,
}


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, also of those made of several tensors."""
    tensors = _stored_tensors(model)
    return sum({tensor.untyped_storage(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def bits_on_disk(model: nn.Module) -> int:
    """Bits that a model's parameters and buffers take on disk; float32 numbers count as 16."""
    widths = [
        (tensor.numel(), min(2, tensor.element_size()) if tensor.is_floating_point() else tensor.element_size())
        for tensor in _stored_tensors(model)
    ]
    return sum(8 * count * size for count, size in widths)


def _stored_tensors(model: nn.Module) -> list[Tensor]:
    return [tensor for whole in (*model.parameters(), *model.buffers()) for tensor in _parts(whole)]


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    if getattr(tensor, "quant_state", None) is not None:  # bitsandbytes'
        yield tensor.quant_state.absmax
