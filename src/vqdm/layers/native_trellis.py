"""Decoding a bitshift trellis on the CPU by a page of C; see `vqdm.layers.native_decode`.

Tiles of rows and columns go to several threads: a column's bits follow one another, a row's weights do.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from vqdm.compiled import build
from vqdm.layers.native_decode import FLAGS, TYPES, readable, team
from vqdm.layers.stored import Stored, logarithm_values

SOURCE = Path(__file__).with_suffix(".c")
LOGARITHM = 3  # beside TYPES
LAYER = Struct("8P 5q 6i 32x")  # Trellis of native_trellis.c, which fills in the rest
TILE = 64 * 64
CPU = torch.device("cpu")


def native(stored: Stored, out: Tensor) -> None:
    """Decode a trellis into `out` [O, I], a contiguous CPU tensor of any floating type; float32 inside.

    Raises:
        RuntimeError: the C code cannot be compiled.
        MemoryError: no memory for the table and the scales in float32.
    """
    if out.dtype not in TYPES:
        whole = torch.empty(stored.shape)
        native(stored, whole)
        out.copy_(whole)
        return
    spec, (O, I) = stored.spec, stored.shape  # noqa: E741
    scales, scales_type, values = _scales(stored.scales, stored.scale_logarithms, 0)
    factors, factors_type, input_values = _scales(
        stored.input_scales, stored.input_scale_logarithms, spec.scale_exponent
    )
    held = stored.codes, stored.code_widths, readable(stored.codebooks), scales, factors, values, input_values, out
    layer = LAYER.pack(
        *(tensor.data_ptr() for tensor in held),
        stored.codes.numel(),
        O,
        I,
        spec.segment_rows,
        spec.segment_bits,
        spec.nbits_per_codebook,
        TYPES[held[2].dtype],
        scales_type,
        factors_type,
        TYPES[out.dtype],
        0,
    )
    if library().vqdm_trellis(layer, team(), min(torch.get_num_threads(), -(-O * I // TILE))):
        raise MemoryError(f"no memory for {2**spec.nbits_per_codebook} values and {O + I} scales in float32")


def _scales(scales: Tensor | None, logarithms: Tensor | None, exponent: int) -> tuple[Tensor, int, Tensor]:
    """Scales as the C code reads them: numbers or logarithms, their type, and the values of all logarithms."""
    values = logarithm_values(exponent, CPU)
    if logarithms is not None:
        return logarithms.contiguous(), LOGARITHM, values
    scales = readable(scales)
    return scales, TYPES[scales.dtype], values


@cache
def library() -> ctypes.CDLL:
    """The compiled code. Raises RuntimeError where it cannot be made or loaded."""
    return build(SOURCE, FLAGS)
