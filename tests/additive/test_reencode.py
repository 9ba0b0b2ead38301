"""Moves of coded columns against a search over all codes."""

import itertools

import pytest
import torch
from test_quantized import random_code

from vqdm.additive.code import CodeSpec
from vqdm.additive.reencode import Move, make_moves, nearest_moves, within

SPECS = [
    CodeSpec(2, 2, 4),
    CodeSpec(1, 3, 4, out_group_size=2),
    CodeSpec(2, 2, 2, groupwise_codebooks=True, input_channel_scales=True),
    CodeSpec(2, 2, 4, scale_nbits=16),
    CodeSpec(1, 3, 4, codebook_value_nbits=2),
]


def problem(spec, rows=6, columns=8):
    """A random code, wishes, and factors of metrics."""
    code = random_code(spec, rows, columns)
    torch.manual_seed(3)
    wishes = 2 * torch.randn(rows, columns)
    factors = torch.randn(columns // spec.in_group_size, spec.in_group_size, spec.in_group_size)
    return code, wishes, factors


def distances(code, wishes, factors, decoded):
    """[R, G] of decoded values to the present ones plus the wishes."""
    p, g = code.spec.out_group_size, code.spec.in_group_size
    difference = (code.dequantize() + wishes - decoded).unflatten(1, (-1, g))  # [O, G, g]
    return torch.einsum("ogi,gik->ogk", difference, factors).square().sum(2).unflatten(0, (-1, p)).sum(1)


def least_by_trying_all(code, wishes, factors):
    """[R, G] of the nearest of all combinations of entries."""
    spec = code.spec
    best = torch.full(code.codes.shape[:2], torch.inf)
    for entries in itertools.product(range(spec.entries), repeat=spec.num_codebooks):
        tried = type(code)(spec, torch.tensor(entries).expand_as(code.codes), code.codebooks, code.scales)
        tried.input_scales = code.input_scales
        best = torch.minimum(best, distances(code, wishes, factors, tried.dequantize()))
    return best


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_wide_beam_finds_the_nearest_codes(spec):
    code, wishes, factors = problem(spec)
    move = nearest_moves(code, wishes, factors, beam_size=spec.entries**spec.num_codebooks)
    moved = type(code)(spec, move.codes, code.codebooks, code.scales, code.input_scales).dequantize()
    torch.testing.assert_close(moved - code.dequantize(), move.moved, atol=1e-5, rtol=1e-4)
    found = distances(code, wishes, factors, moved)
    torch.testing.assert_close(found, least_by_trying_all(code, wishes, factors), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        distances(code, wishes, factors, code.dequantize()) - found, move.gain, atol=1e-4, rtol=1e-3
    )
    assert (move.gain > 0).any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_a_wish_all_stays(spec):
    code, wishes, factors = problem(spec)
    move = nearest_moves(code, 0 * wishes, factors, beam_size=1)
    assert move.gain.eq(0).all() and move.moved.eq(0).all() and torch.equal(move.codes, code.codes)


def test_the_largest_gains_that_fit_are_made():
    gain = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    moved = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])  # sizes [[2, 1], [1, 0]]
    move = Move(torch.ones(2, 2, 1, dtype=torch.int32), moved, gain)
    assert within(torch.tensor(3.0), move, 1).tolist() == [[True, False], [True, False]]
    assert within(torch.tensor(9.0), move, 1).tolist() == [[True, True], [True, False]]
    codes, change = make_moves(torch.zeros(2, 2, 1), move, within(torch.tensor(3.0), move, 1), 1)
    assert codes.flatten().tolist() == [1, 0, 1, 0]
    assert change.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
