"""Finding codes: a beam over the codebooks inside a group; error feedback and coordinate descent across groups.

Error feedback is GPTQ (arXiv 2210.17323) in the form of QuIP#'s block LDLQ (arXiv 2402.04396, §4.1): once groups 0..j
are coded, the columns after them may still move, so a group is judged by the Schur complement of the columns after it.

Letters: O rows, I columns; p, g = out and in group size; R = O/p row groups, G = I/g column groups; d = p·g;
M codebooks of K entries; B hypotheses (beam); N vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from vqdm.additive import native
from vqdm.additive.code import AdditiveCode
from vqdm.additive.kmeans import rows_at_once
from vqdm.additive.rates import entry_slices
from vqdm.additive.scoring import BestEntries, fused_scoring, native_scoring
from vqdm.additive.topk import smallest

MINIMAL_DAMPING = 1e-6  # the least that helps a float32 factorization
COLUMNS_AT_ONCE = 128  # columns between two products with the rest of the matrix

Picks = Callable[[int, Tensor, int, int], tuple[Tensor, Tensor]]


def encode_vectors(targets: Tensor, codebooks: Tensor, beam_size: int) -> Tensor:
    """Codes [N, M] whose entries of `codebooks` [M, K, d] sum up to about `targets` [N, d].

    A beam over the codebooks in their order: the `beam_size` best partial sums go on to the next codebook.
    """
    if native_scoring(targets):
        return native.encode(targets, codebooks, beam_size)
    if best_entries := fused_scoring(targets):
        return _encode_vectors(targets, codebooks, partial(_fused_picks, best_entries, codebooks), beam_size)
    norms = codebooks.square().sum(2, keepdim=True)  # [M, K, 1]
    # ‖r − c‖² = [r, 1, ‖r‖²] · [−2c, ‖c‖², 1]: one product scores every entry for every hypothesis.
    factors = torch.cat([-2 * codebooks, norms, torch.ones_like(norms)], dim=2).transpose(1, 2).contiguous()
    parts = targets.split(rows_at_once(targets, beam_size * codebooks.shape[1]))
    return torch.cat([_encode_vectors(part, codebooks, partial(_scored_picks, factors), beam_size) for part in parts])


def _encode_vectors(targets: Tensor, codebooks: Tensor, pick: Picks, beam_size: int) -> Tensor:
    M, N = len(codebooks), len(targets)
    residual = targets  # [N·B, d]
    codes = torch.empty(N, 0, dtype=torch.int64, device=targets.device)  # [N·B, m]
    rows = torch.arange(N, device=targets.device)[:, None]
    B = 1
    for m in range(M):
        parents, entries = pick(m, residual, B, beam_size if m < M - 1 else 1)  # [N, B']
        B, above = parents.shape[1], (parents + rows * B).view(-1)  # [N·B']
        residual = residual[above] - codebooks[m][entries.view(-1)]
        codes = torch.cat([codes[above], entries.view(-1, 1)], dim=1)
    return codes


def _scored_picks(factors: Tensor, m: int, residual: Tensor, B: int, count: int) -> tuple[Tensor, Tensor]:
    """Hypotheses and entries [N, B'] of codebook m that leave the least of `residual` [N·B, d]."""
    K = factors.shape[2]
    norm = residual.square().sum(1, keepdim=True)
    scores = torch.cat([residual, torch.ones_like(norm), norm], dim=1) @ factors[m]  # [N·B, K]
    picks = smallest(scores.view(-1, B * K), count)  # [N, B']
    return picks // K, picks % K


def _fused_picks(
    best_entries: BestEntries, codebooks: Tensor, m: int, residual: Tensor, B: int, count: int
) -> tuple[Tensor, Tensor]:
    """The same from one kernel, which keeps no scores."""
    _, parents, entries = best_entries(residual.view(-1, B, residual.shape[1]), codebooks[m], count)
    return parents, entries


def encode_group(
    targets: Tensor, scales: Tensor, codebooks: Tensor, factor: Tensor, beam_size: int
) -> tuple[Tensor, Tensor]:
    """Code one column group under the metric F Fᵀ.

    Args: `targets` [O, g]; `scales` [R]; `codebooks` [M, K, p, g]; `factor` F [g, g].
    Returns codes [R, M] and the coded columns [O, g].
    """
    M, K, p, g = codebooks.shape
    divisors = torch.where(scales == 0, 1.0, scales)[:, None]  # [R, 1]
    rotated = (targets @ factor).view(-1, p * g) / divisors  # [O, g] → [R, d]
    codes = encode_vectors(rotated, (codebooks @ factor).view(M, K, p * g), beam_size)
    values = sum(codebooks[m].view(K, p * g)[codes[:, m]] for m in range(M))  # [R, d]
    return codes, (values * scales[:, None]).view(-1, g)  # [R, d] → [O, g]


def feedback_encode(W: Tensor, code: AdditiveCode, factors: Tensor, feedback: Tensor, beam_size: int) -> AdditiveCode:
    """`code` with new codes for W [O, I], found group by group from the first column to the last.

    Args: `factors` V_jj [G, g, g] and `feedback` [I, I] from `feedback_factors`.
    """
    g = code.spec.in_group_size
    difference = torch.zeros_like(W)  # W − Ŵ where coded
    target = W.clone()
    codes, entries = torch.empty_like(code.codes), usable_entries(code)
    for block in column_blocks(W.shape[1], g):
        for j in range(block.start // g, block.stop // g):
            done, columns = slice(block.start, j * g), slice(j * g, (j + 1) * g)
            wanted = target[:, columns] + difference[:, done] @ feedback[done, columns]
            found, coded = encode_group(wanted, *group_values(code, j, entries[j]), factors[j], beam_size)
            codes[:, j] = found + (entries[j].start or 0)
            difference[:, columns] = W[:, columns] - coded
        target[:, block.stop :] += difference[:, block] @ feedback[block, block.stop :]
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


def coordinate_descent(W: Tensor, H: Tensor, code: AdditiveCode, beam_size: int) -> AdditiveCode:
    """`code` after every group has moved once to better codes given all others; a row keeps codes that are better.

    With P = (W − Ŵ) H, the best values of group j are Ŵ_j + P_j H_jj⁻¹, and H_jj is their metric.
    """
    p, g = code.spec.out_group_size, code.spec.in_group_size
    codes, entries = code.codes.clone(), usable_entries(code)
    coded = code.dequantize()
    P = (W - coded) @ H
    moved = torch.zeros_like(W)
    for block in column_blocks(W.shape[1], g):
        for j in range(block.start // g, block.stop // g):
            done, columns = slice(block.start, j * g), slice(j * g, (j + 1) * g)
            factor = damped_cholesky(H[columns, columns], MINIMAL_DAMPING)
            pull = P[:, columns] - moved[:, done] @ H[done, columns]
            wanted = coded[:, columns] + torch.cholesky_solve(pull.T, factor).T
            found, values = encode_group(wanted, *group_values(code, j, entries[j]), factor, beam_size)
            found = found + (entries[j].start or 0)
            before, after = (
                ((wanted - x) @ factor).square().view(-1, p * g).sum(1) for x in (coded[:, columns], values)
            )
            better = after < before  # [R]
            codes[:, j] = torch.where(better[:, None], found.to(codes.dtype), codes[:, j])
            moved[:, columns] = (values - coded[:, columns]) * better.repeat_interleave(p)[:, None]
        P[:, block.stop :] -= moved[:, block] @ H[block, block.stop :]
    return replace(code, codes=codes)


def column_blocks(columns: int, g: int) -> list[slice]:
    """Slices of whole groups, about `COLUMNS_AT_ONCE` columns each."""
    width = max(g, COLUMNS_AT_ONCE // g * g)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def usable_entries(code: AdditiveCode) -> list[slice]:
    """For each column group, the entries of its codebooks that its codes may name."""
    return [slice(None)] * code.codes.shape[1] if code.widths is None else entry_slices(code.widths)


def group_values(code: AdditiveCode, j: int, entries: slice) -> tuple[Tensor, Tensor]:
    """Scales [R] and the usable part [M, K', p, g] of the codebooks of column group j."""
    codebooks = code.codebooks if code.codebooks.dim() == 4 else code.codebooks[j]
    return code.scales[:, j if code.scales.shape[1] > 1 else 0], codebooks[:, entries]
