"""Distances between two sets of features that compare the pictures themselves rather than a Gaussian fitted to them.

Letters: X [N, d] and Y [M, d] features, k kernel, m subset size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
MIND_DIRECTIONS = 1000
CHUNK = 4096


def kid(first: Tensor, second: Tensor, seed: int) -> tuple[float, float]:
    """Kernel Inception distance × 1000 (Bińkowski et al., arXiv 1801.01401): mean and standard deviation over subsets.

    The unbiased MMD² of 100 pairs of subsets, 1000 pictures each or all of the smaller set, kernel (x·y/d + 1)³.
    """
    rng = np.random.default_rng(seed)
    size = min(KID_SUBSET_SIZE, len(first), len(second))
    values = [polynomial_mmd(_subset(first, size, rng), _subset(second, size, rng)) * 1000 for _ in range(KID_SUBSETS)]
    return float(np.mean(values)), float(np.std(values))


def _subset(features: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    return features[torch.from_numpy(rng.choice(len(features), size, replace=False))].double()


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD² of two sets of equal size m, float64 [m, d]."""
    size, width = x.shape
    xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
    return (within - 2 * xy.mean()).item()


def cmmd(first: Tensor, second: Tensor) -> float:
    """CLIP-MMD (Jayasumana et al., arXiv 2401.09603): 1000 · biased MMD² of unit vectors, Gaussian kernel, sigma 10."""
    value = mean_gaussian(first, first) + mean_gaussian(second, second) - 2 * mean_gaussian(first, second)
    return CMMD_SCALE * value


def mean_gaussian(x: Tensor, y: Tensor) -> float:
    """Mean of exp(-|x - y|² / 2σ²) over all pairs of rows, a block of rows at a time."""
    total = 0.0
    other = y.double()
    for rows in x.double().split(CHUNK):
        squared = rows.square().sum(1)[:, None] + other.square().sum(1) - 2 * rows @ other.T
        total += (-squared.clamp(min=0) / (2 * CMMD_SIGMA**2)).exp().sum().item()
    return total / (len(x) * len(y))


def mind(first: Tensor, second: Tensor, seed: int) -> float:
    """MIND (arXiv 2605.06797): 3d times the mean squared gap of sorted projections on 1000 random directions.

    The larger set is cut down, seeded, to the size of the smaller.
    """
    rng = np.random.default_rng(seed)
    size, width = min(len(first), len(second)), first.shape[1]
    x, y = (_subset(features, size, rng) for features in (first, second))
    directions = torch.from_numpy(rng.standard_normal((width, MIND_DIRECTIONS)))
    directions = directions / directions.norm(dim=0)  # not in place: numpy's memory is aligned by chance
    gaps = [
        ((x @ block).sort(0).values - (y @ block).sort(0).values).square().mean(0)  # [directions]
        for block in directions.split(100, dim=1)
    ]
    return 3 * width * torch.cat(gaps).mean().item()
