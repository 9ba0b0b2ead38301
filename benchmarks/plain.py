"""The published procedure as it is written down, for its cost: what `--encoder beam` computes in less time.

AQLM's beam search (arXiv 2401.06118, §3.1) with whole hypotheses: at every column group and codebook all B weight
matrices are held, multiplied with the group's columns of H, and copied for the best of their continuations. Adam takes
its gradient through tr((W − Ŵ) H (W − Ŵ)ᵀ) by automatic differentiation.

Letters: O rows, I columns; g = group size; G = I/g groups; M codebooks of K entries; B hypotheses.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vqdm.additive.beam import take
from vqdm.additive.code import AdditiveCode
from vqdm.additive.codebooks import draw, weighted_error


def epoch(W: Tensor, H: Tensor, code: AdditiveCode, steps: int, lr: float, beam: int, generator) -> AdditiveCode:
    """One round: Adam on codebooks and scales, then the search in a new random order."""
    return beam_search(W, H, adam(W, H, code, steps, lr), beam, generator)


def adam(W: Tensor, H: Tensor, code: AdditiveCode, steps: int, lr: float) -> AdditiveCode:
    """Adam with AQLM's settings."""
    moving = replace(code, codebooks=code.codebooks.clone(), scales=code.scales.clone())
    values = [moving.codebooks.requires_grad_(), moving.scales.requires_grad_()]
    optimizer = torch.optim.Adam(values, lr=lr, betas=(0.0, 0.95), amsgrad=True)
    energy = weighted_error(W, H)
    for _ in range(steps):
        optimizer.zero_grad()
        (weighted_error(W - moving.dequantize(), H) / energy).backward()
        optimizer.step()
    return replace(code, codebooks=moving.codebooks.detach(), scales=moving.scales.detach())


def beam_search(W: Tensor, H: Tensor, code: AdditiveCode, beam: int, generator: torch.Generator) -> AdditiveCode:
    """New codes for W [O, I], groups and codebooks in random order; out_group_size 1, one scale per row."""
    codes = code.codes.long()[:, None]  # [O, B, G, M]
    coded = code.dequantize()[:, None]  # [O, B, I]
    losses = (((W - coded[:, 0]) @ H) * (W - coded[:, 0])).sum(1, keepdim=True)  # [O, B]
    (G, M), g = code.codes.shape[1:], code.codebooks.shape[-1]
    for j in draw(G, G, generator).tolist():
        for m in draw(M, M, generator).tolist():
            columns = slice(j * g, (j + 1) * g)
            book = code.codebooks[m, :, 0] * 1.0  # [K, g]
            old = code.scales[:, :, None] * book[codes[:, :, j, m]]  # [O, B, g]
            without = coded.clone()
            without[..., columns] -= old
            pull = (W[:, None] - without).flatten(0, 1) @ H[:, columns]  # [O·B, g]
            parent, entry, losses = _best(
                losses, pull.view(*old.shape), old, book, code.scales, H[columns, columns], beam
            )
            codes, coded = take(codes, parent).clone(), take(without, parent)
            codes[:, :, j, m] = entry
            coded[..., columns] += code.scales[:, :, None] * book[entry]
    return replace(code, codes=take(codes, losses.argmin(1, keepdim=True))[:, 0])


def _best(losses: Tensor, pull: Tensor, old: Tensor, book: Tensor, scales: Tensor, metric: Tensor, beam: int):
    """Parents [O, B'], entries [O, B'] and losses [O, B'] of the best continuations."""
    s = scales[:, :, None]  # [O, 1, 1]
    base = losses + (2 * old * pull - old @ metric * old).sum(2)  # [O, B], without the old entry
    scores = base[:, :, None] - 2 * s * (pull @ book.T) + s.square() * (book @ metric * book).sum(1)  # [O, B, K]
    least, picks = scores.flatten(1).topk(min(beam, scores[0].numel()), dim=1, largest=False)
    return picks // len(book), picks % len(book), least
