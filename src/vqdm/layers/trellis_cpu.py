"""Decoding a bitshift trellis on the CPU by a page of C, compiled as that of `vqdm.layers.decode_cpu` is.

The bits of a column follow one another, the weights of a row do: threads take tiles of both, in which reading and
writing stay in the cache.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from vqdm.compiled import build
from vqdm.layers.decode_cpu import FLAGS, TYPES, readable, team
from vqdm.layers.stored import Stored, logarithm_values

SOURCE = Path(__file__).with_suffix(".c")
LAYER = Struct("8P 5q 6i 40x")  # Trellis of native_trellis.c, which fills in the rest
LOGARITHMS = len(TYPES)  # the type of scales that are bytes
WEIGHTS_PER_THREAD = 2**15  # below which another one costs more than it gives


def native_trellis(stored: Stored, out: Tensor) -> None:
    """Decode into `out` [O, I], a contiguous CPU tensor of any floating type; float32 inside.

    Raises:
        RuntimeError: the C code cannot be compiled.
        MemoryError: no memory for the table and the scales in float32.
    """
    if out.dtype not in TYPES:
        whole = torch.empty(stored.shape)
        native_trellis(stored, whole)
        out.copy_(whole)
        return
    spec, (O, I), table = stored.spec, stored.shape, readable(stored.codebooks)  # noqa: E741
    scales, scales_type = _scales(stored.scales, stored.scale_logarithms)
    factors, factors_type = _scales(stored.input_scales, stored.input_scale_logarithms)
    values = [logarithm_values(exponent, out.device) for exponent in (0, spec.scale_exponent)]
    held = stored.codes, stored.code_widths, table, scales, factors, *values, out  # until the call is over
    layer = LAYER.pack(
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
    if library().vqdm_trellis(layer, team(), min(torch.get_num_threads(), -(-O * I // WEIGHTS_PER_THREAD))):
        raise MemoryError(f"no memory for {table.numel()} values and {O + I} scales in float32")


def _scales(numbers: Tensor | None, logarithms: Tensor | None) -> tuple[Tensor, int]:
    """Scales as the C code reads them, and their type there."""
    if logarithms is not None:
        return logarithms, LOGARITHMS
    numbers = readable(numbers)
    return numbers, TYPES[numbers.dtype]


@cache
def library() -> ctypes.CDLL:
    """The compiled code. Raises RuntimeError where it cannot be made or loaded."""
    return build(SOURCE, FLAGS)
