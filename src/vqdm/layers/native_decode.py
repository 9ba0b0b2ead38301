"""Decoding on the CPU by a page of C, compiled on first use where there is a compiler and kept in the user's cache.

One call a layer, from stored tensors to the weight in its type, without intermediate arrays.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from vqdm.compiled import build
from vqdm.layers.stored import Stored

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off")  # sums to the last bit those of the other ways
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LAYER = Struct("7P 3q 11i 36x")  # as in native_decode.c, which fills in the rest
WEIGHTS_AT_ONCE = 2**15  # that a thread takes: few enough to share evenly, many enough to be worth asking for


def native(stored: Stored, out: Tensor) -> None:
    """Decode into `out` [O, I], a contiguous CPU tensor of any floating type; float32 inside.

    Raises:
        RuntimeError: the C code cannot be compiled.
        MemoryError: no memory for the codebooks in float32.
    """
    if out.dtype not in TYPES:
        whole = torch.empty(stored.shape)
        native(stored, whole)
        out.copy_(whole)
        return
    scales = _readable(stored.scale_matrix() if stored.scales is None else stored.scales)
    books, factors, widths = _readable(stored.codebooks), stored.input_scales, stored.code_widths
    factors = None if factors is None else _readable(factors)
    spec, (O, I), codes = stored.spec, stored.shape, stored.codes.data_ptr()  # noqa: E741
    R, G = O // spec.out_group_size, I // spec.in_group_size
    rows = max(1, WEIGHTS_AT_ONCE // (I * spec.out_group_size))
    layer = LAYER.pack(
        codes,
        codes + stored.codes.numel(),
        books.data_ptr(),
        scales.data_ptr(),
        0 if factors is None else factors.data_ptr(),
        out.data_ptr(),
        0 if widths is None else widths.data_ptr(),
        R,
        G,
        rows,
        spec.num_codebooks,
        spec.nbits_per_codebook,
        spec.out_group_size,
        spec.in_group_size,
        spec.groupwise_codebooks,
        scales.numel() > R,
        spec.row_bits or G * spec.num_codebooks * spec.nbits_per_codebook,
        TYPES[books.dtype],
        TYPES[scales.dtype],
        0 if factors is None else TYPES[factors.dtype],
        TYPES[out.dtype],
    )
    if library().vqdm_decode(layer, _team(), min(torch.get_num_threads(), -(-R // rows))):
        raise MemoryError(f"no memory for codebooks {list(stored.codebooks.shape)} in float32")


def _readable(values: Tensor) -> Tensor:
    """`values` in a type and a layout that the C code reads."""
    if values.dtype in TYPES and values.is_contiguous():
        return values
    return (values if values.dtype in TYPES else values.float()).contiguous()


@cache
def _team() -> ctypes._CFuncPtr | None:
    """`GOMP_parallel` of the OpenMP that torch has loaded, where it has one.

    Its threads are those that multiply matrices; other threads beside them would fight them for the cores.
    """
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another OpenMP, or a system that cannot look among what is loaded
        return None


@cache
def library() -> ctypes.CDLL:
    """The compiled code. Raises RuntimeError where it cannot be made or loaded."""
    return build(SOURCE, FLAGS)
