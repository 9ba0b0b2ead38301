"""Reverse water-filling against its defining equations."""

import math

import pytest
import torch
from test_encode import randn, second_moment

from vqdm.additive.bound import gap_to_bound, relative_bound, row_spectrum, shrunk_covariance


@pytest.mark.parametrize("bits", [0.0, 0.5, 2.0, 5.0])
def test_equal_eigenvalues_give_six_decibels_a_bit(bits):
    assert relative_bound(torch.full((10,), 3.0), bits) == pytest.approx(4.0**-bits)


@pytest.mark.parametrize("bits", [0.1, 1.0, 2.5])
def test_the_water_level_spends_the_rate(bits):
    spectrum = torch.logspace(0, -4, 50).double()
    low, high = 1e-12, 1.0
    for _ in range(200):  # bisection on log θ
        theta = math.sqrt(low * high)
        rate = (0.5 * (spectrum / theta).log2()).clamp(min=0).mean().item()
        low, high = (theta, high) if rate > bits else (low, theta)
    expected = spectrum.clamp(max=theta).sum() / spectrum.sum()
    assert relative_bound(spectrum, bits) == pytest.approx(expected.item(), rel=1e-6)


def test_zero_eigenvalues_cost_nothing():
    assert relative_bound(torch.tensor([0.0, 0.0, 1.0, 1.0]), 1.0) == pytest.approx(4.0**-2)
    assert relative_bound(torch.zeros(4), 1.0) == 0


def test_independent_columns_keep_their_variances_and_lose_chance_correlations():
    W = randn(200, 100) * torch.linspace(0.5, 2, 100)
    covariance = shrunk_covariance(W)
    torch.testing.assert_close(covariance.diagonal(), W.square().mean(0))
    correlation = covariance / covariance.diagonal().outer(covariance.diagonal()).sqrt()
    assert (correlation - torch.eye(100)).abs().max() < 0.05


def test_true_correlations_are_kept():
    W = randn(500, 1) @ randn(1, 20, seed=1) + 0.1 * randn(500, 20, seed=2)
    plain = W.T @ W / 500
    assert (shrunk_covariance(W) - plain).norm() < 0.05 * plain.norm()


def test_spectrum_is_that_of_the_product():
    W, H = randn(300, 12) * torch.linspace(0.5, 2, 12), second_moment(12)
    expected = torch.linalg.eigvals(H @ shrunk_covariance(W)).real.sort().values
    torch.testing.assert_close(row_spectrum(W, H), expected, atol=1e-4, rtol=1e-3)


def test_gap_is_in_decibels_and_undefined_without_error():
    W, H = randn(400, 8), torch.eye(8)
    limit = relative_bound(row_spectrum(W, H), 2.0)
    assert gap_to_bound(10 * limit, W, H, 2.0) == pytest.approx(10.0)
    assert gap_to_bound(0.0, W, H, 2.0) is None
    assert gap_to_bound(0.1, torch.zeros(4, 8), H, 2.0) is None
