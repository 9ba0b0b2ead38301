"""Layers of the original VQDM code (arXiv 2409.00492), told by their attributes, as codes of this package.

Its classes live in the module `src.aq`; a layer holds its bias and a `quantized_weight`.

Letters: R, G row and column groups; M codebooks of K entries; p, g out and in group size; n bits of a second-level
code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.documents import first_line
from vqdm.errors import UserError

PREFIX = "src.aq"
CODED = ("QuantizedLinear", "QuantizedConv2D")
SCALE_BITS = (*range(9), 16)


def is_coded(module) -> bool:
    """Whether a (stand-in for a) module is a quantized layer of the original."""
    return type(module).__module__ == PREFIX and type(module).__name__ in CODED


def stored_layer(name: str, layer) -> tuple[CodeSpec, dict[str, Tensor]]:
    """The settings and stored tensors, bias aside, of the original's layer `name`.

    Values are rounded to float16. Codebook values of a second level are looked up and kept in 16 bit, because the
    original shares their tables in another way.

    Raises:
        UserError: it lacks what a layer of the original has, or its settings or values cannot be held.
    """
    try:
        weight = layer._modules["quantized_weight"]
        code = additive_code(weight, getattr(layer, "group_channels", True))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"layer {name} is not one of the original: {first_line(error)}") from None
    tensors = code.pack()
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"layer {name}: its {key} hold values that are not finite in float16")
    return code.spec, tensors


def additive_code(weight, group_channels: bool) -> AdditiveCode:
    """The code of an original `QuantizedWeight`."""
    codes, codebooks = tensor_of(weight, "codes"), codebooks_of(weight)
    banks, M, K, p, g = codebooks.shape
    spec = CodeSpec(
        num_codebooks=M,
        nbits_per_codebook=weight.nbits_per_codebook,
        in_group_size=g,
        out_group_size=p,
        scale_nbits=weight.scale_nbits if weight.scale_nbits in SCALE_BITS else 16,
        groupwise_codebooks=banks > 1,
        input_channel_scales=tensor_of(weight, "input_scales") is not None,
        group_channels=group_channels,
    )
    codes = codes.long() % K  # narrow signed types wrap around
    columns = tensor_of(weight, "input_scales")
    return AdditiveCode(spec, codes, codebooks if banks > 1 else codebooks[0], scales_of(weight), columns)


def codebooks_of(weight) -> Tensor:
    """Codebooks [1 or G, M, K, p, g], those with quantized values as the original looks them up."""
    values = tensor_of(weight, "codebooks").float()
    if weight.codebook_value_nbits >= 16:
        return values
    banks, M, K, p, g = values.shape
    T = weight.codebook_value_num_groups
    split = values.view(banks, M, T, K // T, p, g).permute(2, 4, 5, 0, 1, 3)  # [T, p, g, banks, M, K/T]
    tables = tensor_of(weight, "codebook_value_clusters").float().view(T * p * g, -1)  # [T·p·g, 2^n]
    looked_up = nearest_of(tables, split.reshape(T * p * g, -1)).view(split.shape)
    return looked_up.permute(3, 4, 0, 5, 1, 2).reshape(values.shape)


def scales_of(weight) -> Tensor:
    """Scales [R, 1], or [R, G] where the original has one a group, as it looks them up."""
    if weight.scale_nbits == 0 or weight.scales_are_lossless:
        return tensor_of(weight, "scales").float().flatten(1)
    tables = tensor_of(weight, "scales_clusters").float()  # [R, 2^n]
    if weight.straight_through_gradient:
        return nearest_of(tables, tensor_of(weight, "scales").float().flatten(1))
    return torch.gather(tables, 1, tensor_of(weight, "scales_indices").long())


def nearest_of(tables: Tensor, values: Tensor) -> Tensor:
    """Of each row's `tables` [rows, n] the value nearest to each of `values` [rows, N]."""
    ordered = tables.sort(1).values
    middles = (ordered[:, 1:] + ordered[:, :-1]) / 2
    return torch.gather(ordered, 1, torch.searchsorted(middles.contiguous(), values.contiguous()))


def tensor_of(weight, name: str) -> Tensor | None:
    """A tensor of a module, whether it is a parameter or a plain attribute; None where the original has None."""
    if name in weight._parameters:
        held = weight._parameters[name]
        return None if held is None else held.data
    return getattr(weight, name)
