"""One stage of the in-group beam as a Triton kernel: scoring and selection at once, no score written to memory.

Imported only where it runs, since it needs Triton; `vqdm.additive.scoring` chooses.

Letters: N vectors of d values; B hypotheses for each; K entries of a codebook; T places of a running selection,
a power of two. A leading … in a shape is nothing, or L for L problems, each with a codebook of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PRECISIONS = ("ieee", "tf32x3", "tf32")
SCORES_AT_ONCE = 2048  # of one program: 64-bit keys for them fill half the registers of four warps
LEAST_SIDE = 16  # of a block that tl.dot multiplies

_LAST = tl.constexpr(2**63 - 1)  # the key after all others
_FIRST = tl.constexpr(-(2**63))


def best_entries(
    residuals: Tensor, codebook: Tensor, count: int, precision: str = "ieee"
) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest ‖r_b − c_k‖² of every vector over all hypotheses b and entries k.

    Of equal ones, those with the least b·K + k.

    Args: `residuals` [..., N, B, d] and `codebook` [..., K, d], float32 on one device, B·K < 2^31; `count`;
    `precision` of the products, one of `PRECISIONS`.
    Returns distances, float32, hypotheses and entries, int64, all [..., N, min(count, B·K)], in no order.
    """
    *layers, N, B, d = residuals.shape
    K = codebook.shape[-2]
    count = min(count, B * K)
    distances = torch.empty(*layers, N, count, device=residuals.device)
    picks = torch.empty(*layers, N, count, dtype=torch.int64, device=residuals.device)
    if picks.numel():
        blocks = _blocks(B, K, d, count)
        grid = (triton.cdiv(N, blocks["BLOCK_N"]), *(layers or [1]))
        arguments = residuals.contiguous(), codebook.contiguous(), distances, picks, N, d, K, B
        with torch.cuda.device_of(residuals):  # Triton launches on the current device, whatever its tensors lie on
            _best_entries[grid](*arguments, count=count, PRECISION=precision, **blocks)
    return distances, picks // K, picks % K


def _blocks(B: int, K: int, d: int, count: int) -> dict[str, int]:
    """Sizes of a program's blocks: at least as large as tl.dot demands, else about `SCORES_AT_ONCE` scores."""
    hypotheses = triton.next_power_of_2(B)
    vectors = max(1, 2 * LEAST_SIDE // hypotheses)
    entries = min(triton.next_power_of_2(K), SCORES_AT_ONCE // (vectors * hypotheses))
    return {
        "BLOCK_N": vectors,
        "BLOCK_B": hypotheses,
        "BLOCK_K": max(LEAST_SIDE, entries),
        "BLOCK_D": max(LEAST_SIDE, triton.next_power_of_2(d)),
        "BLOCK_T": triton.next_power_of_2(count),
    }


@triton.jit
def _best_entries(
    residuals,
    codebook,
    distances,
    picks,
    N,
    d,
    K,
    B,
    count: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    layer = tl.program_id(1).to(tl.int64)
    residuals += layer * N * B * d
    codebook += layer * K * d
    distances += layer * N * count
    picks += layer * N * count
    rows = tl.arange(0, BLOCK_N * BLOCK_B)  # vectors × hypotheses
    hypotheses = rows % BLOCK_B
    live = (first + rows // BLOCK_B < N) & (hypotheses < B)
    dims = tl.arange(0, BLOCK_D)
    at = ((first + rows // BLOCK_B) * B + hypotheses)[:, None] * d + dims[None, :]
    r = tl.load(residuals + at, mask=live[:, None] & (dims < d)[None, :], other=0.0)
    places = tl.arange(0, BLOCK_T).to(tl.int64)
    # Empty places hold the last keys of all, all different; places past `count` hold what never yields.
    best = tl.where(places < count, _LAST - 1 - places, _FIRST)[None, :] + tl.zeros([BLOCK_N, 1], tl.int64)
    for start in range(0, K, BLOCK_K):
        entries = start + tl.arange(0, BLOCK_K)
        inside = (entries < K)[None, :] & (dims < d)[:, None]
        c = tl.load(codebook + entries[None, :] * d + dims[:, None], mask=inside, other=0.0)
        scores = tl.sum(r * r, 1)[:, None] + tl.sum(c * c, 0)[None, :] - 2 * tl.dot(r, c, input_precision=PRECISION)
        keys = _key(scores, hypotheses[:, None] * K + entries[None, :])
        keys = tl.where(live[:, None] & (entries < K)[None, :], keys, _LAST)
        best = _merge(best, keys, BLOCK_N, BLOCK_B)
    vectors = first + tl.arange(0, BLOCK_N)
    kept = (vectors < N)[:, None] & (places < count)[None, :]
    out = vectors[:, None] * count + places[None, :]
    tl.store(distances + out, _score(best), mask=kept)
    tl.store(picks + out, best & 0xFFFFFFFF, mask=kept)


@triton.jit
def _merge(best, keys, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr):
    """`best` [BLOCK_N, T] with every one of `keys` [BLOCK_N·BLOCK_B, K] that is less than the last of its row.

    After the first blocks of entries few keys are, so that most blocks cost one minimum.
    """
    least = tl.min(tl.reshape(tl.min(keys, 1), [BLOCK_N, BLOCK_B]), 1)
    last = tl.max(best, 1)
    while tl.max((least < last).to(tl.int32), 0) > 0:
        best = tl.where((best == last[:, None]) & (least < last)[:, None], least[:, None], best)
        taken = tl.reshape(tl.broadcast_to(least[:, None], [BLOCK_N, BLOCK_B]), [BLOCK_N * BLOCK_B])
        keys = tl.where(keys == taken[:, None], _LAST, keys)
        least = tl.min(tl.reshape(tl.min(keys, 1), [BLOCK_N, BLOCK_B]), 1)
        last = tl.max(best, 1)
    return best


@triton.jit
def _key(scores, index):
    """int64 that sort as (score, index) do: a float's bits in the upper half, in the order of signed integers."""
    bits = scores.to(tl.int32, bitcast=True)
    return (_ordered(bits).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def _score(key):
    return _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _ordered(bits):
    """Negative floats' bits the other way round; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
