"""The Triton kernel of the in-group beam against scoring everything and sorting, on a GPU or in the interpreter."""

import pytest
import torch

kernels = pytest.importorskip("vqdm.additive.scoring_triton")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_sorting(residuals, codebook, count):
    """Distances and b·K + k of the smallest, in ascending order, the earlier of equal ones first."""
    distances = (residuals[:, :, None] - codebook).square().sum(3).flatten(1)  # [N, B, K, d] → [N, B·K]
    ordered = distances.sort(dim=1, stable=True)
    return ordered.values[:, :count], ordered.indices[:, :count]


def by_kernel(residuals, codebook, count, device, **options):
    found = kernels.best_entries(residuals.to(device), codebook.to(device), count, **options)
    distances, parents, entries = (tensor.cpu() for tensor in found)
    picks = parents * len(codebook) + entries
    order = picks.argsort(1)
    order = order.gather(1, distances.gather(1, order).argsort(dim=1, stable=True))
    return distances.gather(1, order), picks.gather(1, order)


# vectors (tiles hold 1 to 32), hypotheses, entries, values, count
SHAPES = [
    (1, 1, 2, 1, 1),
    (37, 1, 64, 8, 5),
    (33, 1, 16, 4, 32),  # more wanted than there are
    (5, 8, 256, 8, 8),
    (7, 5, 16, 3, 6),
    (3, 32, 8, 16, 32),
    (2, 3, 1024, 64, 1),
    (0, 4, 8, 4, 2),
]


@pytest.mark.parametrize(("N", "B", "K", "d", "count"), SHAPES)
def test_the_kernel_finds_what_sorting_finds(N, B, K, d, count, triton_device):
    residuals, codebook = randn(N, B, d), randn(K, d, seed=1)
    distances, picks = by_sorting(residuals, codebook, count)
    found, found_picks = by_kernel(residuals, codebook, count, triton_device)
    torch.testing.assert_close(found, distances, rtol=1e-5, atol=1e-5)
    assert torch.equal(found_picks, picks)


def test_every_problem_of_several_has_its_own_codebook(triton_device):
    residuals, codebooks = randn(3, 21, 4, 8).to(triton_device), randn(3, 64, 8, seed=1).to(triton_device)
    found = kernels.best_entries(residuals, codebooks, 5)
    for layer, alone in enumerate(map(kernels.best_entries, residuals, codebooks, [5] * 3)):
        assert all(torch.equal(some[layer], one) for some, one in zip(found, alone, strict=True))


def test_of_equal_distances_the_first_are_taken(triton_device):
    residuals = torch.randint(-1, 2, (9, 4, 2), generator=torch.Generator().manual_seed(0)).float()
    codebook = torch.randint(-1, 2, (64, 2), generator=torch.Generator().manual_seed(1)).float()
    distances, picks = by_sorting(residuals, codebook, 7)
    found, found_picks = by_kernel(residuals, codebook, 7, triton_device)
    assert torch.equal(found, distances) and torch.equal(found_picks, picks)


def test_small_differences_to_large_distances_are_seen(triton_device):
    """An entry a hundredth of a percent nearer is found in full float32, the largest values being powers of two."""
    residuals = torch.full((4, 1, 4), 2.0)
    codebook = torch.full((16, 4), -2.0)
    codebook[torch.arange(4), torch.arange(4)] += torch.tensor([1e-3, 2e-3, 3e-3, 4e-3])
    _, picks = by_kernel(residuals, codebook, 4, triton_device)
    assert picks.tolist() == [[3, 2, 1, 0]] * 4


def test_rounded_products_stay_close(triton_device):
    residuals, codebook = randn(8, 2, 8), randn(32, 8, seed=1)
    distances, _ = by_sorting(residuals, codebook, 4)
    for precision in kernels.PRECISIONS:
        found, _ = by_kernel(residuals, codebook, 4, triton_device, precision=precision)
        torch.testing.assert_close(found, distances, rtol=0.02, atol=0.02)
