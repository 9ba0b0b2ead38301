"""Decode as one expression of an element's place, which `torch.compile` turns into a single kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqdm.additive.rates import first_entries, offsets, variable_field

if TYPE_CHECKING:
    from vqdm.layers.decode import Stored


def pointwise(stored: Stored) -> Tensor:
    """Return the matrix [O, I] in float32 at least; differentiable in all but the codes. Slow unless compiled.

    Every element reads the bytes of its codes itself, so that nothing between is written to memory.
    """
    spec, (R, G) = stored.spec, stored.groups
    if spec.is_trellis:
        return stored.working().dequantize()  # of plain operations, with nothing that depends on values
    M, K, p, g = spec.num_codebooks, spec.entries, spec.out_group_size, spec.in_group_size
    r, a, j, c = _places(R, p, G, g, stored.codes.device)
    dtype = torch.promote_types(stored.codebooks.dtype, torch.float32)
    flat = stored.codebooks.reshape(-1)
    total = None
    for m in range(M):
        entry = _entry(stored, r, j, m)
        book = j * M + m if spec.groupwise_codebooks else m
        value = flat[((book * K + entry) * p + a) * g + c].to(dtype)  # [R, p, G, g]
        total = value if total is None else total + value
    total = total * _scale(stored, r, j).to(dtype)
    if (input_scales := stored.column_scales()) is not None:
        total = total * input_scales[j * g + c].to(dtype)
    return total.reshape(R * p, G * g)  # [R, p, G, g] → [O, I]


def _entry(stored: Stored, r: Tensor, j: Tensor, m: int) -> Tensor:
    """Return codes that broadcast to [R, p, G, g]."""
    spec, G = stored.spec, stored.groups[1]
    if not spec.row_bits:
        return _field(stored.codes, (r * G + j) * spec.num_codebooks + m, spec.nbits_per_codebook)
    widths = stored.code_widths.to(torch.int64)
    first = r * spec.row_bits + offsets(widths)[j]
    return variable_field(stored.codes, first, widths[j]) + first_entries(widths)[j]


def _places(R: int, p: int, G: int, g: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return indices of every axis that broadcast to [R, p, G, g]."""
    r, a, j, c = (torch.arange(size, device=device) for size in (R, p, G, g))
    return r[:, None, None, None], a[:, None, None], j[:, None], c


def _field(packed: Tensor, index: Tensor, bits: int) -> Tensor:
    """Return the packed integers number `index` of `bits` bits each, little end first."""
    first = index * bits
    byte, shift, last = first >> 3, first & 7, packed.numel() - 1
    word = packed[byte].to(torch.int64)
    if 8 % bits:
        word = word | packed[(byte + 1).clamp(max=last)].to(torch.int64) << 8
    if 8 < bits < 16:
        word = word | packed[(byte + 2).clamp(max=last)].to(torch.int64) << 16
    return (word >> shift) & (2**bits - 1)


def _scale(stored: Stored, r: Tensor, j: Tensor) -> Tensor:
    """Return scales that broadcast to [R, p, G, g]."""
    if stored.scale_codes is None:
        scales = stored.scale_matrix()
        return scales[r, j if scales.shape[1] > 1 else torch.zeros_like(j)]
    level = _field(stored.scale_codes, r * stored.groups[1] + j, stored.spec.scale_nbits)
    return stored.scale_values[r, level]
