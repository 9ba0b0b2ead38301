"""Decoding a bitshift trellis on CUDA: one Triton kernel from packed bits to the weight, written once in its type.

Imported only where it runs, since it needs Triton; `vqdm.layers.decode` chooses. A program decodes a tile: in a column
neighbors share bytes, in a row they lie side by side in the weight: a tile is read one way and written the other.

Letters as in `vqdm.additive.trellis`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqdm.additive.trellis import UNITS
from vqdm.layers.decode_triton import _variable_field
from vqdm.layers.stored import Stored, logarithm_values

ROWS, COLUMNS = 64, 32  # of a tile, whose program has four warps


def decode(stored: Stored, out: Tensor) -> None:
    """Decode into `out` [O, I], contiguous, float16, bfloat16 or float32; products in float32."""
    spec, (O, I) = stored.spec, stored.shape  # noqa: E741
    rings = stored.code_widths.to(torch.int64) * spec.segment_rows // UNITS
    across, down = triton.cdiv(I, COLUMNS), triton.cdiv(spec.segment_rows, ROWS)
    logarithms = stored.scale_logarithms is not None, stored.input_scale_logarithms is not None
    values = [logarithm_values(exponent, out.device) for exponent in (0, spec.scale_exponent)]
    with torch.cuda.device_of(out):  # Triton launches on the current device, whatever its tensors lie on
        _decode[(O // spec.segment_rows * down * across,)](
            stored.codes,
            stored.codebooks.contiguous(),
            stored.scale_logarithms if logarithms[0] else stored.scales.contiguous(),
            stored.input_scale_logarithms if logarithms[1] else stored.input_scales.contiguous(),
            *values,
            stored.code_widths,
            rings.cumsum(0) - rings,
            out,
            I,
            spec.segment_rows,
            spec.segment_bits,
            down,
            across,
            L=spec.nbits_per_codebook,
            LOGARITHMS=logarithms[0],
            INPUT_LOGARITHMS=logarithms[1],
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )


@triton.jit
def _decode(
    codes,
    table,
    scales,
    input_scales,
    values,
    input_values,
    widths,
    places,
    out,
    I,  # noqa: E741
    T,
    segment_bits,
    down,
    across,
    L: tl.constexpr,
    LOGARITHMS: tl.constexpr,
    INPUT_LOGARITHMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    segment = (tile // (down * across)).to(tl.int64)  # bits and weights may be more than 2^31
    top = tile // across % down * ROWS
    t, j = top + tl.arange(0, ROWS), tile % across * COLUMNS + tl.arange(0, COLUMNS)
    within, inside = t < T, j < I
    live = inside[:, None] & within[None, :]  # [COLUMNS, ROWS]
    q = tl.load(widths + j, mask=inside, other=0).to(tl.int32)
    ring = (q.to(tl.int64) * T // 4)[:, None]
    first = (segment * segment_bits + tl.load(places + j, mask=inside, other=0))[:, None]
    stop = ((t + 1)[None, :] * q[:, None]) // 4
    late = tl.minimum(stop, L)  # bits of the window that lie in the ring before its row ends
    live = live & (q > 0)[:, None]
    state = _variable_field(codes, first + stop - late, late, live)
    if top < L:  # the windows of early rows begin at the end of the ring
        early = L - late
        state = (state << early) | _variable_field(codes, first + ring - early, early, live & (early > 0))
    weight = tl.trans(tl.load(table + tl.where(live, state, 0)).to(tl.float32))  # [ROWS, COLUMNS]
    r = segment * T + t
    weight *= _scales(scales, r, within, values, LOGARITHMS)[:, None]
    weight *= _scales(input_scales, j, inside, input_values, INPUT_LOGARITHMS)[None, :]
    place = r[:, None] * I + j[None, :]
    tl.store(out + place, weight.to(out.dtype.element_ty), mask=within[:, None] & inside[None, :])


@triton.jit
def _scales(scales, places, live, values, LOGARITHMS: tl.constexpr):
    """Scales in float32, of which bytes stand for one of 256 values."""
    scale = tl.load(scales + places, mask=live, other=0)
    if LOGARITHMS:
        scale = tl.load(values + scale.to(tl.int32))
    return scale.to(tl.float32)
