import pytest
import torch
from test_encode import randn

from vqdm.additive.topk import smallest


@pytest.mark.parametrize(("n", "count"), [(2048, 8), (256, 8), (64, 1), (2048, 1), (7, 3), (4, 9), (96, 5)])
def test_smallest_agrees_with_sorting(n, count):
    scores = randn(33, n)
    found = scores.gather(1, smallest(scores, count)).sort(1).values
    assert torch.equal(found, scores.sort(1).values[:, :count])
