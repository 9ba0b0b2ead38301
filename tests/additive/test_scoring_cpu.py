"""The C search against the torch one: the same codes but for near ties."""

import pytest
import torch
from compilers import compiles
from test_encode import randn

from vqdm.additive import scoring
from vqdm.additive.codebooks import nearest
from vqdm.additive.encode import encode_vectors
from vqdm.errors import UserError

pytestmark = pytest.mark.skipif(not compiles(), reason="no C compiler that works")


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv(scoring.ENVIRONMENT, raising=False)
    monkeypatch.setattr(scoring, "_wanted", None)


def by_torch(targets, codebooks, beam_size, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_wanted", "torch")
        return encode_vectors(targets, codebooks, beam_size)


def remainders(targets, codebooks, codes):
    return (targets - sum(codebooks[m][codes[:, m]] for m in range(len(codebooks)))).square().sum(1)


@pytest.mark.parametrize("d", [1, 2, 4, 7, 8, 16])
@pytest.mark.parametrize(("M", "b", "beam_size"), [(1, 1, 8), (1, 12, 8), (2, 6, 1), (2, 3, 4), (3, 8, 8), (4, 5, 33)])
def test_codes_are_those_of_torch(M, b, d, beam_size, monkeypatch):
    targets, codebooks = randn(67, d), randn(M, 2**b, d, seed=1)
    found = scoring.native_codes(targets, codebooks, beam_size)
    wanted = by_torch(targets, codebooks, beam_size, monkeypatch)
    left, right = (remainders(targets, codebooks, codes) for codes in (found, wanted))
    scores = targets.square().sum(1) + codebooks.square().sum(2).sum(0).max()  # what rounding is relative to
    tied = (left - right).abs() < 8 * torch.finfo(torch.float32).eps * scores
    assert ((found == wanted).all(1) | tied).float().mean() > 0.9  # early near ties may end elsewhere
    torch.testing.assert_close(left.mean(), right.mean(), rtol=1e-3, atol=1e-4)


def test_a_beam_of_everything_is_exhaustive():
    targets, codebooks = randn(20, 3), randn(3, 4, 3, seed=1)
    sums = sum(codebooks[m].view(*([1] * m), 4, *([1] * (2 - m)), 3) for m in range(3)).reshape(-1, 3)
    least = torch.cdist(targets, sums).amin(1).square()
    torch.testing.assert_close(remainders(targets, codebooks, scoring.native_codes(targets, codebooks, 64)), least)


def test_threads_do_not_matter(monkeypatch):
    targets, codebooks = randn(101, 4), randn(2, 16, 4, seed=1)
    whole = scoring.native_codes(targets, codebooks, 4)
    monkeypatch.setattr(scoring, "SCORES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(scoring.native_codes(targets, codebooks, 4), whole)


def test_strided_and_empty_input():
    targets, codebooks = randn(10, 8)[:, ::2], randn(2, 8, 8, seed=1)[:, :, ::2]
    whole = scoring.native_codes(targets.contiguous(), codebooks.contiguous(), 4)
    assert torch.equal(scoring.native_codes(targets, codebooks, 4), whole)
    assert scoring.native_codes(randn(0, 4), randn(1, 4, 4), 2).shape == (0, 1)


def test_values_that_overflow_still_give_valid_codes():
    codes = scoring.native_codes(torch.full((3, 4), 3e38), randn(2, 8, 4), 4)
    assert ((codes >= 0) & (codes < 8)).all()


def test_k_means_finds_the_same_neighbours(monkeypatch):
    points, centroids = randn(50, 4), randn(70, 4, seed=1)
    indices, distances = nearest(points, centroids)
    monkeypatch.setattr(scoring, "_wanted", "torch")
    wanted, squares = nearest(points, centroids)
    assert torch.equal(indices, wanted)
    torch.testing.assert_close(distances, squares, rtol=1e-4, atol=1e-4)


def test_it_is_taken_on_the_cpu_for_float32_and_can_be_refused(monkeypatch):
    assert scoring.native_scoring(randn(2, 4)) and not scoring.native_scoring(randn(2, 4).double())
    scoring.set_scoring("torch")
    assert not scoring.native_scoring(randn(2, 4))
    scoring.set_scoring("native")
    monkeypatch.setattr(scoring, "_native_failure", lambda: "no C compiler")
    with pytest.raises(UserError, match="VQDM_SCORING is native, which does not work: no C compiler"):
        scoring.native_scoring(randn(2, 4))
