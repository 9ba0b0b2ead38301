"""The in-group beam, error feedback and coordinate descent against exhaustive and direct computations."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from test_code import SPECS, random_code

from vqdm.additive.code import CodeSpec
from vqdm.additive.codebooks import weighted_error
from vqdm.additive.encode import (
    coordinate_descent,
    damped_cholesky,
    encode_group,
    encode_vectors,
    feedback_encode,
    feedback_factors,
    smallest,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(columns, seed=0):
    X = randn(4 * columns, columns, seed=seed) @ (torch.eye(columns) + 0.3 * randn(columns, columns, seed=seed + 1))
    return X.T @ X / len(X)


@pytest.mark.parametrize("M", [1, 2, 3])
def test_a_beam_of_all_hypotheses_is_exhaustive_search(M):
    targets, codebooks = randn(20, 3), randn(M, 4, 3, seed=1)
    sums = torch.stack([sum(codebooks[m][k] for m, k in enumerate(ks)) for ks in product(range(4), repeat=M)])
    codes = encode_vectors(targets, codebooks, beam_size=4**M)
    coded = sum(codebooks[m][codes[:, m]] for m in range(M))
    torch.testing.assert_close((targets - coded).norm(dim=1), torch.cdist(targets, sums).amin(1))


def test_a_wider_beam_is_better():
    targets, codebooks = randn(300, 4), randn(3, 16, 4, seed=1) / torch.tensor([1, 2, 4])[:, None, None]
    errors = []
    for beam_size in (1, 4, 16):
        codes = encode_vectors(targets, codebooks, beam_size)
        errors.append((targets - sum(codebooks[m][codes[:, m]] for m in range(3))).square().sum())
    assert errors[0] > errors[1] > errors[2]


def test_rows_in_parts_are_rows_at_once(monkeypatch):
    targets, codebooks = randn(50, 4), randn(2, 16, 4, seed=1)
    whole = encode_vectors(targets, codebooks, 4)
    monkeypatch.setitem(encode_vectors.__globals__["rows_at_once"].__globals__["SCORES_AT_ONCE"], "cpu", 700)
    assert torch.equal(encode_vectors(targets, codebooks, 4), whole)


def test_a_group_is_coded_under_its_metric_and_scale():
    targets, codebooks, scales = randn(10, 3), randn(2, 4, 2, 3, seed=1), torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])
    factor = damped_cholesky(second_moment(3), 0)
    codes, coded = encode_group(targets, scales, codebooks, factor, beam_size=16)
    for r in range(5):
        rows = slice(2 * r, 2 * r + 2)
        values = {ks: scales[r] * sum(codebooks[m][k] for m, k in enumerate(ks)) for ks in product(range(4), repeat=2)}
        errors = {ks: ((targets[rows] - value) @ factor).square().sum() for ks, value in values.items()}
        torch.testing.assert_close(coded[rows], values[tuple(codes[r].tolist())])
        torch.testing.assert_close(errors[tuple(codes[r].tolist())], min(errors.values()))


def test_feedback_factors_rebuild_the_damped_matrix():
    H = second_moment(12)
    factors, feedback = feedback_factors(H, 4, 0.1)
    V = feedback @ torch.block_diag(*factors)
    torch.testing.assert_close(V @ V.T, H + 0.1 * H.diagonal().mean() * torch.eye(12), atol=1e-4, rtol=1e-4)
    assert torch.equal(feedback.tril(-1)[4:, :4], torch.zeros(8, 4))


def plain_feedback(W, H, code, damping, beam_size):
    """Code a group, then move all later columns to their best values given the groups coded so far."""
    g = code.spec.in_group_size
    H = H + damping * H.diagonal().mean() * torch.eye(len(H))
    target, codes = W.clone(), code.codes.clone()
    for j in range(W.shape[1] // g):
        now, later = slice(j * g, (j + 1) * g), slice((j + 1) * g, None)
        schur = H[now, now] - H[now, later] @ torch.linalg.solve(H[later, later], H[later, now])
        books = code.codebooks[j] if code.codebooks.dim() == 5 else code.codebooks
        scales = code.scales[:, j if code.scales.shape[1] > 1 else 0]
        codes[:, j], coded = encode_group(target[:, now], scales, books, torch.linalg.cholesky(schur), beam_size)
        error = target[:, now] - coded
        target[:, later] += torch.linalg.solve(H[later, later], H[later, now] @ error.T).T
    return codes


@pytest.mark.parametrize("spec", SPECS[:5], ids=str)
@pytest.mark.parametrize("block", [4, 128])
def test_feedback_agrees_with_moving_all_later_columns(spec, block, monkeypatch):
    monkeypatch.setitem(feedback_encode.__globals__, "COLUMNS_AT_ONCE", block)
    W, H = randn(12, 16).double(), second_moment(16).double()
    code = random_code(spec, 12, 16)
    code = replace(code, codebooks=code.codebooks.double(), scales=code.scales.double(), input_scales=None)
    found = feedback_encode(W, code, *feedback_factors(H, spec.in_group_size, 0.01), beam_size=4)
    assert torch.equal(found.codes, plain_feedback(W, H, code, 0.01, beam_size=4))


def test_feedback_beats_nearest_values():
    W, H = randn(64, 32), second_moment(32)
    code = replace(random_code(CodeSpec(2, 4, 4), 64, 32), scales=torch.ones(64, 1))
    factors, feedback = feedback_factors(H, 4, 0.01)
    plain = feedback_encode(W, code, torch.eye(4).expand(8, 4, 4), torch.zeros(32, 32), beam_size=8)
    found = feedback_encode(W, code, factors, feedback, beam_size=8)
    assert weighted_error(W - found.dequantize(), H) < 0.8 * weighted_error(W - plain.dequantize(), H)


@pytest.mark.parametrize("spec", SPECS[:5], ids=str)
@pytest.mark.parametrize("block", [4, 128])
def test_descent_lowers_every_row_and_agrees_with_one_group_at_a_time(spec, block, monkeypatch):
    monkeypatch.setitem(coordinate_descent.__globals__, "COLUMNS_AT_ONCE", block)
    p, g = spec.out_group_size, spec.in_group_size
    W, H = randn(12, 16).double(), second_moment(16).double()
    code = random_code(spec, 12, 16)
    code = replace(code, codebooks=code.codebooks.double(), scales=code.scales.double(), input_scales=None)

    def errors(code):
        difference = W - code.dequantize()
        return ((difference @ H) * difference).view(12 // p, -1).sum(1)

    found = coordinate_descent(W, H, code, beam_size=4)
    plain = code
    for j in range(16 // g):
        now = slice(j * g, (j + 1) * g)
        books = code.codebooks[j] if code.codebooks.dim() == 5 else code.codebooks
        scales = code.scales[:, j if code.scales.shape[1] > 1 else 0]
        pull = (W - plain.dequantize()) @ H[:, now]
        wanted = plain.dequantize()[:, now] + torch.linalg.solve(H[now, now], pull.T).T
        codes = plain.codes.clone()
        codes[:, j], _ = encode_group(wanted, scales, books, torch.linalg.cholesky(H[now, now]), beam_size=4)
        moved = replace(plain, codes=codes)
        better = errors(moved) < errors(plain)
        plain = replace(plain, codes=torch.where(better[:, None, None], codes, plain.codes))
    assert torch.equal(found.codes, plain.codes)
    assert (errors(found) <= errors(code)).all()


def test_cholesky_survives_what_has_no_factor():
    x = randn(2, 8)
    for H in (x.T @ x, torch.zeros(8, 8), torch.diag(torch.tensor([1.0, 0, 0, 2, 0, 0, 0, 0]))):
        for damping in (0.0, 0.01):
            factor = damped_cholesky(H, damping)
            assert factor.isfinite().all()
            assert (factor.diagonal() > 0).all()


@pytest.mark.parametrize(("n", "count"), [(2048, 8), (256, 8), (64, 1), (2048, 1), (7, 3), (4, 9), (96, 5)])
def test_smallest_agrees_with_sorting(n, count):
    scores = randn(33, n)
    found = scores.gather(1, smallest(scores, count)).sort(1).values
    assert torch.equal(found, scores.sort(1).values[:, :count])
