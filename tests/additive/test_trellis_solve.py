"""Trellis codes of whole layers: the error that was predicted, the bits that were asked for, on every path."""

import math

import pytest
import torch

from vqdm.additive.code import CodeSpec, SharedCodebooks, stored_bits
from vqdm.additive.solve import SolverConfig, relative_error, solve_layer
from vqdm.additive.trellis import allowed_widths, segment_rows, table
from vqdm.additive.trellis_solve import (
    EXPECTED_ROWS,
    MEASURED,
    Demand,
    Ordered,
    combined_rows,
    divide_columns,
    expected_errors,
    filled_up,
    layer_curves,
    rates,
    solve_trellis,
    widths_at,
)
from vqdm.quantization.shared_codebooks import sample_layer, train_shared_codebooks

ROWS, COLUMNS = 384, 48


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trellis_spec(rows, columns, bits, L=8, exponent=0):
    """A format whose columns have about `bits` bits per weight, to a whole bit of a row."""
    T = segment_rows(rows)
    return CodeSpec(
        1,
        L,
        1,
        input_channel_scales=True,
        shared_codebooks="trellis",
        segment_rows=T,
        segment_bits=round(bits * columns) * T,
        log_scales=True,
        scale_exponent=exponent,
    )


def problem(rows=ROWS, columns=COLUMNS, seed=0, skew=1.0):
    """W with columns of different size, and H of correlated inputs whose energies span about 20·skew dB."""
    g = generator(seed)
    W = torch.randn(rows, columns, generator=g) * (0.5 + torch.rand(1, columns, generator=g))
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=g) / columns**0.5
    X = (torch.randn(4 * columns, columns, generator=g) * torch.logspace(0, -skew, columns)) @ mix.T
    return W, X.T @ X / len(X)


def decibels(error):
    return 10 * math.log10(error)


def solved_error(W, H, spec):
    return relative_error(W, solve_trellis([(W, H)], spec)[0], H)


@pytest.fixture
def in_torch(monkeypatch):
    """A call that leaves the C code of whole blocks out from then on."""
    return lambda: monkeypatch.setattr("vqdm.additive.trellis_solve.native_scoring", lambda *_: False)


# ------------------------------------------------------------------------------------------------ prediction


def off(W, H, spec, curve):
    """By how many decibels the predicted error is above that of coding."""
    total = 4 * spec.segment_bits // spec.segment_rows
    return decibels(curve.at([total])[0]) - decibels(solved_error(W, H, spec))


@pytest.mark.parametrize("bits", [1, 1.25, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 2])
def test_the_error_is_about_the_predicted_one(bits, seed):
    W, H = problem(seed=seed, skew=0.3)
    spec = trellis_spec(*W.shape, bits)
    assert abs(off(W, H, spec, layer_curves(W, H, spec)[0])) < 0.5


def alike(seed=0, rows=384, columns=64, strong=4):
    """Columns that have much in common, as those of trained layers do, in W as in the inputs."""
    g = generator(seed)
    common = torch.randn(strong, columns, generator=g)
    X = 3 * torch.randn(1000, strong, generator=g) @ common
    X += torch.randn(1000, columns, generator=g) * torch.logspace(0, -1, columns)
    W = torch.randn(rows, columns, generator=g) + 0.6 * torch.randn(rows, strong, generator=g) @ common
    return W, X.T @ X / 1000


@pytest.mark.parametrize("bits", [1.5, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_errors_of_columns_that_are_alike_add_up(bits, seed):
    """Of independent errors the sum over columns would be 0.7 dB too low at two bits, 1.9 at one and a half."""
    W, H = alike(seed)
    spec = trellis_spec(*W.shape, bits)
    assert abs(off(W, H, spec, layer_curves(W, H, spec)[0])) < 0.5


@pytest.mark.parametrize("make", [alike, problem])
def test_without_bits_all_is_lost(make):
    W, H = make(seed=1)
    ordered, spec = Ordered.of(W, H), trellis_spec(*W.shape, 2)
    nothing = torch.zeros(1, W.shape[1], dtype=torch.int64)
    errors = expected_errors(ordered, ordered.demand(spec), rates(384, 8), nothing)
    assert errors.item() == pytest.approx(1, rel=0.25)  # on as many rows as are followed


def test_expected_errors_are_zero_where_there_is_nothing_to_code():
    ordered, spec = Ordered.of(torch.zeros(64, 24), torch.eye(24)), trellis_spec(64, 24, 2)
    widths = torch.full((2, 24), 8)
    assert expected_errors(ordered, ordered.demand(spec), rates(64, 8), widths).tolist() == [0, 0]


def test_the_rows_that_are_followed_have_the_energies_of_all():
    W = alike()[0]
    rows = combined_rows(W, W.square().sum(0))
    assert rows.shape == (EXPECTED_ROWS, 64)
    torch.testing.assert_close(rows.square().sum(0), W.square().sum(0))
    assert torch.equal(combined_rows(W[:8], W[:8].square().sum(0)), W[:8])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_others_make_up_for_columns_without_bits(seed, monkeypatch):
    """By coding these first; the widths are those of the columns as they were."""
    W, H = alike(seed)
    spec = trellis_spec(*W.shape, 1)
    code = solve_trellis([(W, H)], spec)[0]
    assert 4 < (code.widths == 0).sum() < 60
    assert not code.dequantize()[:, code.widths == 0].any()
    monkeypatch.setattr(Ordered, "dropped_first", lambda *given: given)
    last = solve_trellis([(W, H)], spec)[0]
    assert torch.equal(code.widths, last.widths)
    assert decibels(relative_error(W, code, H)) < decibels(relative_error(W, last, H)) - 1


@pytest.mark.parametrize("L", MEASURED)
def test_more_bits_are_expected_to_leave_less_error(L):
    W, H = problem(64, 16)
    curve = layer_curves(W, H, trellis_spec(64, 16, 2, L))[0]
    assert curve.totals[0] < 16 * 4 and curve.totals[-1] > 0.9 * 16 * 4 * L
    assert (curve.totals.diff() >= 0).all() and (curve.errors.log().diff() < 0.05).all()
    known = rates(64, L)
    assert (known.errors.diff() < 0).all() and known.widths.tolist() == list(allowed_widths(64, L))


def test_a_curve_is_corrected_by_what_has_been_found():
    W, H = problem(64, 16)
    curve = layer_curves(W, H, trellis_spec(64, 16, 2))[0]
    expected = curve.at([64, 128, 192])
    assert curve.ratio(128, 3 * expected[1]) == pytest.approx(3)
    once = curve.corrected(128, 2)
    assert once.at([64, 128, 192]) == pytest.approx(2 * expected)
    twice = once.corrected(128, 3).corrected(192, 1)
    assert twice.at([64, 128, 192]) == pytest.approx([3 * expected[0], 3 * expected[1], expected[2]])
    assert curve.at([64, 128, 192]) == pytest.approx(expected)


@pytest.mark.parametrize("bits", [1.25, 2, 4])
def test_codes_of_fewer_state_bits_are_expected_to_leave_what_they_leave(bits):
    """So what a fast code left corrects the curve of a slow one: its own curve is above by as much as it is worse."""
    W, H = problem(skew=0.3)
    slow, fast = (trellis_spec(*W.shape, bits, L) for L in (12, 8))
    total = 4 * slow.segment_bits // slow.segment_rows
    curve, fast_curve = layer_curves(W, H, slow, [fast])
    assert fast_curve.at([total]) > curve.at([total])
    predicted = curve.corrected(total, fast_curve.ratio(total, solved_error(W, H, fast))).at([total])[0]
    assert abs(decibels(solved_error(W, H, slow)) - decibels(predicted)) < 0.2


# ------------------------------------------------------------------------------------------------ dividing bits


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize(("rows", "L"), [(64, 8), (6, 8), (7, 10), (1, 8)])
def test_widths_add_up_to_every_total_or_none_do(rows, L, columns):
    """Tried: all totals in steps of the widest step, from the least width to the most bits of all columns."""
    W, H = problem(rows, columns, seed=3)
    demand, known = Ordered.of(W, H).demand(trellis_spec(rows, columns, 2, L)), rates(segment_rows(rows), L)
    allowed = known.widths.tolist()
    step = allowed[-1] - allowed[-2]
    for total in range(-(-allowed[1] // step) * step, columns * allowed[-1] + 1, step):
        widths = divide_columns(demand, known, total)
        assert int(widths.sum()) == total and set(widths.tolist()) <= set(allowed)


def flat_demand(columns):
    return Demand(
        torch.ones(columns),
        torch.ones(columns),
        torch.ones(columns),
        torch.zeros(columns, 9),
        torch.eye(columns),
        torch.ones(1, columns),
        1.0,
        float(columns),
    )


def test_what_is_left_below_the_least_width_is_made_room_for():
    """31 more quarter bits: a column at the most gives one of its own, so that another gets the least."""
    known = rates(64, 8)
    widths = filled_up(torch.tensor([32, 0, 0]), flat_demand(3), known, 35)
    assert sorted(widths.tolist()) == [0, 4, 31]
    assert sorted(filled_up(torch.tensor([32, 32]), flat_demand(2), known, 64).tolist()) == [32, 32]


@pytest.mark.parametrize(("columns", "total"), [(1, 3), (1, 33), (2, 65), (3, 1)])
def test_totals_that_no_widths_have_are_refused(columns, total):
    with pytest.raises(ValueError, match=f"no widths of {columns} columns add up to {total}"):
        filled_up(torch.zeros(columns, dtype=torch.int64), flat_demand(columns), rates(64, 8), total)


def test_bits_go_to_the_columns_that_weigh_most():
    W, H = torch.randn(64, 32, generator=generator()), torch.logspace(0, -3, 32).diag()
    widths = solve_trellis([(W, H)], trellis_spec(64, 32, 2))[0].widths
    assert widths[0] >= widths[15] >= widths[31] and widths[0] > 2 * widths[31]


def test_prices_from_high_to_low_buy_ever_more_bits():
    W, H = problem(64, 16)
    demand, known = Ordered.of(W, H).demand(trellis_spec(64, 16, 2)), rates(64, 8)
    widths, errors = widths_at(demand, known, torch.tensor([1e9, 1.0, 1e-9]))
    assert widths[0].sum() == 0 and (widths[2] == 32).all()
    assert errors[0] > errors[1] > errors[2]


# ------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(("rows", "columns"), [(384, 24), (6, 20), (64, 1), (5, 140)])
def test_the_torch_path_leaves_the_error_of_the_c_path(rows, columns, in_torch):
    W, H = problem(rows, columns, seed=5)
    spec = trellis_spec(rows, columns, 2.5)
    in_c = solved_error(W, H, spec)
    in_torch()
    assert solved_error(W, H, spec) == pytest.approx(in_c, rel=0.08)  # rounding changes codes of so few weights


def test_layers_solved_together_are_each_solved_alone():
    parts = [problem(64, 24, seed) for seed in range(3)]
    parts[1] = parts[1][0], torch.zeros(24, 24)
    spec = trellis_spec(64, 24, 2)
    together = solve_trellis(parts, spec)
    assert len(together) == 3
    for (W, H), code in zip(parts, together, strict=True):
        alone = solve_trellis([(W, H)], spec)[0]
        against = H if H.any() else torch.eye(24)
        assert torch.equal(code.widths, alone.widths)
        assert relative_error(W, code, against) == pytest.approx(relative_error(W, alone, against), rel=0.05)


# ------------------------------------------------------------------------------------------------ odd layers


def check_code(code, W, spec):
    """Finite, and of exactly the bits of its format."""
    assert code.dequantize().isfinite().all() and code.dequantize().shape == W.shape
    spec.check_tensors(*W.shape, code.pack())
    assert 4 * spec.segment_bits == int(code.widths.sum()) * spec.segment_rows


@pytest.mark.parametrize("path", ["c", "torch"])
@pytest.mark.parametrize("shape", [(64, 24), (7, 24), (1, 24), (64, 1)])
def test_weights_of_zero_stay_zero(shape, path, in_torch):
    W, H = torch.zeros(shape), problem(*shape)[1]
    if path == "torch":
        in_torch()
    code = solve_trellis([(W, H)], spec := trellis_spec(*shape, 2))[0]
    check_code(code, W, spec)
    assert not code.dequantize().any()


@pytest.mark.parametrize("path", ["c", "torch"])
def test_without_inputs_the_weights_are_coded_as_they_are(path, in_torch):
    W = torch.randn(64, 24, generator=generator())
    if path == "torch":
        in_torch()
    code = solve_trellis([(W, torch.zeros(24, 24))], spec := trellis_spec(64, 24, 3))[0]
    check_code(code, W, spec)
    assert relative_error(W, code, torch.eye(24)) < 0.04


@pytest.mark.parametrize("path", ["c", "torch"])
def test_rows_and_columns_of_zero_stay_zero(path, in_torch):
    W, H = problem(64, 24)
    W[5], W[63] = 0, 0
    W[:, 7], H[7], H[:, 7] = 0, 0, 0
    if path == "torch":
        in_torch()
    code = solve_trellis([(W, H)], spec := trellis_spec(64, 24, 3))[0]
    check_code(code, W, spec)
    decoded = code.dequantize()
    assert not decoded[[5, 63]].any() and decoded[:, 7].abs().max() < 0.05 * W.abs().max()
    assert relative_error(W, code, H) < 0.06


@pytest.mark.parametrize("path", ["c", "torch"])
def test_an_outlier_of_thirty_sigma_is_reached(path, in_torch):
    W, H = torch.randn(384, 24, generator=generator()), torch.eye(24)
    W[17, 3] = 30
    if path == "torch":
        in_torch()
    code = solve_trellis([(W, H)], spec := trellis_spec(384, 24, 3))[0]
    check_code(code, W, spec)
    assert abs(code.dequantize()[17, 3] - 30) < 15
    assert relative_error(W, code, H) < 0.05


def test_small_and_large_weights_are_coded_alike():
    W, H = problem(64, 24)
    errors = [solved_error(W * 2.0**n, H * 4.0**n, trellis_spec(64, 24, 3, exponent=n)) for n in (-12, 0, 12)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3) and errors[2] == pytest.approx(errors[1], rel=1e-3)


def test_more_state_bits_leave_less_error():
    W, H = problem(384, 16)
    errors = [solved_error(W, H, trellis_spec(384, 16, 3, L)) for L in (8, 10)]
    assert errors[1] < errors[0]


# ------------------------------------------------------------------------------------------------ against others


def synthetic(O=256, I=256):  # noqa: E741
    """Weights and second moments of correlated inputs, with a few channels of large ones."""
    g = generator()
    W = torch.randn(O, I, generator=g) * 0.02
    W *= 0.5 + torch.rand(1, I, generator=g)
    A = torch.randn(I, I, generator=g) / I**0.5
    X = (torch.randn(8192, I, generator=g) * torch.logspace(0, -2, I)) @ A.T * 8
    X += 0.1 * torch.randn(8192, I, generator=g)
    X[:, torch.randperm(I, generator=g)[: max(1, I // 100)]] *= 10
    return W, X.T @ X / 8192


def test_the_error_is_below_that_of_shared_codebooks_at_equal_stored_bits():
    """The codebooks are trained on this very layer, and not counted."""
    W, H = synthetic()
    config = SolverConfig(CodeSpec(1, 8, 4, shared_codebooks="unet"), beam_size=4, max_epochs=2)
    codebooks = train_shared_codebooks([sample_layer(W, H, 256, config, generator())], config, generator())
    additive, _ = solve_layer(W, H, config, generator(), shared=SharedCodebooks(codebooks, W.numel()))
    most = stored_bits(additive.pack())
    spec = trellis_spec(256, 256, 2, exponent=-6)
    spec = spec.changed(segment_bits=spec.segment_bits - 256 * 16)  # pays for widths and scales of columns
    config = SolverConfig(spec)
    code, report = solve_layer(W, H, config, generator(), shared=SharedCodebooks(table(8).view(1, -1, 1, 1), W.numel()))
    assert stored_bits(code.pack()) <= most
    assert decibels(report.error) < decibels(relative_error(W, additive, H)) - 1
