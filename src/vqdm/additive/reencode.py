"""Moving a coded matrix by changing a few codes: for wished moves of groups, the codes that come nearest to them.

Each group (a row group at a column group) is encoded under a metric of its own, r ↦ Σ_a r_a A r_aᵀ over its rows r_a,
with codebooks and scales as they are.

Letters: p, g = out and in group size; d = p·g; R row groups, G column groups; M codebooks of K entries; N groups that
are to move; B hypotheses (beam).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode
from vqdm.additive.encode import rows_at_once, smallest
from vqdm.additive.rates import width_slice
from vqdm.additive.viterbi import viterbi


class Move(NamedTuple):
    """New codes for N groups.

    Attributes:
        codes: [N, M].
        moved: by how much the decoded groups change, [N, p, g].
        gain: by how much the wish comes nearer in the group's metric, [N]; 0 where no code is nearer.
    """

    codes: Tensor
    moved: Tensor
    gain: Tensor


def nearest_moves(code: AdditiveCode, at: Tensor, wishes: Tensor, metrics: Tensor, beam_size: int) -> Move:
    """The codes of the groups `at` [N] (r·G + j) that come nearest to their decoded values plus `wishes` [N, p, g].

    `metrics` A [N, g, g] are symmetric and positive. A group keeps its present codes where no others are nearer.
    """
    present, unit = code.codes.flatten(0, 1)[at].long(), _units(code, at)  # [N, M], [N, 1, g]
    move = Move(present.clone(), torch.zeros_like(wishes), torch.zeros_like(wishes[:, 0, 0]))
    for some, codebooks, first in _shares(code, at):
        found = _nearest(codebooks, present[some] - first, unit[some], wishes[some], metrics[some], beam_size)
        for whole, part in zip(move, found._replace(codes=found.codes + first), strict=True):
            whole[some] = part
    return move


def nearest_paths(code: AdditiveCode, at: Tensor, wishes: Tensor, weights: Tensor) -> Move:
    """`nearest_moves` of a trellis: the rings `at` [N] (s·I + j) are searched anew, under weights [N, T] of their rows.

    Groups are rings: p = T rows of segment s in column j, g = 1. None has a width of 0. Codes are states [N, T].
    """
    T, columns = code.spec.segment_rows, at % code.codes.shape[1]
    segments = at // code.codes.shape[1]
    scales = code.scales[:, 0].float().view(-1, T)[segments]  # [O] → [S, T] → [N, T]
    unit = scales * code.input_scales.float()[columns][:, None]
    present = ring_states(code.codes, T)[segments, columns].long()  # [N, T]
    values = code.codebooks.float().flatten()
    now = values[present]
    targets = now + wishes[:, :, 0] / torch.where(unit == 0, 1.0, unit)
    metric = weights * unit.square()
    metric = metric / metric.mean(1, keepdim=True).clamp(min=torch.finfo(metric.dtype).tiny)
    found = viterbi(targets, metric, values, code.widths[columns].cpu())
    moved = (values[found.long()] - now) * unit
    before, after = wishes[:, :, 0].square(), (wishes[:, :, 0] - moved).square()
    gain = ((before - after) * weights).sum(1)
    nearer = gain > 0
    codes = torch.where(nearer[:, None], found.to(present), present)
    return Move(codes, (moved * nearer[:, None])[:, :, None], torch.where(nearer, gain, 0.0))


def ring_states(codes: Tensor, T: int) -> Tensor:
    """A view of a trellis's states [O, I, 1] by rings: [S, I, T]."""
    return codes.view(-1, T, codes.shape[1]).transpose(1, 2)


def _shares(code: AdditiveCode, at: Tensor) -> Iterator[tuple[slice | Tensor, Tensor, int]]:
    """Which of the groups `at` [N] share entries, these as codebooks [M, K', p, g], and the first one's number."""
    columns = at % code.codes.shape[1]
    if code.spec.groupwise_codebooks:
        for j in columns.unique().tolist():
            yield columns == j, code.codebooks[j].float(), 0
    elif code.widths is not None:
        widths = code.widths.to(at.device)[columns]
        for width in widths.unique().tolist():
            entries = width_slice(width)
            yield widths == width, code.codebooks[:, entries].float(), entries.start
    else:
        yield slice(None), code.codebooks.float(), 0


def _nearest(codebooks: Tensor, present: Tensor, unit: Tensor, wishes: Tensor, metrics: Tensor, beam_size: int) -> Move:
    """`nearest_moves` of groups that have the same codebooks."""
    now = _sums(codebooks, present)  # [N, p, g]
    target = now + wishes / torch.where(unit == 0, 1.0, unit)
    found = encode_under(target, metrics * unit * unit.transpose(1, 2), codebooks, beam_size)
    moved = (_sums(codebooks, found) - now) * unit
    gain = _squares(wishes, metrics) - _squares(wishes - moved, metrics)
    nearer = gain > 0
    codes = torch.where(nearer[:, None], found, present)
    return Move(codes, moved * nearer[:, None, None], torch.where(nearer, gain, 0.0))


def _units(code: AdditiveCode, at: Tensor) -> Tensor:
    """What the sums of entries are multiplied by in the groups `at`, scales times input scales: [N, 1, g]."""
    G, g = code.codes.shape[1], code.spec.in_group_size
    rows, columns = at // G, at % G
    s = code.scales[rows, columns if code.scales.shape[1] > 1 else 0].float()  # [N]
    t = s.new_ones(G * g) if code.input_scales is None else code.input_scales.float()
    return s[:, None, None] * t.view(G, 1, g)[columns]


def _sums(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Sums of entries [N, p, g] of `codebooks` [M, K, p, g]."""
    return sum(codebooks[m][codes[:, m]] for m in range(len(codebooks)))


def _squares(values: Tensor, metrics: Tensor) -> Tensor:
    """Σ_a v_a A v_aᵀ [N] of `values` [N, p, g]."""
    return (values @ metrics * values).sum((1, 2))


def encode_under(targets: Tensor, metrics: Tensor, codebooks: Tensor, beam_size: int) -> Tensor:
    """Codes [N, M] whose entries of `codebooks` [M, K, p, g] sum up to about `targets` [N, p, g] under their metrics.

    A beam over the codebooks in their order, as `encode.encode_vectors`, which has one metric for all.
    """
    parts = torch.arange(len(targets), device=targets.device).split(
        rows_at_once(targets, beam_size * codebooks.shape[1])
    )
    return torch.cat([_encode_under(targets[part], metrics[part], codebooks, beam_size) for part in parts])


def _encode_under(targets: Tensor, metrics: Tensor, codebooks: Tensor, beam_size: int) -> Tensor:
    N, (M, K) = len(targets), codebooks.shape[:2]
    rows = torch.arange(N, device=targets.device)[:, None]
    residual = targets[:, None]  # [N, B, p, g]
    codes = torch.empty(N, 1, 0, dtype=torch.int64, device=targets.device)  # [N, B, m]
    for m in range(M):
        pulled = residual @ metrics[:, None]  # [N, B, p, g]
        # (r − c) A (r − c)ᵀ = r A rᵀ − 2 r A cᵀ + ⟨A, cᵀ c⟩
        norms = metrics.flatten(1) @ (codebooks[m].transpose(1, 2) @ codebooks[m]).flatten(1).T  # [N, K]
        scores = (pulled * residual).sum((2, 3))[..., None] + norms[:, None]
        scores = scores - 2 * pulled.flatten(2) @ codebooks[m].flatten(1).T  # [N, B, K]
        picks = smallest(scores.flatten(1), beam_size if m < M - 1 else 1)  # [N, B']
        above, entries = picks // K, picks % K
        residual = residual[rows, above] - codebooks[m][entries]
        codes = torch.cat([codes[rows, above], entries[..., None]], dim=2)
    return codes[:, 0]


def within(limit: Tensor, move: Move) -> Tensor:
    """Which moves to make: those of the largest gains whose squared sizes add up to no more than `limit`; bool [N].

    Moves without gain are never made. Equal gains go by their place, so that the choice is the same everywhere.
    """
    order = move.gain.sort(descending=True, stable=True).indices
    made = torch.zeros_like(order, dtype=torch.bool)
    made[order] = move.moved.square().sum((1, 2))[order].cumsum(0) <= limit
    return made & (move.gain > 0)
