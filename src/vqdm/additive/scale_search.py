"""Error feedback with every row's scale as coarse as it has to be.

Feedback asks a group to make up for the groups before it, so that what it aims at outgrows the weights, the more the
fewer bits there are; and single weights are many times as large as their row's mean. Codebooks end at some length. What
lies beyond is cut off, and later groups, cut off too, cannot make up for it: a coarser grid costs less.

Letters: O rows, I columns; R row groups, n of them; L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, group_columns
from vqdm.additive.encode import feedback_encode, together

STEP = 1.2  # from one scale to the next
TRIALS = 10  # at most; the largest scale is six times the first
# Of a search for codes: it takes little longer with several scales of few rows than with one.
ROWS_AT_ONCE = {"cpu": 2**9, "cuda": 2**14}


def searched_feedback(
    W: Sequence[Tensor],
    H: Sequence[Tensor],
    codes: Sequence[AdditiveCode],
    factors: Sequence[Tensor],
    feedback: Sequence[Tensor],
    beam_size: int,
) -> list[AdditiveCode]:
    """`feedback_encode` of L layers of one shape with larger and larger scales; each row group keeps its best.

    A row group is done at the first scale that is no better than the one before. Args: W [O, I], H [I, I], codes as
    they begin, and what `feedback_factors` gives, of every layer.
    """
    found = together(feedback_encode, W, codes, factors, feedback, beam_size=beam_size)
    layers = [_LayerSearch.of(*one) for one in zip(W, H, found, strict=True)]
    trial = 1
    while trial <= TRIALS and any(layer.pending.any() for layer in layers):
        rows = first_of([layer.pending for layer in layers])
        at_once = ROWS_AT_ONCE.get(W[0].device.type, 1) // (len(layers) * len(rows[0]))
        count = min(max(1, at_once), TRIALS + 1 - trial)
        scales = [STEP ** (trial + k) for k in range(count)]
        some = [tries(*one, scales) for one in zip(W, codes, rows, strict=True)]
        tried = together(feedback_encode, *zip(*some, strict=True), factors, feedback, beam_size=beam_size)
        for layer, own, code in zip(layers, rows, tried, strict=True):
            layer.see(own, code)
        trial += count
    return [layer.best for layer in layers]


@dataclass
class _LayerSearch:
    """A layer with its best code so far, the errors [R] of that, and the row groups [R] that go on to larger scales."""

    W: Tensor
    H: Tensor
    best: AdditiveCode
    least: Tensor
    pending: Tensor

    @classmethod
    def of(cls, W: Tensor, H: Tensor, code: AdditiveCode) -> _LayerSearch:
        best = replace(code, scales=code.scales.clone())  # written to from here on
        least = row_errors(W, H, code)
        return cls(W, H, best, least, torch.ones_like(least, dtype=torch.bool))

    def see(self, rows: Tensor, tried: AdditiveCode) -> None:
        """Keep what is better of the row groups `rows` [n], coded with one scale after another [k·n]."""
        W = self.W[group_columns(rows, tried.spec.out_group_size)]
        starts = range(0, len(tried.codes), len(rows))
        for part in (some_rows(tried, slice(start, start + len(rows))) for start in starts):
            errors = row_errors(W, self.H, part)
            better = self.pending[rows] & (errors < self.least[rows])
            self.pending[rows] = better
            self.least[rows[better]] = errors[better]
            self.best.codes[rows[better]] = part.codes[better]
            self.best.scales[rows[better]] = part.scales[better]


def row_errors(W: Tensor, H: Tensor, code: AdditiveCode) -> Tensor:
    """d H dᵀ over the rows of every row group, for D = W − Ŵ: [R]."""
    D = W - code.dequantize()
    return ((D @ H) * D).sum(1).view(len(code.codes), -1).sum(1)  # [O] → [R, p] → [R]


def some_rows(code: AdditiveCode, rows: Tensor | slice) -> AdditiveCode:
    """The code of some row groups."""
    return replace(code, codes=code.codes[rows], scales=code.scales[rows])


def tries(W: Tensor, code: AdditiveCode, rows: Tensor, scales: Sequence[float]) -> tuple[Tensor, AdditiveCode]:
    """The row groups `rows` [n] of W and of a code, once for each of k multiples of their scales: k·n of them."""
    W, code = W[group_columns(rows, code.spec.out_group_size)], some_rows(code, rows)
    grown = [(code.scales * scale).half().to(code.scales.dtype) for scale in scales]  # as they are stored
    return W.repeat(len(scales), 1), replace(code, codes=code.codes.repeat(len(scales), 1, 1), scales=torch.cat(grown))


def first_of(pending: list[Tensor]) -> list[Tensor]:
    """Where each [R] is true, [n]; filled up with others, so that all layers try as many rows and stay one stack."""
    count = max(int(one.sum()) for one in pending)
    return [one.to(torch.int8).argsort(descending=True, stable=True)[:count].sort().values for one in pending]
