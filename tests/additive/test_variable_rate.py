"""Variable rate: packed without a gap, read back, and no longer made."""

from dataclasses import replace

import pytest
import torch
from test_quantized import random_code

from vqdm.additive.code import AdditiveCode, CodeSpec, offsets, pack_rows, row_bytes, unpack_rows, width_slice
from vqdm.additive.solve import SolverConfig

SPEC = CodeSpec(1, 8, 4, shared_codebooks="shared", row_bits=16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def in_range(widths, rows, seed=0):
    widths = torch.tensor(widths)
    return torch.randint(2**16, (rows, len(widths)), generator=generator(seed)) % 2**widths + 2**widths - 1, widths


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
    assert [width_slice(width) for width in (0, 1, 3)] == [slice(0, 1), slice(1, 3), slice(7, 15)]
    assert offsets(torch.tensor([0, 1, 3])).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (dict(num_codebooks=2, shared_codebooks="shared"), "num_codebooks 1"),
        (dict(num_codebooks=1), "shared_codebooks"),
        (dict(num_codebooks=1, shared_codebooks="shared", groupwise_codebooks=True), "groupwise"),
    ],
)
def test_formats_without_a_meaning_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        CodeSpec(nbits_per_codebook=8, in_group_size=4, row_bits=16, **settings)


def test_more_bits_than_the_codebook_has_are_refused():
    with pytest.raises(ValueError, match="row_bits is 33; its 16 inputs take 32 at most"):
        replace(SPEC, row_bits=33).check_shape(8, 16)


def test_codes_survive_the_round_trip():
    spec = replace(SPEC, row_bits=21, input_channel_scales=True)
    code = random_code(spec, 96, 32)
    assert code.widths.sum() == 21 and len(code.widths.unique()) > 2
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in code.pack().items()}
    assert found == spec.tensor_shapes(96, 32)
    again = AdditiveCode.unpack(spec, (96, 32), code.pack(), code.codebooks)
    assert torch.equal(again.codes, code.codes) and torch.equal(again.dequantize(), code.dequantize())


def test_a_solver_for_it_is_refused():
    with pytest.raises(ValueError, match="row_bits is 16; codes of variable rate are loaded but no longer made"):
        SolverConfig(SPEC)
    with pytest.raises(ValueError, match="no longer made"):
        SolverConfig().with_spec(SPEC)
