"""Decoding on the CPU by a page of C, compiled on first use where there is a compiler and kept in the user's cache.

One call a layer, from stored tensors to the weight in its type, without intermediate arrays.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vqdm.compiled import build
from vqdm.layers.stored import Stored

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off")  # sums to the last bit those of the other ways
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WEIGHTS_AT_ONCE = 2**15  # that a thread takes: few enough to share evenly, many enough to be worth asking for


class _Layer(ctypes.Structure):
    """As in native_decode.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "end", "codebooks", "scales", "input_scales", "out", "widths")),
        ("books", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("R", "G", "rows", "next")),
        *((name, ctypes.c_int32) for name in ("M", "bits", "p", "g", "groupwise", "group_scales", "row_bits")),
        *((f"{name}_type", ctypes.c_int32) for name in ("codebooks", "scales", "out")),
    )


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
    factors = None if stored.input_scales is None else stored.input_scales.float().contiguous()
    held = _readable(stored.codebooks), _readable(scales), factors  # until the call is over
    layer = _layer(stored, *held, out)
    if library().vqdm_decode(ctypes.byref(layer), _team(), min(torch.get_num_threads(), -(-layer.R // layer.rows))):
        raise MemoryError(f"no memory for codebooks {list(stored.codebooks.shape)} in float32")


def _readable(values: Tensor) -> Tensor:
    """`values` in a type and a layout that the C code reads."""
    if values.dtype in TYPES and values.is_contiguous():
        return values
    return (values if values.dtype in TYPES else values.float()).contiguous()


def _layer(stored: Stored, books: Tensor, scales: Tensor, input_scales: Tensor | None, out: Tensor) -> _Layer:
    spec, (R, G), codes = stored.spec, stored.groups, stored.codes.data_ptr()
    return _Layer(
        codes,
        codes + stored.codes.numel(),
        books.data_ptr(),
        scales.data_ptr(),
        None if input_scales is None else input_scales.data_ptr(),
        out.data_ptr(),
        None if stored.code_widths is None else stored.code_widths.data_ptr(),
        None,
        R,
        G,
        max(1, WEIGHTS_AT_ONCE // (stored.shape[1] * spec.out_group_size)),
        0,
        spec.num_codebooks,
        spec.nbits_per_codebook,
        spec.out_group_size,
        spec.in_group_size,
        spec.groupwise_codebooks,
        scales.numel() > R,
        spec.row_bits,
        TYPES[books.dtype],
        TYPES[scales.dtype],
        TYPES[out.dtype],
    )


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
