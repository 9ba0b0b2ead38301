"""Closed-form refits against dense least squares."""

from dataclasses import replace

import pytest
import torch
from test_code import SPECS, random_code
from test_encode import randn, second_moment

from vqdm.additive.code import CodeSpec
from vqdm.additive.codebooks import (
    Fit,
    Lookup,
    conjugate_gradients,
    kmeans,
    nearest,
    refit_codebooks,
    refit_scales,
    residual_kmeans,
    to_groups,
    to_matrix,
    weighted_error,
)
from vqdm.additive.encode import rows_at_once


def problem(spec, rows=12, columns=16):
    code = random_code(spec, rows, columns)
    code = replace(code, codebooks=code.codebooks.double(), scales=code.scales.double(), input_scales=None)
    return randn(rows, columns).double(), second_moment(columns).double(), code


def jacobian(function, x):
    return torch.autograd.functional.jacobian(function, x).reshape(-1, x.numel())


def refit(W, H, code, iterations, ridge):
    return replace(code, codebooks=refit_codebooks([Fit(W, H, code)], iterations, ridge))


def test_weighted_error_is_the_trace():
    D, H = randn(5, 8), second_moment(8)
    torch.testing.assert_close(weighted_error(D, H), torch.trace(D @ H @ D.T))


def test_groups_and_matrix_are_inverse():
    matrix = randn(6, 8)
    groups = to_groups(matrix, 2, 4)
    assert torch.equal(groups[1, 1], matrix[2:4, 4:8].reshape(-1))
    assert torch.equal(to_matrix(groups, 2), matrix)


@pytest.mark.parametrize("spec", SPECS[:5], ids=str)
def test_lookup_and_its_adjoint(spec):
    _, _, code = problem(spec)
    p, g = code.codebooks.shape[-2:]
    lookup = Lookup(code)
    groups = lookup.groups(code.codebooks.reshape(-1, p * g)).view(*code.codes.shape[:2], p * g)
    unscaled = replace(code, scales=torch.ones_like(code.scales))
    torch.testing.assert_close(to_matrix(groups, p), unscaled.dequantize())
    x, y = randn(lookup.entries, p * g).double(), randn(len(lookup.bags), p * g, seed=1).double()
    torch.testing.assert_close((lookup.groups(x) * y).sum(), (x * lookup.entry_sums(y)).sum())


@pytest.mark.parametrize("spec", SPECS[:5], ids=str)
def test_codebooks_reach_the_least_squares_error(spec):
    W, H, code = problem(spec)
    root = torch.linalg.cholesky(H)
    A = jacobian(lambda books: replace(code, codebooks=books).dequantize() @ root, code.codebooks)
    best = torch.linalg.lstsq(A, (W @ root).reshape(-1, 1), driver="gelsd").solution
    least = (A @ best - (W @ root).reshape(-1, 1)).square().sum()
    found = refit(W, H, code, iterations=400, ridge=0.0)
    scale = weighted_error(W, H)
    torch.testing.assert_close(weighted_error(W - found.dequantize(), H) / scale, least / scale, atol=1e-5, rtol=1e-3)


def test_the_ridge_keeps_unused_and_holds_used_entries():
    W, H, code = problem(CodeSpec(2, 6, 4))
    free, held, fixed = (refit(W, H, code, 30, ridge) for ridge in (0.0, 1.0, 1e9))
    unused = Lookup(code).usage.view(2, 64) == 0
    assert unused.any()
    assert torch.equal(held.codebooks[unused], code.codebooks[unused])
    assert (held.codebooks - code.codebooks).norm() < (free.codebooks - code.codebooks).norm()
    torch.testing.assert_close(fixed.codebooks, code.codebooks)


@pytest.mark.parametrize("spec", SPECS[:5], ids=str)
def test_scales_reach_the_least_squares_error_of_every_row_group(spec):
    W, H, code = problem(spec)
    root = torch.linalg.cholesky(H)
    A = jacobian(lambda scales: replace(code, scales=scales).dequantize() @ root, code.scales)
    best = torch.linalg.lstsq(A, (W @ root).reshape(-1, 1)).solution
    found = refit_scales(W, H, code, iterations=40)
    torch.testing.assert_close(found.scales.reshape(-1, 1), best, atol=1e-6, rtol=1e-6)


def test_conjugate_gradients_solve_several_problems_and_leave_empty_ones():
    A = torch.stack([second_moment(5, seed).double() for seed in range(3)])
    A[2] = 0
    b = randn(3, 5).double()
    b[2] = 0
    x = conjugate_gradients(lambda v: (A @ v[:, :, None])[:, :, 0], b, A.diagonal(dim1=1, dim2=2), 20, dims=(1,))
    torch.testing.assert_close(x[:2], torch.linalg.solve(A[:2], b[:2]))
    assert torch.equal(x[2], torch.zeros(5).double())


def generator():
    return torch.Generator().manual_seed(0)


def test_nearest_agrees_with_all_distances():
    points, centroids = torch.randn(500, 3, generator=generator()), torch.randn(40, 3)
    distances = torch.cdist(points, centroids).square()
    indices, errors = nearest(points, centroids)
    assert torch.equal(indices, distances.argmin(1))
    torch.testing.assert_close(errors, distances.amin(1), atol=1e-5, rtol=1e-4)


def test_nearest_in_parts_is_nearest_at_once(monkeypatch):
    points, centroids = torch.randn(500, 3, generator=generator()), torch.randn(40, 3)
    whole = nearest(points, centroids)
    monkeypatch.setitem(rows_at_once.__globals__["SCORES_AT_ONCE"], "cpu", 1000)
    assert torch.equal(nearest(points, centroids)[0], whole[0])


def test_separate_clusters_are_found():
    centres = 100 * torch.eye(5)
    points = centres.repeat(50, 1) + torch.randn(250, 5, generator=generator())
    found = kmeans(points, 5, 50, generator())
    assert torch.cdist(found, centres).amin(0).max() < 2  # empty clusters and bad draws are mended


def test_centroids_are_the_means_of_their_points():
    points = torch.randn(2000, 2, generator=generator())
    centroids = kmeans(points, 8, 200, generator())
    indices, _ = nearest(points, centroids)
    means = torch.stack([points[indices == k].mean(0) for k in range(8)])
    assert (means - centroids).norm() < 0.05 * centroids.norm()


@pytest.mark.parametrize("count", [1, 3, 8])
def test_few_points_become_the_centroids(count):
    points = torch.randn(count, 4, generator=generator())
    centroids = kmeans(points, 8, 10, generator())
    assert centroids.shape == (8, 4)
    assert nearest(points, centroids)[1].max() < 1e-6


def test_equal_points_are_no_trouble():
    centroids = kmeans(torch.ones(100, 4), 8, 10, generator())
    assert torch.equal(centroids, torch.ones(8, 4))


def test_every_codebook_lowers_the_residual():
    points = torch.randn(1000, 4, generator=generator())
    errors, residual = [], points
    for codebook in residual_kmeans(points, 3, 16, 25, 1600, generator()):
        residual = residual - codebook[nearest(residual, codebook)[0]]
        errors.append(residual.square().mean().item())
    assert errors[0] < 0.5
    assert errors[2] < 0.5 * errors[1] < 0.25 * errors[0]


def test_equal_seeds_give_equal_codebooks():
    points = torch.randn(1000, 4, generator=generator())
    first, second = (residual_kmeans(points, 2, 16, 25, 400, generator()) for _ in range(2))
    assert torch.equal(first, second)
