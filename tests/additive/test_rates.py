"""Variable rate: bits are divided as the theory says, packed without a gap, and worth it."""

from dataclasses import replace

import pytest
import torch
from test_encode import randn, second_moment

from vqdm.additive.code import AdditiveCode, Bank, CodeSpec, stored_bits
from vqdm.additive.config import SolverConfig
from vqdm.additive.encode import feedback_factors
from vqdm.additive.kmeans import residual_kmeans
from vqdm.additive.rates import (
    divided_bits,
    entry_slices,
    group_demands,
    offsets,
    pack_rows,
    padded_entries,
    row_bytes,
    unpack_rows,
)
from vqdm.additive.shared import sample_layer, train_bank
from vqdm.additive.solve import scaled_groups, solve_layer, support_rms, zero_code

SPEC = CodeSpec(1, 8, 4, shared_codebooks="bank", row_bits=16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def in_range(widths, rows, seed=0):
    widths = torch.tensor(widths)
    return torch.randint(2**16, (rows, len(widths)), generator=generator(seed)) % 2**widths + 2**widths - 1, widths


def test_entries_of_several_layers_are_padded_with_their_last():
    found = padded_entries(torch.tensor([0, 3, 2]), 3)
    assert found.tolist() == [[0] * 8, [7, 8, 9, 10, 11, 12, 13, 14], [3, 4, 5, 6, 6, 6, 6, 6]]


@pytest.mark.parametrize("total", [0, 1, 7, 20, 39, 40])
def test_bits_add_up_and_follow_the_demands(total):
    demands = randn(10, seed=total) * 4
    widths = divided_bits(demands, total, 4)
    assert widths.sum() == total and widths.min() >= 0 and widths.max() <= 4
    free = (widths > 0) & (widths < 4)
    gaps = (demands - widths)[free]
    assert len(gaps) < 2 or gaps.max() - gaps.min() <= 2  # the level is common, but for what rounding leaves


def test_no_other_division_has_a_lower_error():
    """Σ 2^(−2 (w − demand) / d) over all divisions of 6 bits to 3 groups, when demands differ by whole bits."""
    demands, d = torch.tensor([3.0, 0.0, -1.0]), 4

    def error(widths):
        return (2 ** (2 * (demands - torch.tensor(widths, dtype=torch.float32)) / d)).sum().item()

    every = [(a, b, 6 - a - b) for a in range(6) for b in range(6) if 0 <= 6 - a - b <= 5]
    assert error(divided_bits(demands, 6, 5).tolist()) == pytest.approx(min(map(error, every)))


def test_demand_is_half_the_log_of_what_a_value_weighs_times_their_number():
    factors = torch.stack([torch.eye(4), 2 * torch.eye(4)])
    groups = torch.stack([torch.full((3, 4), 8.0), torch.ones(3, 4)], dim=1)  # [R, G, d]
    demands = group_demands(groups, factors)
    assert (demands[0] - demands[1]).item() == pytest.approx(4 / 2 * (6 - 2))


@pytest.mark.parametrize("widths", [[0], [3, 0, 5], [16, 1, 0, 7], [0, 0, 0, 1]])
def test_rows_are_packed_as_one_little_endian_bit_string(widths):
    codes, widths = in_range(widths, 5)
    packed = pack_rows(codes, widths)
    number, place = 0, 0
    for row in (codes - (2**widths - 1)).tolist():
        for code, width in zip(row, widths.tolist(), strict=True):
            number, place = number | code << place, place + width
    assert bytes(packed.tolist()) == number.to_bytes(row_bytes(5, int(widths.sum())), "little")
    if place:
        assert torch.equal(unpack_rows(packed, widths.to(torch.uint8), 5), codes)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_code_of_another_width_is_refused(change):
    codes = torch.tensor([[7], [14]]) if change > 0 else torch.tensor([[6], [7]])
    with pytest.raises(ValueError, match="out of the range"):
        pack_rows(codes + (change if change > 0 else 0), torch.tensor([3]))


def test_slices_are_those_that_codes_index():
    widths = torch.tensor([0, 1, 3])
    assert entry_slices(widths) == [slice(0, 1), slice(1, 3), slice(7, 15)]
    assert offsets(widths).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (dict(num_codebooks=2, shared_codebooks="bank"), "num_codebooks 1"),
        (dict(num_codebooks=1), "shared_codebooks"),
        (dict(num_codebooks=1, shared_codebooks="bank", groupwise_codebooks=True), "groupwise"),
    ],
)
def test_formats_without_a_meaning_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        CodeSpec(nbits_per_codebook=8, in_group_size=4, row_bits=16, **settings)


def test_more_bits_than_the_codebook_has_are_refused():
    with pytest.raises(ValueError, match="row_bits is 33; its 16 inputs take 32 at most"):
        replace(SPEC, row_bits=33).check_shape(8, 16)


@pytest.fixture(scope="module")
def layer():
    """A layer whose columns differ much in importance, its Hessian, and a bank trained on it."""
    W = randn(96, 32)
    spread = torch.logspace(0, -1.5, 32)
    H = second_moment(32) * spread[:, None] * spread
    config = SolverConfig(replace(SPEC, row_bits=32), beam_size=4)
    return W, H, train_bank([sample_layer(W, H, 96, config, generator())], config, generator())


def test_codebooks_of_every_width_lie_one_after_another(layer):
    W, H, bank = layer
    assert bank.shape == (1, 511, 1, 4) and not bank[0, 0].any()
    config = SolverConfig(replace(SPEC, row_bits=32), beam_size=4)
    sample = sample_layer(W, H, 96, config, generator())
    points = scaled_groups(sample.W, support_rms(sample.W, SPEC), 1, 4).flatten(0, 1)
    alone = residual_kmeans(points, 1, 2, config.init_max_iter, 2 * config.init_max_points_per_centroid, generator())
    assert torch.equal(bank[0, 1:3, 0], alone[0].half().float())


def test_it_has_a_lower_error_than_a_constant_rate_of_equal_bits(layer):
    W, H, bank = layer
    spec = replace(SPEC, row_bits=32)  # four bits a group
    code, report = solve_layer(W, H, SolverConfig(spec), generator(), bank=Bank(bank, W.numel()))
    constant = CodeSpec(1, 4, 4, shared_codebooks="bank")
    _, other = solve_layer(W, H, SolverConfig(constant), generator(), bank=Bank(bank[:, 15:31], W.numel()))
    assert report.error < 0.8 * other.error
    assert report.code_bits_per_weight == other.code_bits_per_weight
    assert stored_bits(code.pack()) == 8 * (96 * 32 // 8 + 8) + 16 * 96


def test_solved_codes_survive_the_round_trip(layer):
    W, H, bank = layer
    spec = replace(SPEC, row_bits=21, input_channel_scales=True)
    code, report = solve_layer(W, H, SolverConfig(spec), generator(), bank=Bank(bank, W.numel()))
    again = AdditiveCode.unpack(spec, (96, 32), code.pack(), bank)
    assert torch.equal(again.dequantize(), code.dequantize())
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in code.pack().items()}
    assert found == spec.tensor_shapes(96, 32)
    assert code.widths.sum() == 21 and report.error < 1


def test_important_groups_get_more_bits(layer):
    W, H, bank = layer
    spec = replace(SPEC, row_bits=24)
    factors, _ = feedback_factors(H, 4, 0.01)
    widths = zero_code(W, spec, bank, torch.ones(96, 1), factors).widths
    assert widths.sum() == 24 and widths[0] > widths[-1]
