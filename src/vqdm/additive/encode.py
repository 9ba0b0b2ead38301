"""Finding codes: a beam over the codebooks inside a group; error feedback and coordinate descent across groups.

Error feedback is GPTQ (arXiv 2210.17323) in the form of QuIP#'s block LDLQ (arXiv 2402.04396, §4.1): once groups 0..j
are coded, the columns after them may still move, so a group is judged by the Schur complement of the columns after it.

Letters: O rows, I columns; p, g = out and in group size; R = O/p row groups, G = I/g column groups; d = p·g;
M codebooks of K entries; B hypotheses (beam); N vectors. A leading … in a shape is nothing, or L for L layers of one
shape that are coded at once: on a GPU a step for one of them is too small to be worth its launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from vqdm.additive import encode_cpu
from vqdm.additive.backends import BestEntries, fused_scoring, native_scoring
from vqdm.additive.code import AdditiveCode

MINIMAL_DAMPING = 1e-6  # the least that helps a float32 factorization
SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**27}  # what the cache, or the memory, has room for
COLUMNS_AT_ONCE = 128  # columns between two products with the rest of the matrix

Picks = Callable[[int, Tensor, int, int], tuple[Tensor, Tensor]]


def encode_vectors(targets: Tensor, codebooks: Tensor, beam_size: int) -> Tensor:
    """Codes [..., N, M] whose entries of `codebooks` [..., M, K, d] sum up to about `targets` [..., N, d].

    A beam over the codebooks in their order: the `beam_size` best partial sums go on to the next codebook.
    """
    if native_scoring(targets):
        return _native_codes(targets, codebooks, beam_size)
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


def _native_codes(targets: Tensor, codebooks: Tensor, beam_size: int) -> Tensor:
    if targets.dim() == 2:
        return encode_cpu.encode(targets, codebooks, beam_size)
    return torch.stack([encode_cpu.encode(*layer, beam_size) for layer in zip(targets, codebooks, strict=True)])


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
