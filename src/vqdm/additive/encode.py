"""Finding codes: a beam over the codebooks inside a group; error feedback and coordinate descent across groups; the
search for scales that goes with feedback; and re-encoding, which changes a few codes of a coded matrix.

Error feedback is GPTQ (arXiv 2210.17323) in the form of QuIP#'s block LDLQ (arXiv 2402.04396, §4.1): once groups 0..j
are coded, the columns after them may still move, so a group is judged by the Schur complement of the columns after it.

Letters: O rows, I columns; p, g = out and in group size; R = O/p row groups, G = I/g column groups; d = p·g;
M codebooks of K entries; B hypotheses (beam); N vectors. A leading … in a shape is nothing, or L for L layers of one
shape that are coded at once: on a GPU a step for one of them is too small to be worth its launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, group_columns, width_slice
from vqdm.additive.scoring import BestEntries, fused_scoring, native_codes, native_scoring
from vqdm.additive.viterbi import viterbi

MINIMAL_DAMPING = 1e-6  # the least that helps a float32 factorization
SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**27}  # what the cache, or the memory, has room for
COLUMNS_AT_ONCE = 128  # columns between two products with the rest of the matrix

Picks = Callable[[int, Tensor, int, int], tuple[Tensor, Tensor]]


def encode_vectors(targets: Tensor, codebooks: Tensor, beam_size: int) -> Tensor:
    """Codes [..., N, M] whose entries of `codebooks` [..., M, K, d] sum up to about `targets` [..., N, d].

    A beam over the codebooks in their order: the `beam_size` best partial sums go on to the next codebook.
    """
    if native_scoring(targets):
        return native_codes(targets, codebooks, beam_size)
    books = codebooks.movedim(-3, 0).contiguous()  # [M, ..., K, d]
    if best_entries := fused_scoring(targets):
        return _encode_vectors(targets, books, partial(_fused_picks, best_entries, books), beam_size)
    norms = books.square().sum(-1, keepdim=True)  # [M, ..., K, 1]
    # ‖r − c‖² = [r, 1, ‖r‖²] · [−2c, ‖c‖², 1]: one product scores every entry for every hypothesis.
    factors = torch.cat([-2 * books, norms, torch.ones_like(norms)], dim=-1).mT.contiguous()
    scores = targets.shape[:-2].numel() * beam_size * books.shape[-2]  # of a row of every layer
    parts = targets.split(rows_at_once(targets, scores), dim=-2)
    found = [_encode_vectors(part, books, partial(_scored_picks, factors), beam_size) for part in parts]
    return torch.cat(found, dim=-2)


def _encode_vectors(targets: Tensor, books: Tensor, pick: Picks, beam_size: int) -> Tensor:
    M, N = len(books), targets.shape[-2]
    residual = targets  # [..., N·B, d]
    codes = torch.empty(*targets.shape[:-1], 0, dtype=torch.int64, device=targets.device)  # [..., N·B, m]
    rows = torch.arange(N, device=targets.device)[:, None]
    B = 1
    for m in range(M):
        parents, entries = pick(m, residual, B, beam_size if m < M - 1 else 1)  # [..., N, B']
        above, entries = (picks.flatten(-2)[..., None] for picks in (parents + rows * B, entries))  # [..., N·B', 1]
        B = parents.shape[-1]
        residual = take_rows(residual, above) - take_rows(books[m], entries)
        codes = torch.cat([take_rows(codes, above), entries], dim=-1)
    return codes


def take_rows(values: Tensor, picks: Tensor) -> Tensor:
    """The rows `picks` [..., n, 1] of `values` [..., N, d]: [..., n, d]."""
    if values.dim() == 2:
        return values[picks[:, 0]]  # several times as fast on a CPU
    return torch.take_along_dim(values, picks, dim=-2)


def _scored_picks(factors: Tensor, m: int, residual: Tensor, B: int, count: int) -> tuple[Tensor, Tensor]:
    """Hypotheses and entries [..., N, B'] of codebook m that leave the least of `residual` [..., N·B, d]."""
    K = factors.shape[-1]
    norm = residual.square().sum(-1, keepdim=True)
    scores = torch.cat([residual, torch.ones_like(norm), norm], dim=-1) @ factors[m]  # [..., N·B, K]
    picks = smallest(scores.view(-1, B * K), count)  # [(L·)N, B']
    picks = picks.view(*residual.shape[:-2], -1, picks.shape[1])
    return picks // K, picks % K


def _fused_picks(
    best_entries: BestEntries, books: Tensor, m: int, residual: Tensor, B: int, count: int
) -> tuple[Tensor, Tensor]:
    """The same from one kernel, which keeps no scores."""
    _, parents, entries = best_entries(residual.unflatten(-2, (-1, B)), books[m], count)
    return parents, entries


def encode_group(
    targets: Tensor, scales: Tensor, codebooks: Tensor, factor: Tensor, beam_size: int
) -> tuple[Tensor, Tensor]:
    """Code one column group under the metric F Fᵀ.

    Args: `targets` [..., O, g]; `scales` [..., R]; `codebooks` [..., M, K, p, g]; `factor` F [..., g, g].
    Returns codes [..., R, M] and the coded columns [..., O, g].
    """
    M, K, p, g = codebooks.shape[-4:]
    divisors = torch.where(scales == 0, 1.0, scales)[..., None]  # [..., R, 1]
    rotated = row_groups(targets @ factor, p) / divisors  # [..., R, d]
    books = (codebooks.flatten(-4, -2) @ factor).unflatten(-2, (M, K, p)).flatten(-2)  # [..., M, K, d]
    codes = encode_vectors(rotated, books, beam_size)
    values = codebooks.flatten(-2)  # [..., M, K, d]
    chosen = sum(take_rows(values[..., m, :, :], codes[..., m, None]) for m in range(M))  # [..., R, d]
    return codes, (chosen * scales[..., None]).unflatten(-1, (p, g)).flatten(-3, -2)  # [..., R, d] → [..., O, g]


def row_groups(columns: Tensor, p: int) -> Tensor:
    """A column group [..., O, g] as vectors [..., R, p·g]."""
    return columns.unflatten(-2, (-1, p)).flatten(-2)


def feedback_encode(W: Tensor, code: AdditiveCode, factors: Tensor, feedback: Tensor, beam_size: int) -> AdditiveCode:
    """`code` with new codes for W [..., O, I], found group by group from the first column to the last.

    Args: `factors` V_jj [..., G, g, g] and `feedback` [..., I, I] from `feedback_factors`.
    """
    g = code.spec.in_group_size
    difference = torch.zeros_like(W)  # W − Ŵ where coded
    target = W.clone()
    codes = torch.empty_like(code.codes)
    for block in column_blocks(W.shape[-1], g):
        for j in range(block.start // g, block.stop // g):
            done, columns = slice(block.start, j * g), slice(j * g, (j + 1) * g)
            wanted = target[..., columns] + difference[..., done] @ feedback[..., done, columns]
            codes[..., j, :], coded = encode_group(wanted, *group_values(code, j), factors[..., j, :, :], beam_size)
            difference[..., columns] = W[..., columns] - coded
        target[..., block.stop :] += difference[..., block] @ feedback[..., block, block.stop :]
    return replace(code, codes=codes)


def feedback_factors(H: Tensor, g: int, damping: float) -> tuple[Tensor, Tensor]:
    """Block LDL of the damped H = V Vᵀ, V upper triangular: diagonal blocks V_jj [G, g, g], and V V_jj⁻¹ [I, I].

    L = Σ_j ‖((W − Ŵ) V)_j‖², so group j is best coded under V_jj V_jjᵀ towards W_j + Σ_{i<j} (W − Ŵ)_i V_ij V_jj⁻¹.
    """
    I = len(H)  # noqa: E741
    V = damped_cholesky(H.flip(0, 1), damping).flip(0, 1)
    columns = V.view(I, I // g, g).transpose(0, 1)  # [G, I, g]
    factors = torch.stack([V[j : j + g, j : j + g] for j in range(0, I, g)])
    feedback = torch.linalg.solve_triangular(factors, columns, upper=True, left=False)
    return factors, feedback.transpose(0, 1).reshape(I, I)


def damped_cholesky(H: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of H + λI, λ = `damping` · mean diagonal; the identity where H is zero.

    Tries float64, then ten times the damping, and so on, until the factor exists.
    """
    mean = H.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(H), dtype=H.dtype, device=H.device)
    while True:
        for dtype in (H.dtype, torch.float64):
            damped = H.to(dtype, copy=True)
            damped.diagonal().add_(damping * mean)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                return factor.to(H.dtype)
        damping = max(10 * damping, MINIMAL_DAMPING)


def block_factors(H: Tensor, g: int) -> Tensor:
    """Lower Cholesky factors [..., G, g, g] of the diagonal blocks of H [..., I, I], as of `damped_cholesky`."""
    blocks = torch.stack([H[..., j : j + g, j : j + g] for j in range(0, H.shape[-1], g)], dim=-3)
    diagonal = H.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, g))  # [..., G, g]
    damped = blocks.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(MINIMAL_DAMPING * diagonal.mean(-1, keepdim=True))
    factors, failed = torch.linalg.cholesky_ex(damped)
    for index in failed.nonzero().tolist():
        factors[*index] = damped_cholesky(blocks[*index], MINIMAL_DAMPING)
    return factors


def coordinate_descent(W: Tensor, H: Tensor, code: AdditiveCode, beam_size: int) -> AdditiveCode:
    """`code` after every group has moved once to better codes given all others; a row keeps codes that are better.

    With P = (W − Ŵ) H, the best values of group j are Ŵ_j + P_j H_jj⁻¹, and H_jj is their metric.
    Args: `W` [..., O, I] and `H` [..., I, I].
    """
    p, g = code.spec.out_group_size, code.spec.in_group_size
    codes, factors = code.codes.clone(), block_factors(H, g)
    coded = code.dequantize()
    P = (W - coded) @ H
    moved = torch.zeros_like(W)
    for block in column_blocks(W.shape[-1], g):
        for j in range(block.start // g, block.stop // g):
            done, columns = slice(block.start, j * g), slice(j * g, (j + 1) * g)
            factor, now = factors[..., j, :, :], coded[..., columns]
            pull = P[..., columns] - moved[..., done] @ H[..., done, columns]
            wanted = now + over_metric(pull, factor)
            found, values = encode_group(wanted, *group_values(code, j), factor, beam_size)
            before, after = (row_groups((wanted - x) @ factor, p).square().sum(-1) for x in (now, values))
            better = after < before  # [..., R]
            codes[..., j, :] = torch.where(better[..., None], found.to(codes.dtype), codes[..., j, :])
            moved[..., columns] = (values - now) * better.repeat_interleave(p, dim=-1)[..., None]
        P[..., block.stop :] -= moved[..., block] @ H[..., block, block.stop :]
    return replace(code, codes=codes)


def over_metric(rows: Tensor, factor: Tensor) -> Tensor:
    """`rows` [..., O, g] times (F Fᵀ)⁻¹ for a lower triangular F [..., g, g]; `cholesky_solve` has no fast batches."""
    half = torch.linalg.solve_triangular(factor.mT, rows, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def column_blocks(columns: int, g: int) -> list[slice]:
    """Slices of whole groups, about `COLUMNS_AT_ONCE` columns each."""
    width = max(g, COLUMNS_AT_ONCE // g * g)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def group_values(code: AdditiveCode, j: int) -> tuple[Tensor, Tensor]:
    """Scales [..., R] and codebooks [..., M, K, p, g] of column group j."""
    codebooks = code.codebooks.select(-5, j) if code.spec.groupwise_codebooks else code.codebooks
    return code.scales[..., j if code.scales.shape[-1] > 1 else 0], codebooks


# ------------------------------------------------------------------------------------------------ selection


def rows_at_once(rows: Tensor, scores: int) -> int:
    """Return how many of `rows` to score at a time if each has `scores` scores."""
    return max(1, SCORES_AT_ONCE.get(rows.device.type, 2**20) // scores)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Return indices [N, min(count, n)] of the smallest of every row of `scores` [N, n], in any order; fast on a CPU.

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
    """Return a power of two near √(n/count) that divides n and leaves `count` columns; 1 if nothing is gained."""
    S = 1
    while S * S * count < n and n % (2 * S) == 0 and n // (2 * S) >= count:
        S *= 2
    return S


# ------------------------------------------------------------------------------------------------ several layers


def together(find: Callable[..., AdditiveCode], *layers: Sequence, beam_size: int) -> list[AdditiveCode]:
    """Run `feedback_encode` or `coordinate_descent` on several layers at once, given a list for each argument.

    Layers of one shape and format get a leading axis L, so every launch on a GPU does the work of all of them. A single
    layer has no such axis: without it products are fastest on a CPU.
    """
    found = find(*map(stacked, layers), beam_size=beam_size)
    return [found] if len(layers[0]) == 1 else unstacked(found)


def stacked(values: Sequence[Tensor] | Sequence[AdditiveCode]) -> Tensor | AdditiveCode:
    """Stack tensors or codes of several layers along a leading axis; return those of a single layer unchanged."""
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    names = _tensors(values[0])
    return replace(values[0], **{name: stacked([getattr(value, name) for value in values]) for name in names})


def unstacked(code: AdditiveCode) -> list[AdditiveCode]:
    """Split the codes of several layers."""
    layers = zip(*_tensors(code).values(), strict=True)
    return [replace(code, **dict(zip(_tensors(code), layer, strict=True))) for layer in layers]


def _tensors(code: AdditiveCode) -> dict[str, Tensor]:
    return {"codes": code.codes, "codebooks": code.codebooks, "scales": code.scales}


# --------------------------------------------------------------------------------------------------------- scale search
#
# Error feedback with every row's scale as coarse as it has to be. Feedback asks a group to make up for the groups
# before it, so that what it aims at outgrows the weights, the more the fewer bits there are; and single weights are
# many times as large as their row's mean. Codebooks end at some length. What lies beyond is cut off, and later groups,
# cut off too, cannot make up for it: a coarser grid costs less. Of the R row groups, n are searched.

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


# ---------------------------------------------------------------------------------------------------------- re-encoding
#
# Moving a coded matrix by changing a few codes: for wished moves of groups, the codes that come nearest to them.
#
# Each group (a row group at a column group) is encoded under a metric of its own, r ↦ Σ_a r_a A r_aᵀ over its rows r_a,
# with codebooks and scales as they are.
#
# Letters: p, g = out and in group size; d = p·g; R row groups, G column groups; M codebooks of K entries; N groups that
# are to move; B hypotheses (beam).


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
