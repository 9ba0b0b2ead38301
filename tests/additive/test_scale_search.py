"""Scales for error feedback against trying every scale on every row."""

from dataclasses import replace

import pytest
import torch
from test_encode import randn, second_moment

from vqdm.additive import encode
from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.additive.encode import STEP, TRIALS, feedback_encode, feedback_factors, row_errors, searched_feedback

SPECS = [CodeSpec(1, 4, 4), CodeSpec(2, 3, 2, out_group_size=2), CodeSpec(1, 5, 2, scale_nbits=16)]


def problem(spec, seed=0, rows=12, columns=16):
    """W, H, a code that is all the first, factors and feedback; some weights are far beyond the codebooks."""
    W, H = randn(rows, columns, seed=seed), second_moment(columns, seed=seed + 1)
    W[::4, 5] *= 8
    R, G = rows // spec.out_group_size, columns // spec.in_group_size
    scales = torch.ones(R, G if spec.scale_nbits else 1)
    codes = torch.zeros(R, G, spec.num_codebooks, dtype=torch.int64)
    code = AdditiveCode(spec, codes, randn(*spec.codebooks_shape, seed=seed + 2), scales)
    return W, H, code, *feedback_factors(H, spec.in_group_size, 0.01)


def searched(*problems):
    return searched_feedback(*map(list, zip(*problems, strict=True)), beam_size=4)


def plainly(W, H, code, factors, feedback):
    """Scales [R] and errors [R]: of each row the multiples up to the first that is worse than the best so far."""
    multiples = [STEP**trial for trial in range(TRIALS + 1)]
    tries = [replace(code, scales=(code.scales * multiple).half().float()) for multiple in multiples]
    errors = torch.stack([row_errors(W, H, feedback_encode(W, one, factors, feedback, 4)) for one in tries])  # [T, R]
    best = [next((t for t in range(TRIALS) if row[t + 1] >= row[t]), TRIALS) for row in errors.T.tolist()]
    rows = range(len(best))
    return torch.stack([tries[t].scales[r] for r, t in zip(rows, best, strict=True)]), errors[best, rows]


@pytest.fixture(params=[1, 30, 512])
def rows_at_once(request, monkeypatch):
    """One scale at a time, some, and all."""
    monkeypatch.setitem(encode.ROWS_AT_ONCE, "cpu", request.param)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_row_group_has_the_best_scale_before_the_first_that_is_worse(spec, rows_at_once):
    W, H, code, *feedback = problem(spec)
    (found,) = searched((W, H, code, *feedback))
    scales, errors = plainly(W, H, code, *feedback)
    assert torch.equal(found.scales, scales)
    torch.testing.assert_close(row_errors(W, H, found), errors, rtol=1e-4, atol=0)
    assert len(found.scales.unique()) > 2


def test_the_code_to_begin_with_is_left_alone():
    W, H, code, *feedback = problem(SPECS[0])
    searched((W, H, code, *feedback))
    assert (code.scales == 1).all() and not code.codes.any()


def test_errors_of_row_groups_add_up_to_the_weighted_error():
    W, H, code, *_ = problem(SPECS[1])
    D = (W - code.dequantize()).double()
    torch.testing.assert_close(row_errors(W, H, code).double().sum(), (D @ H.double() @ D.T).trace(), rtol=1e-5, atol=0)


def test_a_weight_beyond_the_codebook_costs_little():
    """Ten bits of evenly spaced values up to 4, and one weight of 12 in a row whose others are about one."""
    W, H = randn(8, 16), torch.eye(16)
    W[3, 7] = 12
    grid = torch.linspace(-4, 4, 1024).view(1, -1, 1, 1)
    code = AdditiveCode(CodeSpec(1, 10, 1), torch.zeros(8, 16, 1, dtype=torch.int64), grid, torch.ones(8, 1))
    given = W, H, code, *feedback_factors(H, 1, 0.01)
    cut, (found,) = feedback_encode(W, code, *given[3:], 4), searched(given)
    assert row_errors(W, H, cut)[3] > 60 and row_errors(W, H, found)[3] < 1e-2
    assert found.scales[3] >= 3 and (found.scales[[0, 1, 2, 4, 5, 6, 7]] < 1.5).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_layers_at_once_are_what_each_is_alone(spec, rows_at_once):
    """Also where they need different numbers of trials."""
    problems = [problem(spec, seed=10 * n) for n in range(3)]
    problems[1][0].mul_(0.2)  # nothing beyond the codebooks
    for found, one in zip(searched(*problems), problems, strict=True):
        (alone,) = searched(one)
        assert torch.equal(found.scales, alone.scales) and torch.equal(found.codes, alone.codes)
