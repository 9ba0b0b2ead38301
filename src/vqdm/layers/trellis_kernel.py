"""Decoding a bitshift trellis on CUDA: one Triton kernel from packed rings to the weight, written once in its type.

Imported only where it runs, since it needs Triton; `vqdm.layers.decode` chooses.

Letters as in `vqdm.additive.trellis`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqdm.additive.trellis import UNITS
from vqdm.layers.stored import Stored, logarithm_values

ROWS, COLUMNS = 32, 64  # of one program of four warps: a column's bits share lines of cache, a row's weights do


def decode(stored: Stored, out: Tensor) -> None:
    """Decode into `out` [O, I], contiguous, float16, bfloat16 or float32; products in float32."""
    spec, (O, I) = stored.spec, stored.shape  # noqa: E741
    widths = stored.code_widths.to(torch.int64)
    rings = widths * spec.segment_rows // UNITS
    row_values = _values(stored.scales, stored.scale_logarithms, 0)
    column_values = _values(stored.input_scales, stored.input_scale_logarithms, spec.scale_exponent)
    with torch.cuda.device_of(out):  # Triton launches on the current device, whatever its tensors lie on
        _decode[(triton.cdiv(O, ROWS), triton.cdiv(I, COLUMNS))](
            stored.codes,
            stored.codebooks.contiguous(),
            widths,
            rings.cumsum(0) - rings,
            *row_values,
            *column_values,
            out,
            O,
            I,
            spec.segment_rows,
            spec.segment_bits,
            stored.codes.numel() - 1,
            L=spec.nbits_per_codebook,
            LOGARITHMS=spec.log_scales,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )


def _values(scales: Tensor | None, logarithms: Tensor | None, exponent: int) -> tuple[Tensor, Tensor]:
    """Scales or their stored logarithms, and the values that logarithms stand for."""
    if logarithms is None:
        return scales.contiguous(), scales
    return logarithms.contiguous(), logarithm_values(exponent, logarithms.device)


@triton.jit
def _field(codes, first, count, last, live):
    """The integers of `count` bits, 16 at most, that begin at the bits `first`, little end first."""
    byte = first >> 3
    word = tl.load(codes + tl.minimum(byte, last), mask=live, other=0).to(tl.int32)
    word |= tl.load(codes + tl.minimum(byte + 1, last), mask=live, other=0).to(tl.int32) << 8
    word |= tl.load(codes + tl.minimum(byte + 2, last), mask=live, other=0).to(tl.int32) << 16
    return (word >> (first & 7).to(tl.int32)) & ((1 << count) - 1)


@triton.jit
def _scale(scales, values, places, live, LOGARITHMS: tl.constexpr):
    stored = tl.load(scales + places, mask=live, other=0)
    return tl.load(values + stored.to(tl.int32)) if LOGARITHMS else stored.to(tl.float32)


@triton.jit
def _decode(
    codes,
    table,
    widths,
    places,
    scales,
    scale_values,
    input_scales,
    input_scale_values,
    out,
    O,  # noqa: E741
    I,  # noqa: E741
    T,
    segment_bits,
    last,
    L: tl.constexpr,
    LOGARITHMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < O)[:, None] & (column < I)[None, :]
    q = tl.load(widths + column, mask=column < I, other=0)[None, :]  # int64
    segment = (row // T).to(tl.int64)[:, None]
    stop = ((row % T).to(tl.int64)[:, None] + 1) * q // 4  # [ROWS, COLUMNS], where the window ends in its ring
    first = segment * segment_bits + tl.load(places + column, mask=column < I, other=0)[None, :]
    live = inside & (q > 0)
    wrapped = tl.maximum(L - stop, 0)  # bits of the window that lie at the end of the ring
    early = _field(codes, first + q * T // 4 - wrapped, wrapped.to(tl.int32), last, live & (wrapped > 0))
    late = _field(codes, first + stop - (L - wrapped), (L - wrapped).to(tl.int32), last, live)
    state = tl.where(wrapped > 0, early, 0) | (late << wrapped.to(tl.int32))
    value = tl.load(table + tl.where(live, state, 0)).to(tl.float32)
    value = value * _scale(scales, scale_values, row, row < O, LOGARITHMS)[:, None]
    value = value * _scale(input_scales, input_scale_values, column, column < I, LOGARITHMS)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * I + column[None, :], value.to(out.dtype.element_ty), mask=inside)
