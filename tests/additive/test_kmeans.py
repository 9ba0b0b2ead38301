"""Residual k-means against plain distances and means."""

import pytest
import torch

from vqdm.additive.encode import rows_at_once
from vqdm.additive.kmeans import kmeans, nearest, residual_kmeans


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
