"""The least weighted error that any code of a given rate can have, for Gaussian rows.

Reverse water-filling over the eigenvalues λ_i of H^½ Σ_w H^½ (Cover & Thomas, Elements of Information Theory, §10.3):

    R = (1/I) Σ max(0, ½ log₂(λ_i/θ)),   D = Σ min(θ, λ_i),   relative bound D / Σ λ_i

Letters: O rows, I columns; Σ_w [I, I] the covariance of the rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gap_to_bound(error: float, W: Tensor, H: Tensor, bits_per_weight: float) -> float | None:
    """Decibels between a code's relative error and the bound at its stored bits; negative below the bound.

    None where either is zero. A layer can fall below the bound: rows need not be Gaussian, and codebooks remember.
    """
    limit = relative_bound(row_spectrum(W, H), bits_per_weight)
    return 10 * math.log10(error / limit) if error > 0 and limit > 0 else None


def relative_bound(spectrum: Tensor, bits: float) -> float:
    """Reverse water-filling: D / Σ λ_i at `bits` a weight for eigenvalues [I] of any order; 0 where all are zero."""
    ordered = spectrum.double().clamp(min=0).sort(descending=True).values
    active = ordered[ordered > 0]
    if len(active) == 0:
        return 0.0
    counts = torch.arange(1, len(active) + 1, device=active.device)
    # With the n largest above the water, log₂ θ is their mean logarithm less 2·R·I/n; n is the last to stay above it.
    levels = active.log2().cumsum(0) / counts - 2 * bits * len(ordered) / counts  # [n], log₂ θ
    last = int((active.log2() >= levels).sum()) - 1
    theta = levels[last].exp2()
    return (torch.minimum(ordered, theta).sum() / ordered.sum()).item()


def row_spectrum(W: Tensor, H: Tensor) -> Tensor:
    """Eigenvalues [I] of H^½ Σ_w H^½ for the rows of W [O, I], from the equal ones of Lᵀ H L with Σ_w = L Lᵀ."""
    covariance = shrunk_covariance(W)
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        factor = covariance.diagonal().sqrt().diag()
    return torch.linalg.eigvalsh(factor.T @ H @ factor)


def shrunk_covariance(W: Tensor) -> Tensor:
    """Second moment [I, I] of the rows of W [O, I], its off-diagonal shrunk by the share of it that chance explains.

    Schäfer & Strimmer (2005), target "diagonal, unequal variance", for zero means: with few rows for the columns the
    plain estimate would be singular, and the bound zero.
    """
    O = len(W)  # noqa: E741
    moment = W.T @ W / O
    squares = W.square()
    chance = (squares.T @ squares / O - moment.square()) / max(O - 1, 1)  # variance of every entry of `moment`
    signal = moment.square().sum() - moment.diagonal().square().sum()
    noise = chance.sum() - chance.diagonal().sum()
    kept = (1 - noise / signal).clamp(0, 1) if signal > 0 else moment.new_zeros(())
    return kept * moment + (1 - kept) * moment.diagonal().diag()
