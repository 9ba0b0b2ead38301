"""Picking the smallest scores of every row, in a way that is fast on a CPU."""

from __future__ import annotations

from torch import Tensor


def smallest(scores: Tensor, count: int) -> Tensor:
    """Indices [N, min(count, n)] of the smallest of every row of `scores` [N, n], in no order.

    The smallest `count` values lie in the `count` columns of [S, n/S] with the smallest minima, so that a minimum
    over the first axis, which is fast, leaves little to the selection, which is slow.
    """
    N, n = scores.shape
    S = _segments(n, count)
    if S == 1:
        return scores.topk(min(count, n), dim=1, largest=False, sorted=False).indices
    columns = scores.view(N, S, n // S)
    picked = _select(columns.amin(1), count)  # [N, count]
    inside = _select(columns.gather(2, picked[:, None].expand(-1, S, -1)).view(N, S * count), count)
    return inside // count * (n // S) + picked.gather(1, inside % count)


def _select(scores: Tensor, count: int) -> Tensor:
    if count == 1:
        return scores.argmin(1, keepdim=True)
    return scores.topk(count, dim=1, largest=False, sorted=False).indices


def _segments(n: int, count: int) -> int:
    """A power of two near √(n/count) that divides n and leaves `count` columns; 1 where there is nothing to gain."""
    S = 1
    while S * S * count < n and n % (2 * S) == 0 and n // (2 * S) >= count:
        S *= 2
    return S
