"""KID, CMMD and MIND against loops, and KID against torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from vqdm.metrics import kernel_distances as kernels
from vqdm.metrics.kernel_distances import cmmd, kid, mean_gaussian, mind, polynomial_mmd


def rows(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_polynomial_mmd_is_its_double_sum():
    x, y = rows(5, 3, 0).double(), rows(5, 3, 1).double()

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within = sum(k(a[i], a[j]) for a in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(k(a, b) for a in x for b in y) / 25
    assert polynomial_mmd(x, y) == pytest.approx(within - 2 * across, rel=1e-12)


class Passed(torch.nn.Module):
    num_features = 6

    def forward(self, features):
        return features


def test_kid_of_whole_sets_is_that_of_torchmetrics():
    """With subsets as large as the sets, no random choice is left."""
    x, y = rows(40, 6, 0), rows(40, 6, 1, 0.5)
    metric = KernelInceptionDistance(feature=Passed(), subsets=2, subset_size=40)
    metric.update(x, real=True)
    metric.update(y, real=False)
    value, deviation = kid(y, x, seed=0)
    assert value == pytest.approx(1000 * metric.compute()[0].item(), rel=1e-4)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kid_is_repeatable_and_of_equal_sets_near_zero(monkeypatch):
    monkeypatch.setattr(kernels, "KID_SUBSET_SIZE", 50)
    x, y = rows(200, 6, 0), rows(150, 6, 1)
    assert kid(x, y, 3) == kid(x, y, 3) != kid(x, y, 4)
    value, deviation = kid(x, y, 3)
    assert deviation > 0 and abs(value) < 3 * deviation < kid(x, y + 1, 3)[0]


def test_cmmd_is_its_double_sum():
    x, y = rows(4, 3, 0), rows(6, 3, 1)

    def mean(a, b):
        return np.mean([math.exp(-float((p - q).square().sum()) / 200) for p in a for q in b])

    assert cmmd(x, y) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-6)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_blocks_do_not_change_the_kernel_mean(monkeypatch):
    x, y = rows(23, 5, 0), rows(9, 5, 1)
    whole = mean_gaussian(x, y)
    monkeypatch.setattr(kernels, "CHUNK", 4)
    assert mean_gaussian(x, y) == pytest.approx(whole, rel=1e-12)


def test_mind_of_a_shift_is_the_mean_of_squared_projections():
    """Moving a set by t moves each sorted projection by u·t, whose mean square over directions is |t|²/d."""
    x, shift = rows(50, 4, 0), torch.tensor([1.0, 2.0, 0.0, -1.0])
    assert mind(x, x, 0) == pytest.approx(0, abs=1e-24)  # the square of rounding in float64
    assert mind(x, x + shift, 0) == pytest.approx(3 * shift.square().sum().item(), rel=0.1)


def test_mind_takes_as_many_of_the_larger_set():
    assert mind(rows(80, 4, 0), rows(50, 4, 1), 0) == mind(rows(80, 4, 0), rows(50, 4, 1), 0)
