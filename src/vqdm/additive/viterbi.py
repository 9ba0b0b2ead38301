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
from vqdm.additive.trellis import UNITS
from vqdm.compiled import build

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off")
MEMORY = 3  # a decision is settled after so many times the rows that fill a state
UNREACHABLE = 1e30
RINGS_PER_THREAD = 2**20  # states times rows, below which a second thread costs more than it gives


def viterbi(targets: Tensor, weights: Tensor, values: Tensor, widths: Tensor) -> Tensor:
    """States [N, T] that nearly minimise Σ_t weight·(target − values[state])² over each ring's closed paths.

    Args:
        targets: float32 [N, T].
        weights: float32 [N, T], >= 0.
        values: float32 [2^L], of the states.
        widths: int64 [N] on the CPU, quarter bits per row; a width times T is at least 4·L.

    Returns int32 states on the device of `targets`.
    """
    if native_scoring(targets):
        return _native(targets, weights, values, widths)
    search = plain_search
    if fused_scoring(targets) is not None:
        from vqdm.additive.viterbi_kernel import search  # Triton is not everywhere
    states = torch.empty(targets.shape, dtype=torch.int32, device=targets.device)
    for q in widths.unique().tolist():
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


class _Ring(ctypes.Structure):
    """As in viterbi.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("targets", "weights", "table", "states", "cost", "best", "choices")),
        ("T", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("L", "q", "overlap")),
    )


def _native(targets: Tensor, weights: Tensor, values: Tensor, widths: Tensor) -> Tensor:
    """`viterbi` on the CPU. Raises RuntimeError where the C code cannot be compiled."""
    run, (N, T) = library().vqdm_viterbi, targets.shape
    targets, weights, values = targets.contiguous(), weights.contiguous(), values.contiguous()
    states = torch.empty(N, T, dtype=torch.int32)

    def search(ring: int) -> None:
        q, L = int(widths[ring]), state_bits(values)
        memory = _workspace(T, L)
        rows = (targets[ring], weights[ring], values, states[ring], *memory)
        run(ctypes.byref(_Ring(*(tensor.data_ptr() for tensor in rows), T, L, q, overlap(q, T, values))))

    threads = min(torch.get_num_threads(), N, N * T * len(values) // RINGS_PER_THREAD)
    if threads > 1:
        list(_pool(os.getpid(), threads).map(search, range(N)))
    else:
        for ring in range(N):
            search(ring)
    return states


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that stay for the next column; a forked process needs its own."""
    return ThreadPoolExecutor(threads)


_local = threading.local()


def _workspace(T: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    """Costs, best costs, and choices of the search; kept by each thread, since fresh memory is slow."""
    held = getattr(_local, "workspace", None)
    if held is None or len(held[0]) < 2**L or len(held[2]) < T * 2**L:
        held = torch.empty(2**L), torch.empty(2**L), torch.empty(T * 2**L, dtype=torch.int16)
        _local.workspace = held
    return held


@cache
def library() -> ctypes.CDLL:
    """The compiled code. Raises RuntimeError where it cannot be made or loaded."""
    return build(SOURCE, FLAGS)
