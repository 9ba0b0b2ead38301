"""The states of a bitshift trellis whose values are nearest to given targets: Viterbi search over rings.

Three implementations give the same states: plain torch (the definition), a page of C on the CPU, and a Triton kernel on
CUDA. Arithmetic is float32, without fused products, in one order. `VQDM_SCORING` chooses, as in `scoring`.

A ring's first state is its last one's successor. It is found first, from an unconstrained search over the rows around
the seam; then comes the search over the whole ring from that state to itself (QTIP, arXiv 2406.11235, §3.3).

Letters: N rings of T rows; L bits of a state; q quarter bits per row, k of them new in one row.
"""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vqdm.additive.scoring import fused_scoring, native_scoring
from vqdm.additive.trellis import UNITS, allowed_widths
from vqdm.compiled import build

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off")
MEMORY = 3  # a decision is settled after so many times the rows that fill a state
UNREACHABLE = 1e30
STATES_PER_THREAD = 2**20  # of all rows, below which a second thread costs more than it gives


def viterbi(targets: Tensor, weights: Tensor, values: Tensor, widths: Tensor) -> Tensor:
    """States [N, T] that nearly minimise Σ_t weight·(target − values[state])² over each ring's closed paths.

    Args:
        targets: float32 [N, T].
        weights: float32 [N, T], >= 0.
        values: float32 [2^L], of the states.
        widths: int64 [N] on the CPU, quarter bits per row, of `allowed_widths`, not 0.

    Returns int32 states on the device of `targets`.

    Raises:
        ValueError: a width is not allowed.
    """
    present, allowed = widths.unique().tolist(), allowed_widths(targets.shape[1], state_bits(values))[1:]
    if wrong := set(present) - set(allowed):
        raise ValueError(f"widths {sorted(wrong)} are not allowed for rings of {targets.shape[1]} rows")
    if native_scoring(targets):
        return _native(targets, weights, values, widths)
    search = plain_search
    if fused_scoring(targets) is not None:
        from vqdm.additive.viterbi_triton import search
    states = torch.empty(targets.shape, dtype=torch.int32, device=targets.device)
    for q in present:
        rings = (widths == q).nonzero()[:, 0].to(targets.device)
        states[rings] = search(targets[rings], weights[rings], values, q, overlap(q, targets.shape[1], values))
    return states


def overlap(q: int, T: int, values: Tensor) -> int:
    """Rows on each side of the seam that decide on the state there."""
    return min(T, -(-MEMORY * UNITS * state_bits(values) // q))


def state_bits(values: Tensor) -> int:
    """L, given the values of all states."""
    return len(values).bit_length() - 1


# ------------------------------------------------------------------------------------------------ plain torch


def plain_search(targets: Tensor, weights: Tensor, values: Tensor, q: int, around: int) -> Tensor:
    """`viterbi` of rings of one width."""
    T = targets.shape[1]
    seam = [*range(around - 1, -1, -1), *range(T - 1, T - 1 - around, -1)]  # rows in the order of the search
    first = _best_path(targets, weights, values, q, seam, None)[:, around]  # [N], of the last row
    path = _best_path(targets, weights, values, q, [*range(T - 1, -1, -1), T - 1], first)  # [N, T + 1]
    return path[:, :T].flip(1).to(torch.int32)


def _best_path(
    targets: Tensor, weights: Tensor, values: Tensor, q: int, rows: list[int], ends: Tensor | None
) -> Tensor:
    """States [N, len(rows)] of the cheapest path over `rows`, each the one before the last; from and to `ends` [N]."""
    L, N = state_bits(values), len(targets)

    def misses(row: int) -> Tensor:  # [N, 2^L]
        d = targets[:, row, None] - values
        return d * d * weights[:, row, None]

    cost, choices = misses(rows[0]), []
    if ends is not None:
        closed = torch.full_like(cost, UNREACHABLE)
        cost = closed.scatter(1, ends[:, None], cost.gather(1, ends[:, None]))
    for place, row in enumerate(rows[:-1]):
        k = _new_bits(row, q)
        best, choice = cost.view(N, 2**k, -1).min(1)  # [N, 2^(L-k)]
        choices.append(choice)
        last = ends is not None and place == len(rows) - 2  # the state of the seam has been paid for
        following = best.repeat_interleave(2**k, dim=1)
        cost = following if last else following + misses(rows[place + 1])
    state = cost.argmin(1) if ends is None else ends
    path = [state]
    for row, choice in zip(reversed(rows[:-1]), reversed(choices), strict=True):
        k = _new_bits(row, q)
        shared = path[-1] >> k
        path.append(shared | (choice.gather(1, shared[:, None])[:, 0] << (L - k)))
    return torch.stack(path[::-1], dim=1)


def _new_bits(row: int, q: int) -> int:
    """The bits that a row's state adds to that of the row before it."""
    return (row + 1) * q // UNITS - row * q // UNITS


# ------------------------------------------------------------------------------------------------ C


class _Rings(ctypes.Structure):
    """As in viterbi.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("targets", "weights", "table", "widths", "states")),
        *((name, ctypes.c_int64) for name in ("N", "T", "L", "memory", "next")),
    )


def _native(targets: Tensor, weights: Tensor, values: Tensor, widths: Tensor) -> Tensor:
    """`viterbi` on the CPU. Raises RuntimeError where the C code cannot be compiled."""
    run, (N, T), L = library().vqdm_viterbi, targets.shape, state_bits(values)
    states = torch.empty(N, T, dtype=torch.int32)
    inputs = targets.contiguous(), weights.contiguous(), values.contiguous(), widths.to(torch.int32)
    rings = _Rings(*(tensor.data_ptr() for tensor in (*inputs, states)), N, T, L, MEMORY * UNITS * L, 0)

    def search(_: int) -> None:  # as many rings as are left
        costs, choices = _workspace(T, L)
        run(ctypes.byref(rings), ctypes.c_void_p(costs.data_ptr()), ctypes.c_void_p(choices.data_ptr()))

    threads = min(torch.get_num_threads(), N, N * T * len(values) // STATES_PER_THREAD)
    if threads > 1:
        list(_pool(os.getpid(), threads).map(search, range(threads)))
    else:
        search(0)
    return states


class _Block(ctypes.Structure):
    """As in viterbi.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("targets", "original", "feedback", "scales", "weights", "table")),
        *((name, ctypes.c_void_p) for name in ("gains", "errors", "stretches", "levels", "widths")),
        *((name, ctypes.c_void_p) for name in ("difference", "column_scales", "states", "units")),
        *((name, ctypes.c_int64) for name in ("columns", "O", "T", "L", "memory", "stretch_count")),
        ("largest", ctypes.c_float),
    )


def feedback_block(
    targets: Tensor,
    original: Tensor,
    feedback: Tensor,
    rows: tuple[Tensor, Tensor],
    widths: Tensor,
    choice: tuple,
    T: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Error feedback through a block of n columns in C, on the CPU; all float32.

    Args:
        targets, original: [n, O], a column a row.
        feedback: [n, n].
        rows: scales [O], and weights [O] of squared errors in units of these.
        widths: int32 [n].
        choice: values [2^L], gains [n] and errors [n] of the widths, stretches, levels [256], largest; see viterbi.c.
        T: rows of a ring.

    Returns differences [n, O], column scales [n], and states int32 [n, O].
    """
    n, O = targets.shape  # noqa: E741
    *tensors, largest = choice
    L = state_bits(tensors[0])
    found = torch.empty(n, O), torch.empty(n), torch.empty(n, O, dtype=torch.int32)
    inputs = [one.contiguous() for one in (targets, original, feedback, *rows, *tensors, widths)]
    memory = torch.empty(O)
    pointers = [tensor.data_ptr() for tensor in (*inputs, *found, memory)]
    block = _Block(*pointers, n, O, T, L, MEMORY * UNITS * L, len(tensors[3]), largest)
    costs, choices = _workspace(T, L)
    library().vqdm_feedback_block(
        ctypes.byref(block), ctypes.c_void_p(costs.data_ptr()), ctypes.c_void_p(choices.data_ptr())
    )
    return found


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that stay for the next column; a forked process needs its own."""
    return ThreadPoolExecutor(threads)


_local = threading.local()


def _workspace(T: int, L: int) -> tuple[Tensor, Tensor]:
    """Costs [2, 2^L] and choices of the search; kept by each thread, since fresh memory is slow."""
    held = getattr(_local, "workspace", None)
    if held is None or held[0].numel() < 2 * 2**L or len(held[1]) < T * 2**L:
        held = _local.workspace = torch.empty(2, 2**L), torch.empty(T * 2**L, dtype=torch.uint8)
    return held


@cache
def library() -> ctypes.CDLL:
    """The compiled code. Raises RuntimeError where it cannot be made or loaded."""
    return build(SOURCE, FLAGS)
