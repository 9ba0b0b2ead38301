"""Residual k-means: the codebooks that a layer's search starts from (AQLM, arXiv 2401.06118, §3.1).

Letters: N points of d values; M codebooks of K entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqdm.additive import encode_cpu
from vqdm.additive.backends import fused_scoring, native_scoring
from vqdm.additive.encode import rows_at_once, smallest

LLOYD_TOLERANCE = 1e-3  # the refits that follow make a closer optimum worthless


def residual_kmeans(
    points: Tensor, num_codebooks: int, entries: int, max_iter: int, max_points: int, generator: torch.Generator
) -> Tensor:
    """Codebooks [M, K, d], each the k-means of what the ones before it leave of `points` [N, d].

    At most `max_points` points, drawn without replacement, take part.
    """
    residual = points[draw(len(points), max_points, generator).to(points.device)]
    codebooks = []
    for _ in range(num_codebooks):
        centroids = kmeans(residual, entries, max_iter, generator)
        residual = residual - centroids[nearest(residual, centroids)[0]]
        codebooks.append(centroids)
    return torch.stack(codebooks)


def kmeans(points: Tensor, entries: int, max_iter: int, generator: torch.Generator) -> Tensor:
    """Centroids [K, d] of `points` [N, d] by at most `max_iter` Lloyd iterations from randomly drawn points.

    Clusters that are left empty move to the points that fare worst. With N ≤ K the points themselves are returned,
    some of them repeated.
    """
    picks = draw(len(points), entries, generator).to(points.device)
    centroids = points[picks.repeat(-(-entries // len(picks)))[:entries]]
    if len(points) <= entries:
        return centroids
    previous = torch.inf
    for _ in range(max_iter):
        indices, errors = nearest(points, centroids)
        centroids = _reseed(*_means(points, indices, entries), points, errors)
        error = errors.sum().item()
        if error >= (1 - LLOYD_TOLERANCE) * previous:
            break
        previous = error
    return centroids


def draw(population: int, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of 0..population-1 in random order, int64 on the generator's device."""
    return torch.randperm(population, generator=generator, device=generator.device)[:count]


def nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Index [N] of the centroid nearest to each of `points` [N, d], and its squared distance [N]."""
    if native_scoring(points):
        indices = encode_cpu.encode(points, centroids[None], 1)[:, 0]
        return indices, (points - centroids[indices]).square().sum(1)
    if best_entries := fused_scoring(points):
        distances, _, indices = best_entries(points[:, None], centroids, 1)
        return indices[:, 0], distances[:, 0].clamp(min=0)
    norms = centroids.square().sum(1)  # [K]
    found = [_nearest(part, centroids, norms) for part in points.split(rows_at_once(points, len(centroids)))]
    indices, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    return indices, (scores + points.square().sum(1)).clamp_(min=0)


def _nearest(points: Tensor, centroids: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.addmm(norms, points, centroids.T, alpha=-2)  # [N, K]
    indices = smallest(scores, 1)  # [N, 1]
    return indices[:, 0], scores.gather(1, indices)[:, 0]


def _means(points: Tensor, indices: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Mean [K, d] and size [K] of every cluster. A bag a cluster: unlike atomic adds, the same on every run."""
    sizes = torch.bincount(indices, minlength=entries)
    starts = sizes.cumsum(0) - sizes
    members = indices.argsort(stable=True)
    return torch.nn.functional.embedding_bag(members, points, starts, mode="mean"), sizes


def _reseed(means: Tensor, sizes: Tensor, points: Tensor, errors: Tensor) -> Tensor:
    empty = sizes == 0
    worst = errors.topk(int(empty.sum())).indices
    means[empty] = points[worst]
    return means
