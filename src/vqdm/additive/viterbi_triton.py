"""Viterbi search over rings of a bitshift trellis as a Triton kernel: one program searches one ring, in one launch.

Imported only where it runs, since it needs Triton; `vqdm.additive.viterbi` chooses and has the definition.

The costs of all 2^L states stay in registers. A step takes their minimum over the first k bits of a state, writes the
choices to a workspace in global memory, and spreads the minima over the last k bits. Only the traceback reads choices.

Letters: N rings of T rows; L bits of a state; q quarter bits per row, k of them new in one row: K, the whole bits of q,
or one more.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqdm.additive import viterbi
from vqdm.additive.scoring import ENVIRONMENT, asked_for
from vqdm.additive.trellis import UNITS
from vqdm.errors import UserError

log = logging.getLogger("vqdm")

WORKSPACE = 2**28  # bytes of choices at once
STATES_PER_THREAD, MOST_WARPS = 16, 32
MOST_STATE_BITS = 14  # beyond, costs and values of the states do not fit in the registers of a program

_UNITS = tl.constexpr(UNITS)
_UNREACHABLE = tl.constexpr(viterbi.UNREACHABLE)
_failures: dict[tuple[torch.device, int, int, bool], str | None] = {}


def search(targets: Tensor, weights: Tensor, values: Tensor, q: int, around: int) -> Tensor:
    """`viterbi.plain_search` by the kernel: int32 states [N, T].

    The first search of a kind is checked on one ring. Where the kernel fails, plain torch does it, with one warning.

    Raises:
        UserError: the kernel is asked for by name and does not work.
    """
    device = targets.device
    kind = device, viterbi.state_bits(values), q // UNITS, q % UNITS == 0
    if kind not in _failures:
        _failures[kind] = _failure(targets[:1], weights[:1], values, q, around)
    if not (reason := _failures[kind]):
        return launch(targets, weights, values, q, around)
    if name := asked_for():
        raise UserError(f"{ENVIRONMENT} is {name}, whose Viterbi search does not work on {device}: {reason}")
    _warn(device, reason)
    return viterbi.plain_search(targets, weights, values, q, around)


def _failure(targets: Tensor, weights: Tensor, values: Tensor, q: int, around: int) -> str | None:
    """Why the kernel cannot be used, found by comparing its states with those of plain torch; None where it can."""
    if (L := viterbi.state_bits(values)) > MOST_STATE_BITS:
        return f"it has room for states of {MOST_STATE_BITS} bits, not {L}"
    try:
        found = launch(targets, weights, values, q, around)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a compiler or a driver may raise is not known
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    same = torch.equal(found, viterbi.plain_search(targets, weights, values, q, around))
    return None if same else "its states are not those of torch"


@cache
def _warn(device: torch.device, reason: str) -> None:
    log.warning("Viterbi search on %s: torch, slower than Triton, which fails: %s", device, reason)


def launch(targets: Tensor, weights: Tensor, values: Tensor, q: int, around: int) -> Tensor:
    """`search` without a check, as many rings at once as `WORKSPACE` has room for."""
    (N, T), L = targets.shape, viterbi.state_bits(values)
    rows, choices_per_row = max(T, 2 * around), 2 ** (L - q // UNITS)
    size = rows * choices_per_row * choice_type(q).itemsize
    at_once = max(1, min(N, WORKSPACE // size))
    choices = torch.empty(at_once, rows, choices_per_row, dtype=choice_type(q), device=targets.device)
    states = torch.empty(N, T, dtype=torch.int32, device=targets.device)
    targets, weights, values = targets.contiguous(), weights.contiguous(), values.contiguous()
    with torch.cuda.device(targets.device) if targets.is_cuda else nullcontext():
        for start in range(0, N, at_once):
            rings = (tensor[start : start + at_once] for tensor in (targets, weights, states))
            grid = (min(at_once, N - start),)
            _viterbi[grid](*rings, values, choices, T, q, around, rows, **settings(L, q))
    return states


def choice_type(q: int) -> torch.dtype:
    """Of the workspace: a choice has as many bits as are new in a row."""
    return torch.uint8 if q <= 8 * UNITS else torch.int16


def settings(L: int, q: int) -> dict[str, int | bool]:
    """Constants that the kernel is compiled for. Products are not fused, so that states equal those of torch."""
    warps = min(MOST_WARPS, max(1, 2**L // (32 * STATES_PER_THREAD)))
    return {"L": L, "K": q // UNITS, "WHOLE": q % UNITS == 0, "num_warps": warps, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["T", "q", "around", "rows"])
def _viterbi(
    targets,
    weights,
    states,
    values,
    choices,
    T,
    q,
    around,
    rows,
    L: tl.constexpr,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
):
    ring = tl.program_id(0).to(tl.int64)
    targets += ring * T
    weights += ring * T
    states += ring * T
    choices += ring * rows * (1 << (L - K))
    every = tl.arange(0, 1 << L)
    table = tl.load(values + every)

    # The state of the last row, from an unconstrained search over the rows around the seam.
    row = around - 1
    cost = _miss(tl.load(targets + row), tl.load(weights + row), table)
    for place in range(2 * around - 1):
        following = tl.where(row == 0, T, row) - 1
        target, weight = tl.load(targets + following), tl.load(weights + following)
        cost = _step(cost, choices + place * (1 << (L - K)), row, q, L, K, WHOLE) + _miss(target, weight, table)
        row = following
    state = tl.argmin(cost, 0)
    tl.debug_barrier()  # choices are read by other threads than wrote them
    for done in range(around - 1):
        row = tl.where(row == T - 1, 0, row + 1)
        state = _before(state, choices + (2 * around - 2 - done) * (1 << (L - K)), row, q, L, K)
    tl.debug_barrier()  # and then written anew

    # The cheapest path from that state once around to itself.
    cost = _miss(tl.load(targets + T - 1), tl.load(weights + T - 1), table)
    cost = tl.where(every == state, cost, _UNREACHABLE)
    for done in range(T - 1):
        row = T - 1 - done
        target, weight = tl.load(targets + row - 1), tl.load(weights + row - 1)
        cost = _step(cost, choices + row * (1 << (L - K)), row, q, L, K, WHOLE) + _miss(target, weight, table)
    _step(cost, choices, 0, q, L, K, WHOLE)  # over the seam
    tl.debug_barrier()
    for row in range(T):
        state = _before(state, choices + row * (1 << (L - K)), row, q, L, K)
        tl.store(states + row, state)


@triton.jit
def _miss(target, weight, table):
    d = target - table
    return d * d * weight


@triton.jit
def _new_bits(row, q):
    return (row + 1) * q // _UNITS - row * q // _UNITS


@triton.jit
def _step(cost, choices, row, q, L: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    """The least cost [2^L] of what may come before every state; writes which of them that is."""
    if WHOLE:  # known when compiled, so that there is one branch
        return _least(cost, choices, L, K)
    return _least(cost, choices, L, K) if _new_bits(row, q) == K else _least(cost, choices, L, K + 1)


@triton.jit
def _least(cost, choices, L: tl.constexpr, k: tl.constexpr):
    best, which = tl.min(tl.reshape(cost, [1 << k, 1 << (L - k)]), 0, return_indices=True)  # the first of equal ones
    tl.store(choices + tl.arange(0, 1 << (L - k)), which.to(choices.dtype.element_ty))
    return tl.reshape(tl.broadcast_to(best[:, None], [1 << (L - k), 1 << k]), [1 << L])


@triton.jit
def _before(state, choices, row, q, L: tl.constexpr, K: tl.constexpr):
    """The state of `row` that was chosen before `state` of the row before it."""
    k = _new_bits(row, q)
    shared = state >> k
    return shared | (tl.load(choices + shared).to(tl.int32) << (L - k))
