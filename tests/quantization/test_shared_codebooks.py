"""Shared codebooks: training reaches what a plain search reaches, and solving keeps them as they are."""

from dataclasses import replace

import pytest
import torch
from test_encode import randn, second_moment

from vqdm.additive.code import CodeSpec, SharedCodebooks, stored_bits
from vqdm.additive.codebooks import Fit, refit_codebooks, weighted_error
from vqdm.additive.solve import SolverConfig, relative_error, solve_layer
from vqdm.quantization.shared_codebooks import encode_sample, sample_layer, train_shared_codebooks

SPEC = CodeSpec(2, 4, 4, shared_codebooks="unet")
CONFIG = SolverConfig(SPEC, beam_size=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problems():
    return [(randn(24, 16, seed=n) * 10.0 ** (n - 1), second_moment(16, seed=n)) for n in range(3)]


@pytest.fixture(scope="module")
def codebooks():
    return train_shared_codebooks(
        [sample_layer(W, H, 24, CONFIG, generator()) for W, H in problems()], CONFIG, generator()
    )


def test_shared_codebooks_hold_what_float16_keeps_and_are_the_same_again(codebooks):
    again = train_shared_codebooks(
        [sample_layer(W, H, 24, CONFIG, generator()) for W, H in problems()], CONFIG, generator()
    )
    assert codebooks.shape == SPEC.codebooks_shape
    assert torch.equal(codebooks, codebooks.half().float()) and torch.equal(codebooks, again)


def test_training_lowers_the_error_of_the_sample(codebooks):
    samples = [sample_layer(W, H, 24, CONFIG, generator()) for W, H in problems()]
    start = torch.randn(codebooks.shape, generator=generator()) * 0.7
    errors = [
        sum(relative_error(s.W, encode_sample(s, books, CONFIG), s.H) for s in samples) for books in (start, codebooks)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_a_sample_is_some_rows_of_the_layer_and_its_whole_hessian():
    W, H = problems()[0]
    sample = sample_layer(W, H, 5, CONFIG, generator())
    assert sample.W.shape == (5, 16) and sample.H.shape == (16, 16)
    norms = W.norm(dim=1)
    assert all((norms - row).abs().min() < 1e-5 for row in sample.W.norm(dim=1))
    assert sample.share == pytest.approx(W.numel() / weighted_error(sample.W, sample.H).item())


def test_codebooks_are_fitted_to_all_layers_at_once():
    """Two layers with the same codes are one layer with all the rows."""
    W, H = problems()[1]
    sample = sample_layer(W, H, 24, CONFIG, generator())
    code = encode_sample(sample, randn(*SPEC.codebooks_shape), CONFIG)
    parts = [
        Fit(sample.W[rows], sample.H, replace(code, codes=code.codes[rows], scales=code.scales[rows]))
        for rows in (slice(0, 10), slice(10, 24))
    ]
    whole = refit_codebooks([Fit(sample.W, sample.H, code)], 30, ridge=0.0)
    torch.testing.assert_close(refit_codebooks(parts, 30, ridge=0.0), whole, rtol=1e-3, atol=1e-3)


def test_solving_keeps_the_shared_codebooks_and_stores_no_codebooks(codebooks):
    W, H = problems()[2]
    code, report = solve_layer(W, H, CONFIG, generator(), shared=SharedCodebooks(codebooks, 10_000))
    assert torch.equal(code.codebooks.float(), codebooks)
    assert set(code.pack()) == {"codes", "scales"}
    assert stored_bits(code.pack()) / W.numel() == 2 + 16 / 16
    assert report.bits_per_weight == pytest.approx(3 + 16 * codebooks.numel() / 10_000)
    assert report.error == pytest.approx(relative_error(W, code, H))
    plain = (W.view(24, 4, 4) / W.square().mean(1).sqrt()[:, None, None]).reshape(-1, 4)
    sums = (codebooks[0][:, None] + codebooks[1][None]).view(-1, 4)  # all 256 pairs of entries
    nearest = sums[torch.cdist(plain, sums).argmin(1)].view(24, 16) * W.square().mean(1, keepdim=True).sqrt()
    assert report.error <= weighted_error(W - nearest, H) / weighted_error(W, H)


def test_more_epochs_are_never_worse(codebooks):
    W, H = problems()[0]
    configs = [replace(CONFIG, max_epochs=n, relative_mse_tolerance=0.0) for n in (1, 2, 4)]
    errors = [
        solve_layer(W, H, config, generator(), shared=SharedCodebooks(codebooks, 10_000))[1].error for config in configs
    ]
    assert errors[0] > errors[1] >= errors[2]


@pytest.mark.parametrize(
    "spec, given, words",
    [
        (SPEC, None, "needed if the format has them"),
        (CodeSpec(2, 4, 4), SPEC, "needed if the format has them"),
        (SPEC, CodeSpec(1, 4, 4), "the shared codebooks have shape"),
    ],
)
def test_codebooks_must_fit_the_format(spec, given, words):
    W, H = problems()[0]
    with pytest.raises(ValueError, match=words):
        solve_layer(
            W,
            H,
            SolverConfig(spec),
            generator(),
            shared=given and SharedCodebooks(torch.zeros(given.codebooks_shape), 1),
        )


@pytest.mark.parametrize("settings", [{"groupwise_codebooks": True}, {"codebook_value_nbits": 4}])
def test_shared_codebooks_exclude_other_ways_to_store_them(settings):
    with pytest.raises(ValueError, match="shared_codebooks"):
        SPEC.changed(**settings)
