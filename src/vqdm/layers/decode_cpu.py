"""Decoding additive codes on the CPU in C, compiled on first use where there is a compiler, and kept in a cache.

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
LAYER = Struct("7P 4q 10i 32x")  # Layer of native_decode.c, which fills in the rest
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
    scales = stored.scale_matrix() if stored.scales is None else stored.scales
    factors = None if stored.input_scales is None else readable(stored.input_scales)
    held = readable(stored.codebooks), readable(scales), factors  # until the call is over
    p, (O, I) = stored.spec.out_group_size, stored.shape  # noqa: E741
    rows = max(1, WEIGHTS_AT_ONCE // (I * p))
    layer = _layer(stored, *held, out, rows)
    if library().vqdm_decode(layer, team(), min(torch.get_num_threads(), -(-O // (p * rows)))):
        raise MemoryError(f"no memory for codebooks {list(stored.codebooks.shape)} in float32")


def readable(values: Tensor) -> Tensor:
    """`values` in a type and a layout that the C code reads."""
    if values.dtype in TYPES and values.is_contiguous():
        return values
    return (values if values.dtype in TYPES else values.float()).contiguous()


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


@cache
def team() -> ctypes._CFuncPtr | None:
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
