"""The format: what is stored is what is read back, bit for bit."""

import pytest
import torch

from vqdm.additive import trellis
from vqdm.additive.code import (
    AdditiveCode,
    CodeSpec,
    group_columns,
    pack_codes,
    packed_bytes,
    quantize_values,
    stored_bits,
    unpack_codes,
)

SPECS = [
    CodeSpec(2, 3, 4),
    CodeSpec(3, 5, 2, out_group_size=2),
    CodeSpec(2, 4, 4, groupwise_codebooks=True),
    CodeSpec(1, 9, 4, scale_nbits=3),
    CodeSpec(2, 4, 4, scale_nbits=16, input_channel_scales=True),
    CodeSpec(2, 4, 4, codebook_value_nbits=3, codebook_value_num_groups=2),
    CodeSpec(2, 4, 4, out_group_size=2, codebook_value_nbits=2, groupwise_codebooks=True, scale_nbits=1),
]


def random_code(spec, rows, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    R, G, M, K = rows // spec.out_group_size, columns // spec.in_group_size, spec.num_codebooks, spec.entries
    sets = (G,) if spec.groupwise_codebooks else ()
    return AdditiveCode(
        spec,
        torch.randint(K, (R, G, M), generator=g),
        torch.randn(*sets, M, K, spec.out_group_size, spec.in_group_size, generator=g),
        torch.rand(R, G if spec.scale_nbits else 1, generator=g) + 0.5,
        torch.rand(columns, generator=g) + 0.5 if spec.input_channel_scales else None,
    )


def plain_matrix(code):
    R, G, M = code.codes.shape
    p, g = code.codebooks.shape[-2:]
    matrix = torch.zeros(R * p, G * g)
    for r in range(R):
        for j in range(G):
            books = code.codebooks[j] if code.codebooks.dim() == 5 else code.codebooks
            scale = code.scales[r, j if code.scales.shape[1] > 1 else 0]
            value = sum(books[m, code.codes[r, j, m]] for m in range(M)) * scale
            matrix[r * p : (r + 1) * p, j * g : (j + 1) * g] = value
    return matrix if code.input_scales is None else matrix * code.input_scales


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dequantize_is_the_sum_of_entries_times_scales(spec):
    code = random_code(spec, 6, 16)
    torch.testing.assert_close(code.dequantize(), plain_matrix(code))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_stored_tensors_have_the_announced_shapes_and_round_trip(spec):
    code = random_code(spec, 6, 16)
    tensors = code.pack()
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert found == spec.tensor_shapes(6, 16)
    again = AdditiveCode.unpack(spec, (6, 16), tensors)
    assert torch.equal(again.codes.long(), code.codes)
    twice = again.pack()
    assert all(torch.equal(tensors[name], twice[name]) for name in tensors)
    assert torch.equal(code.stored().dequantize(), again.dequantize())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.has_widths], ids=str)
def test_values_are_rounded_without_packing_codes(spec, monkeypatch):
    code = random_code(spec, 6, 16)
    again = AdditiveCode.unpack(spec, (6, 16), code.pack(), code.codebooks)
    monkeypatch.delattr(CodeSpec, "packed")
    stored = code.stored()
    for name in ("codes", "codebooks", "scales", "input_scales"):
        one, other = getattr(stored, name), getattr(again, name)
        assert one is other is None or (torch.equal(one, other) and one.dtype == other.dtype)


def test_float64_codes_are_dequantized_in_float64():
    code = random_code(CodeSpec(2, 3, 4), 4, 8)
    code.codebooks, code.scales = code.codebooks.double(), code.scales.double()
    assert code.dequantize().dtype == torch.float64


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_with_groups_permutes_the_matrix(spec):
    code = random_code(spec, 6, 16)
    order = torch.randperm(16 // spec.in_group_size, generator=torch.Generator().manual_seed(1))
    index = group_columns(order, spec.in_group_size)
    assert torch.equal(code.with_groups(order).dequantize(), code.dequantize()[:, index])
    assert torch.equal(code.with_groups(order).with_groups(order.argsort()).dequantize(), code.dequantize())


@pytest.mark.parametrize("nbits", range(1, 17))
@pytest.mark.parametrize("count", [1, 8, 37])
def test_packing_is_the_little_endian_bit_string(nbits, count):
    codes = torch.randint(2**nbits, (count,), generator=torch.Generator().manual_seed(nbits))
    packed = pack_codes(codes, nbits)
    number = sum(code << (k * nbits) for k, code in enumerate(codes.tolist()))
    assert bytes(packed.tolist()) == number.to_bytes(packed_bytes(count, nbits), "little")
    assert torch.equal(unpack_codes(packed, nbits, count).long(), codes)


def test_quantize_values_is_exact_where_the_levels_suffice():
    values = torch.tensor([[3.0, -1.0, 3.0, 0.5], [2.0, 2.0, 2.0, 2.0]])
    tables, indices = quantize_values(values, 2)
    assert torch.equal(torch.gather(tables.float(), 1, indices), values)


def test_quantize_values_beats_a_uniform_grid():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    tables, indices = quantize_values(values, 3)
    error = (tables.float()[indices] - values).square().mean()
    step = (values.max() - values.min()) / 7
    grid = ((values - values.min()) / step).round() * step + values.min()
    assert error < 0.7 * (grid - values).square().mean()
    assert torch.equal(tables, tables.sort().values)


def test_stored_bits_counts_codes_codebooks_and_scales():
    code = random_code(CodeSpec(3, 8, 8), 64, 128)
    assert stored_bits(code.pack()) == 64 * 16 * 3 * 8 + 3 * 256 * 8 * 16 + 64 * 16


@pytest.mark.parametrize(
    "values", [{"num_codebooks": 0}, {"nbits_per_codebook": 17}, {"scale_nbits": 9}, {"codebook_value_nbits": 0}]
)
def test_impossible_settings_are_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        CodeSpec(**values)


def test_shapes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="in_group_size 8"):
        CodeSpec().check_shape(4, 12)
    with pytest.raises(ValueError, match="out_group_size 3"):
        CodeSpec(out_group_size=3).check_shape(4, 16)


TRELLIS = CodeSpec(
    1, 8, 1, shared_codebooks="t8", input_channel_scales=True, segment_rows=8, segment_bits=74, log_scales=True
)
WIDTHS = torch.tensor([4, 9, 0, 16, 8])  # of 8 rows: 8, 18, 0, 32 and 16 bits


def trellis_code(spec, rows=24, seed=0):
    """A code of random rings, with scales that logarithms keep."""
    g = torch.Generator().manual_seed(seed)
    codes = spec.unpacked(rows, 5, torch.randint(256, (rows // 8 * 74 // 8 + 1,), generator=g).to(torch.uint8), WIDTHS)
    scales, input_scales = torch.randint(90, 140, (rows,), generator=g), torch.randint(90, 140, (5,), generator=g)
    return AdditiveCode(
        spec,
        codes,
        trellis.table(8).view(spec.codebooks_shape),
        trellis.scale_values(scales.to(torch.uint8))[:, None],
        trellis.scale_values(input_scales.to(torch.uint8), spec.scale_exponent),
        WIDTHS,
    )


@pytest.mark.parametrize("changes", [{}, {"scale_exponent": -7}, {"log_scales": False}], ids=str)
def test_a_trellis_round_trips_at_the_announced_size(changes):
    spec = TRELLIS.changed(**changes)
    code = trellis_code(spec)
    tensors = code.pack()
    spec.check_tensors(24, 5, tensors)
    assert tensors["codes"].numel() == spec.code_bytes(24, 5) == -(-3 * 74 // 8)
    assert spec.code_bits_per_weight(5) == WIDTHS.sum() / 4 / 5
    assert stored_bits(tensors) == 8 * (28 + 5) + (24 + 5) * (8 if spec.log_scales else 16)
    again = AdditiveCode.unpack(spec, (24, 5), tensors, code.codebooks)
    assert torch.equal(again.codes, code.codes) and torch.equal(again.widths, code.widths.to(again.widths))
    torch.testing.assert_close(again.dequantize(), code.dequantize(), rtol=0, atol=0)


def test_a_trellis_is_dequantized_as_its_module_says():
    code = trellis_code(TRELLIS)
    values = trellis.table(8)[code.codes[:, :, 0]]
    torch.testing.assert_close(code.dequantize(), code.scales * values * code.input_scales)


def test_columns_of_a_trellis_are_permuted_with_their_widths():
    code, order = trellis_code(TRELLIS), torch.tensor([2, 4, 0, 3, 1])
    moved = code.with_groups(order)
    assert torch.equal(moved.dequantize(), code.dequantize()[:, order])
    again = AdditiveCode.unpack(TRELLIS, (24, 5), moved.pack(), code.codebooks)
    assert torch.equal(again.with_groups(order.argsort()).codes, code.codes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codebooks": 2}, "segment_rows need num_codebooks, in_group_size and out_group_size 1"),
        ({"in_group_size": 2}, "segment_rows need"),
        ({"out_group_size": 2}, "segment_rows need"),
        ({"shared_codebooks": ""}, "segment_rows need"),
        ({"input_channel_scales": False}, "segment_rows need"),
        ({"scale_nbits": 16}, "segment_rows need"),
        ({"row_bits": 4}, "segment_rows need"),
        ({"nbits_per_codebook": 3}, "nbits_per_codebook is 3; a trellis takes 4 to 16"),
        ({"segment_rows": -1}, "segment_rows is -1"),
        ({"segment_bits": 2**33}, "segment_bits is 8589934592"),
        ({"segment_rows": 0}, "segment_bits, log_scales and scale_exponent need segment_rows"),
        ({"segment_rows": 0, "segment_bits": 0}, "need segment_rows"),
        ({"segment_rows": 0, "segment_bits": 0, "log_scales": False, "scale_exponent": 1}, "need segment_rows"),
        ({"log_scales": 1}, "log_scales is 1; allowed are true and false"),
        ({"scale_exponent": 300}, "scale_exponent is 300"),
        ({"groupwise_codebooks": True}, "shared_codebooks go neither with groupwise_codebooks"),
    ],
)
def test_impossible_trellises_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TRELLIS.changed(**changes)


def test_layers_that_a_trellis_does_not_fit_are_refused():
    TRELLIS.check_shape(24, 5)
    with pytest.raises(ValueError, match="segment_rows 8 does not divide its 20 outputs"):
        TRELLIS.check_shape(20, 5)
    with pytest.raises(ValueError, match="segment_bits is 74; its 1 inputs take 64 at most"):
        TRELLIS.check_shape(24, 1)
