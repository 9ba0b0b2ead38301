"""What holds for every layer: no accepted step raises the loss, wide searches are exhaustive, threads do not matter."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_code import random_code
from test_encode import randn, second_moment

from vqdm.additive.beam import beam_search
from vqdm.additive.code import CodeSpec
from vqdm.additive.codebooks import Fit, refit_codebooks, refit_scales, weighted_error
from vqdm.additive.encode import coordinate_descent
from vqdm.additive.solve import SolverConfig, solve_layer

TINY = settings(max_examples=15, deadline=None, derandomize=True)


def problem(rows, columns, spec, seed):
    code = random_code(spec, rows, columns, seed)
    code = replace(code, codebooks=code.codebooks.double(), scales=code.scales.double())
    return randn(rows, columns, seed=seed).double(), second_moment(columns, seed=seed).double(), code


@TINY
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 6),
    books=st.integers(1, 3),
    bits=st.integers(1, 4),
    g=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_the_loss_never_rises(rows, groups, books, bits, g, seed):
    W, H, code = problem(rows, groups * g, CodeSpec(books, bits, g), seed)
    energy = weighted_error(W, H)
    losses = [weighted_error(W - code.dequantize(), H) / energy]
    for _ in range(2):
        code = replace(code, codebooks=refit_codebooks([Fit(W, H, code)], 30, ridge=0.0))
        losses.append(weighted_error(W - code.dequantize(), H) / energy)
        code = refit_scales(W, H, code, 4)
        losses.append(weighted_error(W - code.dequantize(), H) / energy)
        code = coordinate_descent(W, H, code, beam_size=4)
        losses.append(weighted_error(W - code.dequantize(), H) / energy)
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(losses))


@TINY
@given(rows=st.integers(1, 3), groups=st.integers(1, 3), books=st.integers(1, 2), seed=st.integers(0, 99))
def test_a_beam_of_everything_finds_the_optimum(rows, groups, books, seed):
    W, H, code = problem(rows, groups * 2, CodeSpec(books, 1, 2), seed)
    every = torch.tensor(list(itertools.product(range(2), repeat=groups * books))).view(-1, 1, groups, books)
    differences = torch.stack(
        [W - replace(code, codes=one.expand(rows, -1, -1)).dequantize() for one in every]
    )  # [all, O, I]
    least = ((differences @ H) * differences).sum(2).amin(0)  # [O]
    orders = torch.arange(books).expand(groups, books)
    found = W - beam_search(W, H, code, len(every), orders).dequantize()
    torch.testing.assert_close(((found @ H) * found).sum(1), least)


@TINY
@given(rows=st.integers(1, 4), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_descent_ends_where_no_group_can_do_better(rows, groups, seed):
    W, H, code = problem(rows, groups * 2, CodeSpec(1, 3, 2), seed)
    for _ in range(12):
        code = coordinate_descent(W, H, code, beam_size=8)
    best = weighted_error(W - code.dequantize(), H)
    for row, group, entry in itertools.product(range(rows), range(groups), range(8)):
        codes = code.codes.clone()
        codes[row, group, 0] = entry
        assert weighted_error(W - replace(code, codes=codes).dequantize(), H) >= best - 1e-9


@pytest.mark.parametrize("encoder", ["ldl", "beam"])
def test_any_number_of_threads_gives_the_same_up_to_rounding(encoder):
    W, H = randn(48, 64), second_moment(64)
    before, errors = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            config = SolverConfig(CodeSpec(2, 4, 4), encoder, max_epochs=3, steps_per_epoch=5)
            errors.append(solve_layer(W, H, config, torch.Generator().manual_seed(0))[1].error)
    finally:
        torch.set_num_threads(before)
    assert errors[0] == pytest.approx(errors[1], rel=0.03)
