"""Variable rate: the column groups of one layer have codes of different widths. Loaded, no longer made.

A codebook for that holds one codebook of every width w = 0..b, one after another: that of width w begins at entry
2^w − 1 and has 2^w entries, the only one of width 0 being zero. Codes count from the beginning of the whole.

Letters: O rows, I columns; p, g = out and in group size; R = O/p row groups, G = I/g column groups; w [G] widths, whose
sum is the bits of a row group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def first_entries(widths: Tensor) -> Tensor:
    """Where the codebooks of the widths [G] begin: int64 [G]."""
    return 2 ** widths.to(torch.int64) - 1


def width_slice(width: int) -> slice:
    """The entries of the codebook of one width."""
    return slice(2**width - 1, 2 ** (width + 1) - 1)


def offsets(widths: Tensor) -> Tensor:
    """First bit of every column group in a row group: int64 [G]."""
    widths = widths.to(torch.int64)
    return widths.cumsum(0) - widths


def row_bytes(rows: int, row_bits: int) -> int:
    """Bytes of so many row groups."""
    return -(-rows * row_bits // 8)


def pack_rows(codes: Tensor, widths: Tensor) -> Tensor:
    """Pack codes [R, G], column j in `widths[j]` bits, little end first, rows without a gap: uint8 [row_bytes].

    Raises ValueError when a code is not one of its group's width.
    """
    local, widths = codes.to(torch.int64) - first_entries(widths), widths.to(torch.int64)
    if ((local < 0) | (local >> widths > 0)).any():
        raise ValueError("a code is out of the range of its group's width")
    group = torch.arange(len(widths), device=widths.device).repeat_interleave(widths)  # of every bit of a row
    place = torch.arange(len(group), device=widths.device) - offsets(widths)[group]
    bits = ((local[:, group] >> place) & 1).to(torch.uint8).view(-1)  # [R, row_bits] → [R·row_bits]
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_rows(packed: Tensor, widths: Tensor, rows: int) -> Tensor:
    """The inverse of `pack_rows`: int64 [R, G]."""
    widths = widths.to(torch.int64)
    row_bits = widths.sum()
    first = torch.arange(rows, device=packed.device)[:, None] * row_bits + offsets(widths)  # [R, G]
    return variable_field(packed, first, widths) + first_entries(widths)


def variable_field(packed: Tensor, first: Tensor, widths: Tensor) -> Tensor:
    """Integers of `widths` [G] bits, 16 at most, that begin at the bits `first` [..., G]: int64."""
    byte, last = first >> 3, packed.numel() - 1
    word = torch.zeros_like(first)
    for place in range(3):
        word = word | packed[(byte + place).clamp(max=last)].to(torch.int64) << (8 * place)
    return (word >> (first & 7)) & ((1 << widths) - 1)
