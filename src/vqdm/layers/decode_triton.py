"""Decode on CUDA: Triton kernels from packed codes to the weight, which they write once, in its dtype.

`vqdm.layers.decode` imports this module only on CUDA devices, since Triton is not installed everywhere. A program of
the trellis kernel decodes a tile: neighbors in a column share bytes, neighbors in a row lie side by side in the weight.

Letters as in `vqdm.additive.code` and `vqdm.additive.trellis`; group n = r·G + j is the j-th of row group r; D = p·g
values per entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqdm.additive.code import offsets
from vqdm.additive.trellis import UNITS

if TYPE_CHECKING:
    from vqdm.layers.decode import Stored

VALUES_AT_ONCE = 2048  # per program of four warps
ROWS, COLUMNS = 64, 32  # of a tile of the trellis kernel, likewise

ROW_SCALES, GROUP_SCALES, PACKED_SCALES = range(3)


def decode_additive(stored: Stored, out: Tensor) -> None:
    """Decode into `out` [O, I], contiguous, float16, bfloat16 or float32; sums in float32."""
    spec, (R, G) = stored.spec, stored.groups
    D = spec.out_group_size * spec.in_group_size
    block = max(1, VALUES_AT_ONCE // triton.next_power_of_2(D))
    scales, scale_codes, kind = _scale_source(stored)
    widths = stored.codes if stored.code_widths is None else stored.code_widths
    places = stored.codes if stored.code_widths is None else offsets(stored.code_widths)
    with torch.cuda.device_of(out):  # Triton launches on the current device, whatever its tensors lie on
        _additive_kernel[(triton.cdiv(R * G, block),)](
            stored.codes,
            stored.codebooks.contiguous(),
            scales.contiguous(),
            scale_codes,
            out if stored.input_scales is None else stored.input_scales,
            widths,
            places,
            out,
            R * G,
            G,
            spec.row_bits,
            M=spec.num_codebooks,
            b=spec.nbits_per_codebook,
            p=spec.out_group_size,
            g=spec.in_group_size,
            OWN_CODEBOOKS=spec.groupwise_codebooks,
            SCALES=kind,
            scale_bits=spec.scale_nbits,
            INPUT_SCALES=stored.input_scales is not None,
            VARIABLE=stored.code_widths is not None,
            BLOCK=block,
            BLOCK_D=triton.next_power_of_2(D),
        )


def _scale_source(stored: Stored) -> tuple[Tensor, Tensor, int]:
    """Return values, packed indices (any tensor if there are none), and how to read them."""
    if stored.scales is None:
        return stored.scale_values, stored.scale_codes, PACKED_SCALES
    return stored.scales, stored.codes, ROW_SCALES if stored.scales.numel() == stored.groups[0] else GROUP_SCALES


@triton.jit
def _additive_kernel(
    codes,
    codebooks,
    scales,
    scale_codes,
    input_scales,
    widths,
    places,
    out,
    N,
    G,
    row_bits,
    M: tl.constexpr,
    b: tl.constexpr,
    p: tl.constexpr,
    g: tl.constexpr,
    OWN_CODEBOOKS: tl.constexpr,
    SCALES: tl.constexpr,
    scale_bits: tl.constexpr,
    INPUT_SCALES: tl.constexpr,
    VARIABLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    # A division of 64 bits is slow; bits and values may be more than 2^31.
    r, j = (n // G).to(tl.int64), (n % G).to(tl.int64)
    n = n.to(tl.int64)
    value = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (value < p * g)[None, :]
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for m in tl.static_range(M):
        if VARIABLE:  # one codebook that holds those of all widths; that of width w begins at entry 2^w − 1
            width = tl.load(widths + j, mask=live, other=0).to(tl.int32)
            first = r * row_bits + tl.load(places + j, mask=live, other=0)
            entry = ((1 << width) - 1).to(tl.int64) + _variable_field(codes, first, width, live)
            at = entry * (p * g)
        else:
            entry = _field(codes, n * M + m, b, live)
            book = j * M + m if OWN_CODEBOOKS else m + tl.zeros_like(j)
            at = (book * (1 << b) + entry) * (p * g)
        total += tl.load(codebooks + at[:, None] + value[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALES == 0:  # a row's
        scale = tl.load(scales + r, mask=live, other=0.0)
    elif SCALES == 1:  # a group's
        scale = tl.load(scales + n, mask=live, other=0.0)
    else:
        level = _field(scale_codes, n, scale_bits, live)
        scale = tl.load(scales + r * (1 << scale_bits) + level, mask=live, other=0.0)
    total *= scale.to(tl.float32)[:, None]
    column = j[:, None] * g + (value % g)[None, :]
    if INPUT_SCALES:
        total *= tl.load(input_scales + column, mask=inside, other=0.0).to(tl.float32)
    row = r[:, None] * p + (value // g)[None, :]
    tl.store(out + row * (G * g) + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _field(packed, index, bits: tl.constexpr, live):
    """The index-th of packed integers of `bits` bits, little end first: int64."""
    first = index * bits
    shift = (first & 7).to(tl.int32)
    word = tl.load(packed + (first >> 3), mask=live, other=0).to(tl.int32)
    # A byte after the first is read only where the integer reaches into it, so that none is past the end.
    if 8 % bits != 0:
        word |= tl.load(packed + (first >> 3) + 1, mask=live & (shift + bits > 8), other=0).to(tl.int32) << 8
    if bits > 8 and bits < 16:
        word |= tl.load(packed + (first >> 3) + 2, mask=live & (shift + bits > 16), other=0).to(tl.int32) << 16
    return ((word >> shift) & ((1 << bits) - 1)).to(tl.int64)


@triton.jit
def _variable_field(packed, first, width, live):
    """Integers of `width` bits, 16 at most, that begin at the bits `first`: int64."""
    shift = (first & 7).to(tl.int32)
    end = shift + width
    word = tl.load(packed + (first >> 3), mask=live & (width > 0), other=0).to(tl.int32)
    word |= tl.load(packed + (first >> 3) + 1, mask=live & (end > 8), other=0).to(tl.int32) << 8
    word |= tl.load(packed + (first >> 3) + 2, mask=live & (end > 16), other=0).to(tl.int32) << 16
    return ((word >> shift) & ((1 << width) - 1)).to(tl.int64)


def decode_trellis(stored: Stored, out: Tensor) -> None:
    """Decode into `out` [O, I], contiguous, float16, bfloat16 or float32; products in float32."""
    spec, (O, I) = stored.spec, stored.shape  # noqa: E741
    rings = stored.code_widths.to(torch.int64) * spec.segment_rows // UNITS
    across, down = triton.cdiv(I, COLUMNS), triton.cdiv(spec.segment_rows, ROWS)
    logarithms = stored.scale_logarithms is not None, stored.input_scale_logarithms is not None
    with torch.cuda.device_of(out):  # Triton launches on the current device, whatever its tensors lie on
        _trellis_kernel[(O // spec.segment_rows * down * across,)](
            stored.codes,
            stored.codebooks.contiguous(),
            stored.scale_logarithms if logarithms[0] else stored.scales.contiguous(),
            stored.input_scale_logarithms if logarithms[1] else stored.input_scales.contiguous(),
            *stored.scale_tables(),
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
def _trellis_kernel(
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
