"""The whole solution of a layer: quality, honesty of its report, and layers that are out of the ordinary."""

import math

import pytest
import torch
from test_code import SPECS
from test_encode import randn, second_moment

from vqdm.additive import solve as solving
from vqdm.additive.code import AdditiveCode, CodeSpec, stored_bits
from vqdm.additive.solve import (
    SolverConfig,
    gap_to_bound,
    relative_bound,
    relative_error,
    row_spectrum,
    shrunk_covariance,
    solve_layer,
)
from vqdm.quantization.plan import layer_line

ENCODERS = ("ldl", "beam")


def solve(W, H, spec, held_out=None, seed=0, **settings):
    settings = {"max_epochs": 4, "steps_per_epoch": 20, "lr": 1e-3, **settings}
    generator = torch.Generator().manual_seed(seed)
    return solve_layer(W, H, SolverConfig(spec, **settings), generator, held_out)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("spec", [*SPECS, CodeSpec(2, 4, 4, scale_nbits=4, groupwise_codebooks=True)], ids=str)
def test_every_format_is_solved_and_reported_as_stored(spec, encoder):
    W, H, held_out = 0.02 * randn(24, 32), second_moment(32), second_moment(32, seed=7)
    code, report = solve(W, H, spec, held_out, encoder=encoder)
    tensors = code.pack()
    read = AdditiveCode.unpack(spec, (24, 32), tensors).dequantize()
    assert torch.equal(read, code.dequantize())
    error, other = (torch.trace((W - read) @ A @ (W - read).T) / torch.trace(W @ A @ W.T) for A in (H, held_out))
    assert report.error == pytest.approx(error.item(), rel=1e-3)
    assert report.held_out_error == pytest.approx(other.item(), rel=1e-3)
    assert report.error < 0.25
    assert report.bits_per_weight == stored_bits(tensors) / W.numel()
    assert set(report.to_dict()) >= {"error", "held_out_error", "bits_per_weight", "gap_db", "epochs", "seconds"}


def test_wide_layers_have_no_gap_to_the_bound(monkeypatch):
    """Its eigenvalues would take more time and memory than the codes."""
    monkeypatch.setattr(solving, "GAP_COLUMNS", 16)
    gaps = [solve(randn(8, width), second_moment(width), CodeSpec(1, 3, 4))[1].gap_db for width in (16, 20)]
    assert gaps[0] is not None and gaps[1] is None
    assert "bound" not in layer_line({"name": "wide", "error": 0.1, "gap_db": None, "bits_per_weight": 2, "seconds": 1})


@pytest.mark.parametrize("encoder", ENCODERS)
def test_equal_seeds_give_equal_codes(encoder):
    W, H = randn(16, 32), second_moment(32)
    (first, _), (second, _), (other, _) = (solve(W, H, CodeSpec(2, 4, 4), seed=s, encoder=encoder) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.pack().values(), second.pack().values(), strict=True))
    assert not torch.equal(first.codes, other.codes)


def awkward_layers():
    W, H = randn(16, 32), second_moment(32)
    dead = H.clone()
    dead[5:17] = 0
    dead[:, 5:17] = 0
    few = randn(3, 32)
    with_rows = W.clone()
    with_rows[2], with_rows[3], with_rows[:, 4:8] = 0, 0.7, 0
    return {
        "dead inputs": (W, dead),
        "rank three": (W, few.T @ few),
        "rank one": (W, few[:1].T @ few[:1]),
        "no inputs at all": (W, torch.zeros(32, 32)),
        "constant rows and zero columns": (with_rows, H),
        "all zero": (torch.zeros(16, 32), H),
        "all equal": (torch.ones(16, 32), H),
        "one row": (W[:2], H),
        "tiny weights": (1e-6 * W, H),
        "huge weights": (1e6 * W, H),
        "tiny inputs": (W, 1e-12 * H),
        "huge inputs": (W, 1e12 * H),
    }


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", awkward_layers())
@pytest.mark.parametrize(
    "spec",
    [CodeSpec(2, 6, 4), CodeSpec(2, 3, 4, out_group_size=2, scale_nbits=2, input_channel_scales=True)],
    ids=["many centroids", "fine scales"],
)
def test_awkward_layers(name, spec, encoder):
    W, H = awkward_layers()[name]
    code, report = solve(W, H, spec, encoder=encoder)
    assert code.dequantize().isfinite().all()
    assert 0 <= report.error < 0.5
    if name == "constant rows and zero columns" and spec.out_group_size == 1:
        assert code.dequantize()[2].abs().max() < 1e-3
    if name == "all zero":
        assert torch.equal(code.dequantize(), W)


def test_the_result_is_the_best_seen():
    """More epochs never end in a higher error, whatever the last of them did."""
    W, H = randn(32, 32), second_moment(32)
    spec = CodeSpec(2, 4, 4, codebook_value_nbits=2)
    errors = [
        solve(W, H, spec, encoder="beam", lr=0.05, max_epochs=n, relative_mse_tolerance=0.0)[1].error for n in (1, 2, 4)
    ]
    assert errors[0] >= errors[1] >= errors[2]


def test_a_wide_tolerance_ends_the_search():
    W, H = randn(32, 32), second_moment(32)
    _, report = solve(W, H, CodeSpec(2, 4, 4), encoder="beam", max_epochs=20, relative_mse_tolerance=0.9)
    assert report.epochs == 2


def test_error_feedback_beats_the_search_over_rows():
    W, H = randn(64, 64), second_moment(64)
    errors = {encoder: solve(W, H, CodeSpec(2, 4, 4), encoder=encoder, max_epochs=12)[1].error for encoder in ENCODERS}
    assert errors["ldl"] < errors["beam"]


def test_input_scales_help_uneven_columns():
    W, H = randn(64, 64) * torch.logspace(-1, 1, 64), second_moment(64)
    plain, scaled = (solve(W, H, CodeSpec(2, 4, 4, input_channel_scales=on))[1].error for on in (False, True))
    assert scaled < plain


def test_relative_error_of_nothing_is_zero():
    code, _ = solve(torch.zeros(4, 8), torch.eye(8), CodeSpec(1, 2, 4))
    assert relative_error(torch.zeros(4, 8), code, torch.eye(8)) == 0


@pytest.mark.parametrize(
    ("W", "H", "held_out", "message"),
    [
        (torch.full((4, 8), torch.nan), torch.eye(8), None, "the weight has values"),
        (torch.ones(4, 8), torch.eye(8) * torch.inf, None, "the Hessian has values"),
        (torch.ones(4, 8), torch.eye(8), torch.eye(8) * torch.nan, "held-out Hessian has values"),
        (torch.ones(4, 8), torch.eye(4), None, "8 columns"),
        (torch.ones(4, 6), torch.eye(6), None, "in_group_size 4 does not divide"),
        (torch.ones(8), torch.eye(8), None, "must be a matrix"),
    ],
)
def test_bad_input_is_refused(W, H, held_out, message):
    with pytest.raises(ValueError, match=message):
        solve(W, H, CodeSpec(1, 2, 4), held_out)


@pytest.mark.parametrize("bits", [0.0, 0.5, 2.0, 5.0])
def test_equal_eigenvalues_give_six_decibels_a_bit(bits):
    assert relative_bound(torch.full((10,), 3.0), bits) == pytest.approx(4.0**-bits)


@pytest.mark.parametrize("bits", [0.1, 1.0, 2.5])
def test_the_water_level_spends_the_rate(bits):
    spectrum = torch.logspace(0, -4, 50).double()
    low, high = 1e-12, 1.0
    for _ in range(200):  # bisection on log θ
        theta = math.sqrt(low * high)
        rate = (0.5 * (spectrum / theta).log2()).clamp(min=0).mean().item()
        low, high = (theta, high) if rate > bits else (low, theta)
    expected = spectrum.clamp(max=theta).sum() / spectrum.sum()
    assert relative_bound(spectrum, bits) == pytest.approx(expected.item(), rel=1e-6)


def test_zero_eigenvalues_cost_nothing():
    assert relative_bound(torch.tensor([0.0, 0.0, 1.0, 1.0]), 1.0) == pytest.approx(4.0**-2)
    assert relative_bound(torch.zeros(4), 1.0) == 0


def test_independent_columns_keep_their_variances_and_lose_chance_correlations():
    W = randn(200, 100) * torch.linspace(0.5, 2, 100)
    covariance = shrunk_covariance(W)
    torch.testing.assert_close(covariance.diagonal(), W.square().mean(0))
    correlation = covariance / covariance.diagonal().outer(covariance.diagonal()).sqrt()
    assert (correlation - torch.eye(100)).abs().max() < 0.05


def test_true_correlations_are_kept():
    W = randn(500, 1) @ randn(1, 20, seed=1) + 0.1 * randn(500, 20, seed=2)
    plain = W.T @ W / 500
    assert (shrunk_covariance(W) - plain).norm() < 0.05 * plain.norm()


def test_spectrum_is_that_of_the_product():
    W, H = randn(300, 12) * torch.linspace(0.5, 2, 12), second_moment(12)
    expected = torch.linalg.eigvals(H @ shrunk_covariance(W)).real.sort().values
    torch.testing.assert_close(row_spectrum(W, H), expected, atol=1e-4, rtol=1e-3)


def test_gap_is_in_decibels_and_undefined_without_error():
    W, H = randn(400, 8), torch.eye(8)
    limit = relative_bound(row_spectrum(W, H), 2.0)
    assert gap_to_bound(10 * limit, W, H, 2.0) == pytest.approx(10.0)
    assert gap_to_bound(0.0, W, H, 2.0) is None
    assert gap_to_bound(0.1, torch.zeros(4, 8), H, 2.0) is None
