"""Decode codes on the CPU in C, which is compiled on first use and cached (`vqdm.compiled`).

One call per layer, from stored tensors to the weight in its dtype, without intermediate arrays. Additive codes are
decoded row by row. The bits of a trellis follow one another down a column, its weights along a row: threads take tiles
of both, which stay in the cache.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqdm.compiled import build

if TYPE_CHECKING:
    from vqdm.layers.decode import Stored

FLAGS = ("-O3", "-march=native", "-ffp-contract=off")  # sums equal to the last bit those of the other backends
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LOGARITHMS = len(TYPES)  # the type of scales that are bytes
LAYER = Struct("7P 4q 10i 32x")  # `Layer` of decode_cpu.c, which fills in the last 32 bytes
TRELLIS = Struct("8P 5q 6i 40x")  # `Trellis` of decode_cpu_trellis.c, likewise
WEIGHTS_AT_ONCE = 2**15  # per thread: few enough to balance the threads, enough to be worth scheduling


def decode_additive(stored: Stored, out: Tensor) -> None:
    """Decode into `out` [O, I], a contiguous CPU tensor of any floating type; float32 inside.

    Raises:
        RuntimeError: the C code cannot be compiled.
        MemoryError: no memory for the codebooks in float32.
    """
    if out.dtype not in TYPES:
        whole = torch.empty(stored.shape)
        decode_additive(stored, whole)
        out.copy_(whole)
        return
    scales = stored.scale_matrix() if stored.scales is None else stored.scales
    factors = None if stored.input_scales is None else readable(stored.input_scales)
    held = readable(stored.codebooks), readable(scales), factors  # until the call is over
    p, (O, I) = stored.spec.out_group_size, stored.shape  # noqa: E741
    rows = max(1, WEIGHTS_AT_ONCE // (I * p))
    layer = _layer(stored, *held, out, rows)
    if library("decode_cpu").vqdm_decode(layer, team(), min(torch.get_num_threads(), -(-O // (p * rows)))):
        raise MemoryError(f"no memory for codebooks {list(stored.codebooks.shape)} in float32")


def _layer(stored: Stored, books: Tensor, scales: Tensor, factors: Tensor | None, out: Tensor, rows: int) -> bytes:
    spec, (R, G), codes, widths = stored.spec, stored.groups, stored.codes.data_ptr(), stored.code_widths
    return LAYER.pack(
        codes,
        codes + stored.codes.numel(),
        books.data_ptr(),
        scales.data_ptr(),
        0 if factors is None else factors.data_ptr(),
        out.data_ptr(),
        0 if widths is None else widths.data_ptr(),
        R,
        G,
        spec.row_bits or G * spec.num_codebooks * spec.nbits_per_codebook,
        rows,
        spec.num_codebooks,
        spec.nbits_per_codebook,
        spec.out_group_size,
        spec.in_group_size,
        spec.groupwise_codebooks,
        scales.numel() > R,
        TYPES[books.dtype],
        TYPES[scales.dtype],
        0 if factors is None else TYPES[factors.dtype],
        TYPES[out.dtype],
    )


def decode_trellis(stored: Stored, out: Tensor) -> None:
    """Decode into `out` [O, I], a contiguous CPU tensor of any floating type; float32 inside.

    Raises:
        RuntimeError: the C code cannot be compiled.
        MemoryError: no memory for the table and the scales in float32.
    """
    if out.dtype not in TYPES:
        whole = torch.empty(stored.shape)
        decode_trellis(stored, whole)
        out.copy_(whole)
        return
    spec, (O, I), table = stored.spec, stored.shape, readable(stored.codebooks)  # noqa: E741
    scales, scales_type = _scales(stored.scales, stored.scale_logarithms)
    factors, factors_type = _scales(stored.input_scales, stored.input_scale_logarithms)
    held = (
        stored.codes,
        stored.code_widths,
        table,
        scales,
        factors,
        *stored.scale_tables(),
        out,
    )  # until the call is over
    layer = TRELLIS.pack(
        *(tensor.data_ptr() for tensor in held),
        stored.codes.numel(),
        O,
        I,
        spec.segment_rows,
        spec.segment_bits,
        spec.nbits_per_codebook,
        TYPES[table.dtype],
        scales_type,
        factors_type,
        TYPES[out.dtype],
        0,
    )
    if library("decode_cpu_trellis").vqdm_trellis(
        layer, team(), min(torch.get_num_threads(), -(-O * I // WEIGHTS_AT_ONCE))
    ):
        raise MemoryError(f"no memory for {table.numel()} values and {O + I} scales in float32")


def _scales(numbers: Tensor | None, logarithms: Tensor | None) -> tuple[Tensor, int]:
    """Return scales as the C code reads them, and their type there."""
    if logarithms is not None:
        return logarithms, LOGARITHMS
    numbers = readable(numbers)
    return numbers, TYPES[numbers.dtype]


def readable(values: Tensor) -> Tensor:
    """Return `values` in a dtype and layout that the C code reads."""
    if values.dtype in TYPES and values.is_contiguous():
        return values
    return (values if values.dtype in TYPES else values.float()).contiguous()


@cache
def team() -> ctypes._CFuncPtr | None:
    """Return `GOMP_parallel` of the OpenMP that torch has loaded, or None.

    Its threads also multiply torch's matrices; a second pool would compete with them for the cores.
    """
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another OpenMP, or a system without such a look-up
        return None


@cache
def library(name: str) -> ctypes.CDLL:
    """Compile and load `name`.c of this folder. Raises RuntimeError if that fails."""
    return build(Path(__file__).with_name(f"{name}.c"), FLAGS)
