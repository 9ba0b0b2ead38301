"""Bitshift trellis codes (QTIP, arXiv 2406.11235, §3): overlapping windows of a bit stream index one table of values.

    W[r, j] ≈ scale[r] · table[state[r, j]] · input_scales[j]

The rows of a column are coded in segments of T rows. A segment of column j is a ring of T·q_j/4 bits; row t of it owns
the bits from e(t) to e(t + 1), e(t) = ⌊t·q_j/4⌋, and its state is the window of L bits that ends at e(t + 1), the
earliest bit lowest. So a weight takes q_j/4 bits, no start state is stored, and every weight is decoded on its own: a
shift, a mask and a look-up. Columns differ in q_j: more bits where they matter more.

Letters: O rows, I columns; T rows of a segment, S = O/T segments; L bits of a state; q [I] widths, quarter bits per
weight: 0, or from 4 to 4·L.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

UNITS = 4  # of `widths` per bit
FEWEST_ROWS, MOST_ROWS = 64, 512  # of a segment, where the rows divide so
FEWEST_STATE_BITS = 4
TAPS = (0, 1, 2, 4)  # see `table`
OCTAVES, STEPS = 16, 16  # of stored scales: their logarithms in steps of 1/16 octave
MIDDLE = 128  # the stored logarithm of 1


# ------------------------------------------------------------------------------------------------ format


def segment_rows(rows: int) -> int:
    """Rows T of a segment: the most, up to `MOST_ROWS`, that divide the rows; all rows where only a few would."""
    largest = max(T for T in range(1, min(rows, MOST_ROWS) + 1) if rows % T == 0)
    return largest if largest >= min(rows, FEWEST_ROWS) else rows


@cache
def allowed_widths(T: int, L: int) -> tuple[int, ...]:
    """Widths of a column in quarter bits: 0, and those whose segments are whole bits, and no shorter than a state."""
    return (0, *(q for q in range(UNITS, UNITS * L + 1) if T * q % UNITS == 0 and T * q >= UNITS * L))


def check_widths(widths: Tensor, T: int, L: int, segment_bits: int) -> None:
    """Raise ValueError unless `widths` [I] are allowed and add up to the bits of a segment of all columns."""
    known = torch.isin(widths.to(torch.int64), torch.tensor(allowed_widths(T, L), device=widths.device))
    if not known.all() or int(widths.sum(dtype=torch.int64)) * T != UNITS * segment_bits:
        raise ValueError(f"code_widths do not add up to segment_bits {segment_bits}")


@cache
def table(L: int) -> Tensor:
    """The 2^L values of all states, quantiles of the unit Gaussian: float32 values that float16 keeps.

    Which state has which quantile matters: the states that can follow a state, and those that can precede it, differ in
    k leading or k trailing bits, and should lie apart, one in each 2^k-th of the distribution. The i-th highest bit of
    a state's rank is therefore its i-th highest bit plus, modulo 2, some of its lowest bits from the i-th on. Against
    random ranks that is worth 0.1 dB at one bit, 0.3 at two, 0.5 at four.
    """
    state, rank = torch.arange(2**L), torch.zeros(2**L, dtype=torch.int64)
    for i in range(L):
        bit = state >> (L - 1 - i)
        for tap in TAPS:
            if i + tap < L - 1 - i:
                bit = bit ^ (state >> (i + tap))
        rank |= (bit & 1) << (L - 1 - i)
    quantiles = torch.special.ndtri((torch.arange(2**L, dtype=torch.float64) + 0.5) / 2**L)
    return quantiles[rank].to(torch.float16).float()


# ------------------------------------------------------------------------------------------------ bits


def pack(states: Tensor, widths: Tensor, T: int, L: int) -> Tensor:
    """The bit streams of states [O, I], segment by segment and column by column: uint8 [bytes].

    Raises:
        ValueError: the states of a column are no path of the trellis.
    """
    O, I = states.shape  # noqa: E741
    widths = widths.to(torch.int64)
    start, stop, first = _places(widths, T, L, states.device)
    bits = int(widths.sum()) * T // UNITS  # of a segment
    packed = torch.zeros(-(-bits * (O // T) // 8) + 3, dtype=torch.int32, device=states.device)
    for segment, some in enumerate(states.to(torch.int64).reshape(-1, T, I)):  # [T, I]
        k = stop - start
        if ((some ^ (some.roll(1, 0) >> k)) & ((1 << (L - k)) - 1))[:, widths > 0].any() or (some >> L).any():
            raise ValueError("the states of a column are no path of the trellis")
        place = (first + start + segment * bits).view(-1)  # of the first new bit
        fresh = ((some >> (L - k)) & ((1 << k) - 1)).reshape(-1) << (place & 7)
        for byte in range(3):
            packed.index_add_(0, (place >> 3) + byte, ((fresh >> (8 * byte)) & 255).to(torch.int32))
    return packed[:-3].to(torch.uint8)


def unpack(packed: Tensor, widths: Tensor, rows: int, T: int, L: int) -> Tensor:
    """The inverse of `pack`: states [O, I], int64; 0 in columns of width 0, whose weights are zero."""
    widths = widths.to(torch.int64)
    if not packed.numel():
        return torch.zeros(rows, len(widths), dtype=torch.int64, device=packed.device)
    _, stop, first = _places(widths, T, L, packed.device)
    rings = widths * T // UNITS
    segments = torch.arange(rows // T, device=packed.device)[:, None, None] * rings.sum()  # [S, 1, 1]
    return window(packed, first + segments, stop, rings, L).reshape(rows, len(widths))  # [S, T, I] → [O, I]


def window(packed: Tensor, first: Tensor, stop: Tensor, ring: Tensor, L: int) -> Tensor:
    """States: the L bits that end at bit `stop` of rings that begin at bit `first` and have `ring` bits: int64.

    The early rows' windows begin at the end of the ring. All arguments are broadcast.
    """
    wrapped = (L - stop).clamp(min=0)
    early = _field(packed, first + ring - wrapped, wrapped)
    late = _field(packed, first + stop - (L - wrapped), L - wrapped)
    return torch.where(ring > 0, early | (late << wrapped), 0)


def _field(packed: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """The integers of `count` bits, 16 at most, from the bits `first` on, little end first: int64."""
    byte, last = first >> 3, packed.numel() - 1
    word = torch.zeros_like(first)
    for place in range(3):
        word = word | packed[(byte + place).clamp(0, last)].to(torch.int64) << (8 * place)
    return (word >> (first & 7)) & ((1 << count) - 1)


def _places(widths: Tensor, T: int, L: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """First and last bit of every row in its ring [T, I], and first bit of every column's ring in a segment [I]."""
    rows = torch.arange(T, device=device)[:, None]
    rings = widths * T // UNITS
    return rows * widths // UNITS, (rows + 1) * widths // UNITS, rings.cumsum(0) - rings


# ------------------------------------------------------------------------------------------------ scales


@cache
def _mantissas() -> Tensor:
    """2^(i/16) to the 11 bits that float16 keeps: float64 [16]."""
    return (2.0 ** (torch.arange(STEPS, dtype=torch.float64) / STEPS) * 1024).round() / 1024


def scale_values(logarithms: Tensor, exponent: int = 0) -> Tensor:
    """Scales of stored logarithms, uint8 of any shape: about 2^(exponent + (n − 128)/16), 0 for n = 0; float32."""
    steps = logarithms.to(torch.int64) - MIDDLE
    mantissas = _mantissas().to(logarithms.device, torch.float32)
    values = torch.ldexp(mantissas[steps % STEPS], steps.div(STEPS, rounding_mode="floor") + exponent)
    return torch.where(logarithms == 0, 0.0, values)


def scale_logarithms(scales: Tensor, exponent: int = 0) -> Tensor:
    """The nearest stored logarithms of scales >= 0: uint8; 0 where a scale is too small to be stored."""
    steps = (scales.double().clamp(min=1e-300).log2() - exponent) * STEPS
    return (steps.round() + MIDDLE).clamp(0, 255).to(torch.uint8)
