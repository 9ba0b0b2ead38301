"""VQDM's own search: Adam on codebooks and scales, and a beam search over whole rows (arXiv 2409.00492, §3).

The search (AQLM, arXiv 2401.06118, §3.1) visits every column group and codebook once, in random order. At each it
tries all entries for every hypothesis, with all other codes at their present values, and keeps the best hypotheses. A
direct implementation rebuilds all [B, O, I] hypotheses at every step. This one finds the same codes from three facts:
a code is visited once, so hypotheses need only back-pointers; all hypotheses share the old codes of the group at
hand; and a change of one group touches later groups only through H, which can wait until a block of columns is done.

Letters: O rows, I columns; p, g = out and in group size; R = O/p row groups, G = I/g column groups; d = p·g;
M codebooks of K entries; B hypotheses, of which a step makes B'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode
from vqdm.additive.codebooks import weighted_error
from vqdm.additive.encode import column_blocks, group_values, rows_at_once, smallest

HYPOTHESES_AT_ONCE = 2**24  # values of weight matrices that are held, whatever the number of rows


def adam_steps(W: Tensor, H: Tensor, code: AdditiveCode, lr: float, steps: int) -> AdditiveCode:
    """`code` after `steps` of Adam on tr((W − Ŵ) H (W − Ŵ)ᵀ) over codebooks and scales, with AQLM's settings."""
    moving = replace(
        code, codebooks=code.codebooks.clone().requires_grad_(), scales=code.scales.clone().requires_grad_()
    )
    optimizer = torch.optim.Adam([moving.codebooks, moving.scales], lr=lr, betas=(0.0, 0.95), amsgrad=True)
    energy = weighted_error(W, H)
    for _ in range(steps if energy > 0 else 0):
        optimizer.zero_grad()
        coded = moving.dequantize()
        # dL/dŴ = −2 (W − Ŵ) H: given by hand, it costs one product with H where autograd takes three.
        coded.backward(-2 * (W - coded.detach()) @ H / energy)
        optimizer.step()
    return replace(code, codebooks=moving.codebooks.detach(), scales=moving.scales.detach())


@dataclass
class Hypotheses:
    """B ways to code each row so far, as far as the group at hand needs to know them.

    Attributes:
        losses: [R, B], each row group's share of L.
        pull: (W − Ŵ) H in the columns of the group, [R, B, p, g].
        change: what has been added to Ŵ in these columns, [R, B, p, g].
        origin: the hypothesis at the start of the group that this one continues, [R, B].
    """

    losses: Tensor
    pull: Tensor
    change: Tensor
    origin: Tensor


def beam_search(W: Tensor, H: Tensor, code: AdditiveCode, beam_size: int, codebook_orders: Tensor) -> AdditiveCode:
    """`code` with new codes for W [O, I] under H [I, I], visiting the column groups from the first to the last.

    `codebook_orders` [G, M] has the order of the codebooks in each group. To visit the groups in another order,
    permute the columns of all three (`AdditiveCode.with_groups`).
    """
    R = len(code.codes)
    tile = max(1, HYPOTHESES_AT_ONCE // (beam_size * W[0].numel() * code.spec.out_group_size))
    codes = [_search_rows(W, H, code, rows, beam_size, codebook_orders) for rows in torch.arange(R).split(tile)]
    return replace(code, codes=torch.cat(codes))


def _search_rows(
    W: Tensor, H: Tensor, whole: AdditiveCode, rows: Tensor, beam_size: int, codebook_orders: Tensor
) -> Tensor:
    """Codes [R', G, M] of the row groups `rows` [R'], which do not depend on the others."""
    p, g = whole.codebooks.shape[-2:]
    code = replace(whole, codes=whole.codes[rows], scales=whole.scales[rows])
    R, G, _ = code.codes.shape
    W = W.view(-1, p, G * g)[rows].flatten(0, 1)  # [O, I] → [R'·p, I]
    difference = (W - code.dequantize()).view(R, 1, p, G * g)
    P = difference @ H  # [R, B, p, I], up to date in the block at hand
    losses = (P * difference).sum((2, 3))  # [R, B]
    trail = []
    for block in column_blocks(G * g, g):
        moved = P.new_zeros(*P.shape[:3], block.stop - block.start)  # change of Ŵ in the block
        origin = _identity(losses)
        for j in range(block.start // g, block.stop // g):
            columns = slice(j * g, (j + 1) * g)
            done = slice(block.start, columns.start)
            pull = take(P[..., columns], origin) - moved[..., : done.stop - done.start] @ H[done, columns]
            state = Hypotheses(losses, pull, torch.zeros_like(pull), _identity(losses))
            for m in codebook_orders[j].tolist():
                state, parents, entries = _extend(state, code, j, m, H[columns, columns], beam_size)
                trail.append((j, m, parents, entries))
            losses, origin, moved = state.losses, take(origin, state.origin), take(moved, state.origin)
            moved[..., columns.start - block.start : columns.stop - block.start] = state.change
        P = take(P, origin)
        P[..., block.stop :] -= moved @ H[block, block.stop :]
    return _trace_back(code.codes, losses, trail)


def _extend(
    state: Hypotheses, code: AdditiveCode, j: int, m: int, metric: Tensor, beam_size: int
) -> tuple[Hypotheses, Tensor, Tensor]:
    """Choose codebook m's entry anew: the best hypotheses, the ones they continue [R, B'], and their entries [R, B'].

    Taking the old values v off Ŵ turns the pull P into Q = P + v H_jj and the loss into L + 2⟨v, Q⟩ − v H_jj vᵀ;
    adding the entry c at scale s then changes it by −2 s⟨c, Q⟩ + s² c H_jj cᵀ.
    """
    scales, codebooks = group_values(code, j)
    s = scales[:, None, None, None]  # [R, 1, 1, 1]
    old = s * codebooks[m][code.codes[:, j, m].long()][:, None]  # [R, 1, p, g]
    without = state.pull + old @ metric
    losses = state.losses + (2 * old * without - old * (old @ metric)).sum((2, 3))  # [R, B]
    losses, parents, entries = _best_entries(losses, without, codebooks[m], scales, metric, beam_size)
    new = s * codebooks[m][entries]  # [R, B', p, g]
    return (
        Hypotheses(
            losses,
            take(without, parents) - new @ metric,
            take(state.change, parents) + new - old,
            take(state.origin, parents),
        ),
        parents,
        entries,
    )


def _best_entries(
    losses: Tensor, pull: Tensor, codebook: Tensor, scales: Tensor, metric: Tensor, beam_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The least losses [R, B'] of all hypotheses with one more entry, their parents [R, B'] and entries [R, B']."""
    R, B = losses.shape
    K = len(codebook)
    norms = (codebook @ metric * codebook).sum((1, 2))  # [K]
    flat = codebook.view(K, -1)  # [K, d]
    found = []
    for part in torch.arange(R, device=losses.device).split(rows_at_once(losses, B * K)):
        s = scales[part, None, None]
        gains = (pull[part].view(-1, flat.shape[1]) @ flat.T).view(-1, B, K)
        scores = (losses[part, :, None] - 2 * s * gains + s.square() * norms).view(-1, B * K)
        picks = smallest(scores, beam_size)
        found.append((scores.gather(1, picks), picks))
    least, picks = (torch.cat(parts) for parts in zip(*found, strict=True))
    return least, picks // K, picks % K


def _trace_back(codes: Tensor, losses: Tensor, trail: list[tuple[int, int, Tensor, Tensor]]) -> Tensor:
    """Codes [R, G, M] of the best hypothesis, read from the last choice to the first."""
    codes = codes.clone()
    best = losses.argmin(1, keepdim=True)  # [R, 1]
    for j, m, parents, entries in reversed(trail):
        codes[:, j, m] = take(entries, best)[:, 0].to(codes.dtype)
        best = take(parents, best)
    return codes


def take(values: Tensor, picks: Tensor) -> Tensor:
    """Of `values` [R, B, …], the hypotheses `picks` [R, B'] → [R, B', …]."""
    return values[torch.arange(len(picks), device=picks.device)[:, None], picks]


def _identity(losses: Tensor) -> Tensor:
    R, B = losses.shape
    return torch.arange(B, device=losses.device).expand(R, B)
