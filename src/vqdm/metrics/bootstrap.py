"""Intervals by the percentile bootstrap over prompts (Efron, 1979): pictures of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES, LEVEL = 1000, 0.95


def mean_interval(values: Sequence[float], prompts: Sequence[str], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the mean over pictures, when prompts are drawn again with all pictures of theirs.

    Args:
        values: [N] one a picture.
        prompts: [N] the prompt of each picture.

    Returns:
        (low, high), or None for fewer than two prompts.
    """
    names, owner = np.unique(np.asarray(prompts), return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.bincount(owner, weights=np.asarray(values, dtype=np.float64))  # [P]
    counts = np.bincount(owner)  # [P]
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))  # [R, P]
    means = sums[drawn].sum(1) / counts[drawn].sum(1)  # [R]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
