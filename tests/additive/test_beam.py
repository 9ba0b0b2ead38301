"""The fast search over whole rows finds the codes of the plain one, and Adam its gradient."""

from dataclasses import replace

import pytest
import torch
from test_code import SPECS, random_code
from test_encode import randn, second_moment

from vqdm.additive.beam import adam_steps, beam_search
from vqdm.additive.code import CodeSpec
from vqdm.additive.codebooks import weighted_error


def plain_beam_search(W, H, code, beam_size, codebook_orders):
    """AQLM's search as it is written down: every hypothesis of every row is a whole row of codes."""
    R, G, _ = code.codes.shape
    p, K = code.spec.out_group_size, code.spec.entries

    def losses(codes):
        difference = W - replace(code, codes=codes).dequantize()
        return ((difference @ H) * difference).view(R, -1).sum(1)

    beam = [code.codes]
    for j in range(G):
        for m in codebook_orders[j].tolist():
            tried, scores = [], []
            for hypothesis in beam:
                for k in range(K):
                    codes = hypothesis.clone()
                    codes[:, j, m] = k
                    tried.append(codes)
                    scores.append(losses(codes))
            tried, scores = torch.stack(tried), torch.stack(scores)  # [B·K, R, G, M], [B·K, R]
            best = scores.topk(min(beam_size, len(scores)), dim=0, largest=False).indices  # [B', R]
            beam = [tried[picks, torch.arange(R)] for picks in best]
    assert p * R == len(W)
    return beam[0]


CASES = [
    (CodeSpec(2, 3, 4), 6, 16, 4),
    (CodeSpec(3, 2, 2), 5, 12, 8),
    (CodeSpec(2, 3, 4), 3, 32, 1),
    (CodeSpec(1, 4, 4), 4, 16, 3),
    *((spec, 4, 16, 3) for spec in SPECS[:3]),
    (CodeSpec(2, 3, 4, scale_nbits=16), 4, 16, 3),
]


@pytest.mark.parametrize(("spec", "rows", "columns", "beam_size"), CASES, ids=str)
@pytest.mark.parametrize("block", [8, 128])
@pytest.mark.parametrize("values", [2**24, 200])
def test_codes_are_those_of_the_plain_search(spec, rows, columns, beam_size, block, values, monkeypatch):
    monkeypatch.setitem(beam_search.__globals__, "HYPOTHESES_AT_ONCE", values)
    monkeypatch.setitem(beam_search.__globals__["column_blocks"].__globals__, "COLUMNS_AT_ONCE", block)
    W, H = randn(rows, columns).double(), second_moment(columns).double()
    code = random_code(spec, rows, columns)
    code = replace(code, codebooks=code.codebooks.double(), scales=code.scales.double())
    generator = torch.Generator().manual_seed(0)
    M = spec.num_codebooks
    orders = torch.stack([torch.randperm(M, generator=generator) for _ in range(columns // spec.in_group_size)])
    found = beam_search(W, H, code, beam_size, orders)
    assert torch.equal(found.codes, plain_beam_search(W, H, code, beam_size, orders))


def test_adam_follows_the_gradient_of_the_loss():
    W, H = randn(6, 16).double(), second_moment(16).double()
    code = random_code(CodeSpec(2, 3, 4), 6, 16)
    code = replace(code, codebooks=code.codebooks.double().requires_grad_(), scales=code.scales.double())
    loss = weighted_error(W - code.dequantize(), H)
    gradient = torch.autograd.grad(loss, code.codebooks)[0]
    start = replace(code, codebooks=code.codebooks.detach())
    moved = adam_steps(W, H, start, lr=1e-3, steps=1).codebooks - start.codebooks
    used = gradient.abs() > 1e-3 * gradient.abs().max()
    torch.testing.assert_close(moved[used], -1e-3 * gradient[used].sign(), atol=1e-6, rtol=1e-3)
    after = adam_steps(W, H, start, lr=1e-2, steps=50)
    assert weighted_error(W - after.dequantize(), H) < loss


def test_adam_leaves_a_layer_of_zeros():
    code = random_code(CodeSpec(2, 3, 4), 6, 16)
    assert torch.equal(adam_steps(torch.zeros(6, 16), torch.eye(16), code, 1e-2, 5).codebooks, code.codebooks)
