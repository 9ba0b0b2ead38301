"""Codebooks: residual k-means to begin with, then what minimizes the layer's quadratic loss while the codes stay.

    L = tr((W − Ŵ) H (W − Ŵ)ᵀ),   Ŵ linear in the codebooks, and linear in the scales

AQLM (arXiv 2401.06118, eq. 6) takes Adam steps on L; both problems are least squares, so conjugate gradients on their
normal equations get further with a tenth of the products with H.

Letters: O rows, I columns; R = O/p row groups, G = I/g column groups; d = p·g values per codebook entry; M codebooks
of K entries, C = M·K entries in all (G·M·K when groupwise); S scales per row group, 1 or G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from vqdm.additive.code import AdditiveCode, entry_bags
from vqdm.additive.encode import rows_at_once, smallest
from vqdm.additive.scoring import fused_scoring, native_codes, native_scoring

# ----------------------------------------------------------------------------------------------------- residual k-means
#
# The codebooks that a layer's search starts from (AQLM, arXiv 2401.06118, §3.1).
#
# Letters: N points of d values; M codebooks of K entries.

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
        indices = native_codes(points, centroids[None], 1)[:, 0]
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


def weighted_error(difference: Tensor, H: Tensor) -> Tensor:
    """tr(D H Dᵀ) of D [O, I] and H [I, I], a scalar; VQDM (arXiv 2409.00492), eq. 2."""
    return ((difference @ H) * difference).sum()


class Lookup:
    """Codes as a linear map E from codebook entries [C, d] to unscaled groups [R·G, d], and its adjoint."""

    def __init__(self, code: AdditiveCode):
        self.entries = code.codebooks[..., 0, 0].numel()
        self.bags = entry_bags(code.codes, code.codebooks)  # [R·G, M]
        users = self.bags.view(-1).argsort(stable=True)
        self.users = users // self.bags.shape[1]  # the groups that use an entry, entry after entry
        self.usage = torch.bincount(self.bags.view(-1), minlength=self.entries)  # [C]
        self.starts = self.usage.cumsum(0) - self.usage

    def groups(self, entries: Tensor) -> Tensor:
        """E x: sums of the chosen rows of `entries` [C, d] → [R·G, d]."""
        return embedding_bag(self.bags, entries, mode="sum")

    def entry_sums(self, groups: Tensor) -> Tensor:
        """Eᵀ y: the sum of `groups` [R·G, d] over the users of each entry → [C, d]; the same on every run."""
        return embedding_bag(self.users, groups, self.starts, mode="sum")


def to_groups(matrix: Tensor, p: int, g: int) -> Tensor:
    """[O, I] → [R, G, p·g]"""
    O, I = matrix.shape  # noqa: E741
    return matrix.view(O // p, p, I // g, g).transpose(1, 2).reshape(O // p, I // g, p * g)


def to_matrix(groups: Tensor, p: int) -> Tensor:
    """[R, G, p·g] → [O, I]"""
    R, G, d = groups.shape
    return groups.view(R, G, p, d // p).transpose(1, 2).reshape(R * p, G * d // p)


class Fit:
    """A coded layer's part in the least squares of codebooks: a quadratic in their entries x [C, d].

    Args: `W` [O, I], `H` [I, I], `code`, and the `weight` of its L among other layers'.
    """

    def __init__(self, W: Tensor, H: Tensor, code: AdditiveCode, weight: float = 1.0):
        self.W, self.H, self.code, self.weight = W, H, code, weight
        self.p, self.g = code.codebooks.shape[-2:]
        self.lookup, self.scales = Lookup(code), code.scales[:, :, None]  # [R, S, 1]

    def diagonal(self) -> Tensor:
        """The diagonal of the normal equations, [C, d], with the diagonal blocks of H taken as diagonal."""
        columns = self.H.diagonal().clamp(min=0).view(1, -1, self.g).repeat(1, 1, self.p)
        return self.weight * self.lookup.entry_sums((self.scales.square() * columns).view(-1, self.p * self.g))

    def gradient(self) -> Tensor:
        """Where the present codebooks are, minus half the gradient of L: [C, d]."""
        return self._adjoint(self.W - self.code.dequantize())

    def normal(self, entries: Tensor) -> Tensor:
        """The normal equations' matrix times `entries` [C, d]."""
        groups = self.lookup.groups(entries).view(*self.code.codes.shape[:2], self.p * self.g)
        return self._adjoint(to_matrix(self.scales * groups, self.p))

    def _adjoint(self, matrix: Tensor) -> Tensor:
        groups = self.scales * to_groups(matrix @ self.H, self.p, self.g)  # [R, G, d]
        return self.weight * self.lookup.entry_sums(groups.view(-1, self.p * self.g))


def refit_codebooks(fits: list[Fit], iterations: int, ridge: float) -> Tensor:
    """The codebooks, shaped as they are, that minimise the layers' summed L plus a ridge towards the present ones.

    The ridge counts as `ridge` more uses of every entry, at its present value: entries that few groups use would
    otherwise fit their users so closely that no later search can leave them.
    """
    codebooks = fits[0].code.codebooks
    diagonal = sum(fit.diagonal() for fit in fits)  # [C, d]
    uses = sum(fit.lookup.usage.sum() for fit in fits)
    prior = ridge * diagonal.sum() / uses / diagonal.shape[1]
    step = conjugate_gradients(
        lambda entries: sum(fit.normal(entries) for fit in fits) + prior * entries,
        sum(fit.gradient() for fit in fits),
        diagonal + prior,
        iterations,
        dims=(0, 1),
    )
    return codebooks + step.view_as(codebooks)


def refit_scales(W: Tensor, H: Tensor, code: AdditiveCode, iterations: int) -> AdditiveCode:
    """`code` with the scales that minimise L: with one scale per row group, s = ⟨u, w⟩_H / ⟨u, u⟩_H."""
    p, g = code.codebooks.shape[-2:]
    unscaled = replace(code, scales=torch.ones_like(code.scales)).dequantize()
    shape = (*code.scales.shape, -1)

    def adjoint(matrix: Tensor) -> Tensor:
        products = to_groups(matrix @ H * unscaled, p, g)  # [R, G, d]
        return products.reshape(shape).sum(-1)  # [R, S]

    def normal(scales: Tensor) -> Tensor:
        return adjoint(to_matrix(scales[:, :, None] * to_groups(unscaled, p, g), p))

    diagonal = to_groups(unscaled.square() * H.diagonal().clamp(min=0), p, g).reshape(shape).sum(-1)
    residual = adjoint(W - code.dequantize())
    step = conjugate_gradients(normal, residual, diagonal, iterations if code.scales.shape[1] > 1 else 1, dims=(1,))
    return replace(code, scales=code.scales + step)


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor, iterations: int, dims: tuple[int, ...]
) -> Tensor:
    """x of normal(x) = right, from x = 0, preconditioned with `diagonal`; one problem for each index outside `dims`.

    Entries whose diagonal is zero stay at zero; a problem that is solved to rounding error is left alone, for what
    remains of it is noise.
    """
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    x = torch.zeros_like(right)
    residual, direction = right, inverse * right
    energy = (residual * direction).sum(dims, keepdim=True)
    solved = energy * torch.finfo(right.dtype).eps ** 2
    for _ in range(iterations):
        image = normal(direction)
        curvature = (direction * image).sum(dims, keepdim=True)
        length = torch.where((curvature > 0) & (energy > solved), energy / curvature, 0.0)
        x = x + length * direction
        residual = residual - length * image
        preconditioned = inverse * residual
        previous, energy = energy, (residual * preconditioned).sum(dims, keepdim=True)
        direction = preconditioned + torch.where(previous > 0, energy / previous, 0.0) * direction
    return x
