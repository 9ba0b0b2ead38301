"""The published procedure of the benchmark and the product's shorter way to the same codes."""

from dataclasses import replace

import plain
import pytest
import torch
from test_code import random_code
from test_encode import randn, second_moment

from vqdm.additive.beam import adam_steps, beam_search
from vqdm.additive.code import CodeSpec, group_columns
from vqdm.additive.codebooks import draw, weighted_error


def problem(spec, rows=12, columns=32):
    code = random_code(spec, rows, columns)
    code = replace(code, codebooks=code.codebooks.double(), scales=code.scales.double())
    return randn(rows, columns).double(), second_moment(columns).double(), code


@pytest.mark.parametrize("spec", [CodeSpec(2, 4, 4), CodeSpec(3, 3, 8), CodeSpec(1, 5, 4)], ids=str)
def test_both_searches_find_the_same_codes(spec):
    W, H, code = problem(spec)
    found = plain.beam_search(W, H, code, 4, torch.Generator().manual_seed(3))
    generator, (G, M) = torch.Generator().manual_seed(3), code.codes.shape[1:]
    order = draw(G, G, generator)
    orders = torch.stack([draw(M, M, generator) for _ in range(G)])
    index = group_columns(order, spec.in_group_size)
    fast = beam_search(W[:, index], H[index][:, index], code.with_groups(order), 4, orders)
    assert torch.equal(found.codes.int(), fast.with_groups(order.argsort()).codes.int())


def test_both_adams_take_the_same_steps():
    W, H, code = problem(CodeSpec(2, 4, 4))
    one, other = plain.adam(W, H, code, 20, 1e-2), adam_steps(W, H, code, 1e-2, 20)
    torch.testing.assert_close(one.codebooks, other.codebooks)
    torch.testing.assert_close(one.scales, other.scales)


def test_an_epoch_lowers_the_error():
    W, H, code = problem(CodeSpec(2, 4, 4))
    after = plain.epoch(W, H, code, 50, 1e-2, 4, torch.Generator().manual_seed(0))
    assert weighted_error(W - after.dequantize(), H) < weighted_error(W - code.dequantize(), H)
