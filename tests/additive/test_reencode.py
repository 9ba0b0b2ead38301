"""Moves of coded columns against a search over all codes."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_quantized import random_code

from vqdm.additive.code import CodeSpec, width_slice
from vqdm.additive.encode import Move, encode_under, encode_vectors, nearest_moves, within

SPECS = [
    CodeSpec(2, 2, 4),
    CodeSpec(1, 3, 4, out_group_size=2),
    CodeSpec(2, 2, 2, groupwise_codebooks=True, input_channel_scales=True),
    CodeSpec(2, 2, 4, scale_nbits=16),
    CodeSpec(1, 3, 4, codebook_value_nbits=2),
]


def problem(spec, rows=6, columns=8):
    """A random code, all its groups, wishes for them, and metrics."""
    code = random_code(spec, rows, columns)
    generator = torch.Generator().manual_seed(3)
    at = torch.arange(code.codes[..., 0].numel())
    wishes = 2 * torch.randn(len(at), spec.out_group_size, spec.in_group_size, generator=generator)
    factors = torch.randn(len(at), spec.in_group_size, spec.in_group_size, generator=generator)
    return code, at, wishes, factors @ factors.mT


def grouped(code, matrix):
    """[O, I] → [R·G, p, g]."""
    p, g = code.spec.out_group_size, code.spec.in_group_size
    O, I = matrix.shape  # noqa: E741
    return matrix.view(O // p, p, I // g, g).transpose(1, 2).flatten(0, 1)


def distances(code, wishes, metrics, codes):
    """[R·G] of the values of other codes to the present ones plus the wishes."""
    other = replace(code, codes=codes.view_as(code.codes)).dequantize()
    difference = wishes - grouped(code, other - code.dequantize())
    return torch.einsum("nai,nij,naj->n", difference, metrics, difference)


def least_by_trying_all(code, wishes, metrics):
    """[R·G] of the nearest of all combinations of entries."""
    spec, best = code.spec, torch.full((len(wishes),), torch.inf)
    for entries in itertools.product(range(spec.entries), repeat=spec.num_codebooks):
        tried = distances(code, wishes, metrics, torch.tensor(entries).repeat(len(wishes), 1))
        best = torch.minimum(best, tried)
    return best


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_wide_beam_finds_the_nearest_codes(spec):
    code, at, wishes, metrics = problem(spec)
    move = nearest_moves(code, at, wishes, metrics, beam_size=spec.entries**spec.num_codebooks)
    found = distances(code, wishes, metrics, move.codes)
    torch.testing.assert_close(found, least_by_trying_all(code, wishes, metrics), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(distances(code, wishes, metrics, code.codes) - found, move.gain, atol=1e-3, rtol=1e-3)
    after = replace(code, codes=move.codes.view_as(code.codes).to(code.codes.dtype)).dequantize()
    torch.testing.assert_close(grouped(code, after - code.dequantize()), move.moved, atol=1e-5, rtol=1e-4)
    assert (move.gain > 0).any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_some_groups_are_found_as_all_are(spec):
    code, at, wishes, metrics = problem(spec)
    every = nearest_moves(code, at, wishes, metrics, beam_size=2)
    some = nearest_moves(code, at[1::3], wishes[1::3], metrics[1::3], beam_size=2)
    assert torch.equal(some.codes, every.codes[1::3])
    torch.testing.assert_close(some.gain, every.gain[1::3])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_a_wish_all_stays(spec):
    code, at, wishes, metrics = problem(spec)
    move = nearest_moves(code, at, 0 * wishes, metrics, beam_size=4)
    assert move.moved.abs().max() < 1e-5


def test_under_one_metric_codes_are_as_those_of_the_solver():
    generator = torch.Generator().manual_seed(5)
    targets, books = torch.randn(50, 1, 4, generator=generator), torch.randn(3, 16, 1, 4, generator=generator)
    factor = torch.randn(4, 4, generator=generator)
    found = encode_under(targets, (factor @ factor.T).expand(50, 4, 4), books, 4)
    wanted = encode_vectors(targets[:, 0] @ factor, (books @ factor).flatten(2), 4)
    assert (found == wanted).all(1).float().mean() > 0.95  # but for ties in rounding


def test_the_largest_gains_that_fit_are_made():
    gain = torch.tensor([3.0, 1.0, 2.0, 0.0])
    moved = torch.tensor([2.0, 1.0, 1.0, 0.0]).sqrt().view(4, 1, 1)
    move = Move(torch.ones(4, 1, dtype=torch.int64), moved, gain)
    assert within(torch.tensor(3.5), move).tolist() == [True, False, True, False]
    assert within(torch.tensor(9.0), move).tolist() == [True, True, True, False]


def test_codes_of_variable_rate_are_the_nearest_of_their_width():
    spec = CodeSpec(1, 4, 4, shared_codebooks="shared", row_bits=5)
    code, at, wishes, metrics = problem(spec)
    move = nearest_moves(code, at, wishes, metrics, beam_size=1)
    found = distances(code, wishes, metrics, move.codes)
    for n, entries in enumerate(list(map(width_slice, code.widths.tolist())) * 6):
        tried = [
            distances(code, wishes, metrics, code.codes.view(-1).index_fill(0, torch.tensor(n), entry))[n]
            for entry in range(entries.start, entries.stop)
        ]
        assert found[n] == pytest.approx(min(tried).item(), rel=1e-4)
        assert entries.start <= move.codes[n] < entries.stop
