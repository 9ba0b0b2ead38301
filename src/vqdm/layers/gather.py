"""Decoding on the CPU without a compiler: numpy gathers of whole codebook entries.

numpy reads words at any byte and copies rows of 16 and 32 bytes at a few cycles each; torch's gathers take two to three
times as long.

Letters as in `vqdm.additive.code`; d = p·g values of an entry; n groups; a record is the M·b bits of a group's codes.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqdm.additive.code import packed_bytes
from vqdm.additive.rates import first_entries, offsets, row_bytes
from vqdm.layers.parts import in_parts
from vqdm.layers.stored import Stored

WORD = 8  # bytes read at once: at least a code and the seven bits before it
JOINT_BITS = 12  # codebooks are added up beforehand while all sums of their entries are no more than 2^12


def gather(stored: Stored, out: Tensor) -> None:
    """Decode into `out` [O, I], a CPU tensor of any floating type; float32 inside."""
    if stored.spec.row_bits:
        table, places = stored.codebooks.detach()[0].flatten(1).float().numpy(), _Places.of(stored)
        in_parts(stored, out, lambda part, values: _decode_variable(stored, table, places, part, values.numpy()))
        return
    tables = _tables(stored)
    in_parts(stored, out, lambda part, values: _decode_part(stored, tables, part, values.numpy()))


def _joint(M: int, b: int, n: int) -> int:
    """How many of the first codebooks one table serves; few groups pay for a small table only.

    Only the first: sums are then taken from left to right as elsewhere, and equal to the last bit.
    """
    return min(M, max(1, min(JOINT_BITS, n.bit_length() - 2) // b))


def _tables(stored: Stored) -> list[tuple[int, int, np.ndarray]]:
    """First bit in the record, bits, and table [2^bits (·G), d], for the joint codebooks and every one after them."""
    spec, (R, G) = stored.spec, stored.groups
    b, d = spec.nbits_per_codebook, spec.out_group_size * spec.in_group_size
    codebooks = stored.codebooks.detach()
    if spec.groupwise_codebooks:
        books = codebooks.movedim(1, 0).reshape(spec.num_codebooks, -1, d).float().numpy()  # [M, G·K, d]
        return [(m * b, b, book) for m, book in enumerate(books)]
    books = codebooks.reshape(spec.num_codebooks, -1, d)
    if spec.num_codebooks * spec.entries * 4 <= R * G or books.dtype != torch.float16:
        books = books.float()
    joint = _joint(spec.num_codebooks, b, R * G)
    rest = [(m * b, b, books[m].numpy()) for m in range(joint, spec.num_codebooks)]
    return [(0, joint * b, _sums(books[:joint].float().numpy() if joint > 1 else books[:1].numpy())), *rest]


def _sums(books: np.ndarray) -> np.ndarray:
    """All sums [K^m, d] of an entry from each of `books` [m, K, d]; the first's entries run fastest."""
    table = books[0]
    for book in books[1:]:
        K, d = book.shape
        repeated = np.repeat(book, len(table), axis=0).reshape(K, -1)  # a sum over rows of d values alone is slow
        table = (repeated + table.reshape(-1)).reshape(-1, d)
    return table


def _decode_part(stored: Stored, tables: list, part: slice, values: np.ndarray) -> None:
    """The `values` [n, d] of some row groups."""
    spec, G = stored.spec, stored.groups[1]
    record = spec.num_codebooks * spec.nbits_per_codebook
    codes = _bytes_of(stored.codes, part.start * G, len(values), record)
    for run, (first, bits, table) in enumerate(tables):
        indices = _field(codes, len(values), record, first, bits)
        if spec.groupwise_codebooks:
            indices += np.tile(np.arange(0, G * spec.entries, spec.entries), len(values) // G)
        _take(table, indices, values, add=run > 0)
    _scale(stored, part, values)


class _Places(NamedTuple):
    """Of variable rate, by column group: first bit in a row group, mask, and the first entry; int64 [G] each."""

    first: np.ndarray
    mask: np.ndarray
    entry: np.ndarray

    @classmethod
    def of(cls, stored: Stored) -> _Places:
        widths = stored.code_widths.to(torch.int64)
        entry = first_entries(widths)
        return cls(offsets(widths).numpy(), entry.numpy(), entry.numpy())  # the mask of w bits is 2^w − 1 as well


def _decode_variable(stored: Stored, table: np.ndarray, places: _Places, part: slice, values: np.ndarray) -> None:
    """The `values` [n, d] of some row groups whose codes have different widths; `table` [K, d]."""
    row_bits, rows = stored.spec.row_bits, part.stop - part.start
    start = part.start * row_bits // 8
    codes = stored.codes.numpy()[start : start + row_bytes(rows, row_bits)].astype(np.int64)
    codes = np.concatenate([codes, np.zeros(2, np.int64)])
    words = codes[:-2] | codes[1:-1] << 8 | codes[2:] << 16  # of every byte on
    first = np.arange(rows)[:, None] * row_bits + places.first  # [rows, G]
    # A code of no bits at the very end of a row begins past the last byte.
    indices = (words[np.minimum(first >> 3, len(words) - 1)] >> (first & 7) & places.mask) + places.entry
    _take(table, indices.reshape(-1), values, add=False)
    _scale(stored, part, values)


def _bytes_of(packed: Tensor, first: int, n: int, bits: int) -> np.ndarray:
    """The bytes of n records of `bits` bits from the first, which begins a byte, and some more to read past the end."""
    start = first * bits // 8
    stop = start + packed_bytes(n, bits) + WORD
    codes = packed.numpy()[start:stop]
    missing = stop - start - len(codes)
    return np.concatenate([codes, np.zeros(missing, np.uint8)]) if missing else codes


def _field(codes: np.ndarray, n: int, record: int, first: int, bits: int) -> np.ndarray:
    """Bits first..first + bits of n records of `record` bits: int64 [n].

    Records repeat their place in a byte every few; each of these places is one strided read.
    """
    period = 8 // gcd(record, 8)
    stride = record * period // 8
    units = -(-n // period)
    out = np.empty((units, period), np.int64)
    for place in range(period):
        byte, shift = divmod(place * record + first, 8)
        if bits == 8 and shift == 0:
            out[:, place] = np.ndarray((units,), np.uint8, codes, byte, (stride,))
            continue
        words = np.ndarray((units,), "<i8", codes, byte, (stride,))
        np.bitwise_and(words >> shift if shift else words, (1 << bits) - 1, out=out[:, place])
    return out.reshape(-1)[:n]


def _take(table: np.ndarray, indices: np.ndarray, values: np.ndarray, add: bool) -> None:
    """Put the rows of `table` that `indices` [n] name into `values` [n, d], or add them."""
    if not add and table.dtype == values.dtype:
        np.take(table, indices, axis=0, out=values, mode="clip")
    else:
        found = torch.from_numpy(np.take(table, indices, axis=0, mode="clip")).float()
        torch.from_numpy(values).add_(found) if add else torch.from_numpy(values).copy_(found)


def _scale(stored: Stored, part: slice, values: np.ndarray) -> None:
    """Multiply `values` [n, d] by row or group scales and input scales, in place."""
    scales = stored.scale_matrix()[part].detach().float().numpy()  # [rows, S]
    flat = values.reshape(scales.size, -1)  # what a scale covers lies together: long rows, which numpy is fast at
    np.multiply(flat, scales.reshape(-1, 1), out=flat)
    if stored.input_scales is not None:
        G, g = stored.groups[1], stored.spec.in_group_size
        shaped = values.reshape(-1, G, values.shape[1] // g, g)  # [rows, G, p, g]
        shaped *= stored.input_scales.detach().float().numpy().reshape(G, 1, g)
