"""Gathering on the CPU against the definition, to the last bit."""

import pytest
import torch
from test_quantized import SPECS, random_code

from vqdm.additive.code import CodeSpec
from vqdm.layers import gather, parts
from vqdm.layers.stored import Stored

WIDTHS = [CodeSpec(M, b, 4) for b in range(1, 17) for M in (1, 3)]
VARIABLE = [
    CodeSpec(1, 12, 4, shared_codebooks="bank", row_bits=31),
    CodeSpec(1, 5, 8, shared_codebooks="bank", row_bits=7, input_channel_scales=True, scale_nbits=3),
    CodeSpec(1, 7, 2, out_group_size=3, shared_codebooks="bank", row_bits=16, scale_nbits=16),
    CodeSpec(1, 16, 8, shared_codebooks="bank", row_bits=1),
    CodeSpec(1, 12, 2, shared_codebooks="bank", row_bits=91, input_channel_scales=True),
    CodeSpec(1, 12, 1, shared_codebooks="bank", row_bits=150, input_channel_scales=True),
]
FORMATS = [
    *SPECS,
    CodeSpec(5, 3, 4),
    CodeSpec(4, 2, 1),
    CodeSpec(2, 4, 8, out_group_size=3, scale_nbits=2),
    *VARIABLE,
]


def stored_of(spec, rows, columns):
    code = random_code(spec, rows, columns)
    bank = code.codebooks.half() if spec.shared_codebooks else None
    return Stored.of(spec, (rows, columns), code.pack(), bank), code


@pytest.mark.parametrize("spec", [*WIDTHS, *FORMATS], ids=str)
def test_every_format_decodes_to_the_last_bit(spec):
    stored, code = stored_of(spec, 42, 24)
    out = torch.full((42, 24), torch.nan)
    gather.gather(stored, out)
    assert torch.equal(out, code.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_rounded_once(dtype):
    stored, code = stored_of(CodeSpec(3, 5, 8), 16, 32)
    out = torch.empty(16, 32, dtype=dtype)
    gather.gather(stored, out)
    assert torch.equal(out, code.dequantize().to(dtype))


@pytest.mark.parametrize("spec", [CodeSpec(3, 5, 4), CodeSpec(2, 6, 4, scale_nbits=3), SPECS[3], VARIABLE[0]], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_make_the_whole(spec, threads, monkeypatch):
    monkeypatch.setattr(parts, "GROUPS_AT_ONCE", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    stored, code = stored_of(spec, 37, 12)
    out = torch.empty(37, 12)
    gather.gather(stored, out)
    assert torch.equal(out, code.dequantize())


def test_large_codebooks_are_read_in_their_own_type():
    stored, code = stored_of(CodeSpec(2, 12, 8), 8, 32)
    assert all(table.dtype == "float16" for _, _, table in gather._tables(stored))
    out = torch.empty(8, 32)
    gather.gather(stored, out)
    assert torch.equal(out, code.dequantize())


def test_small_codebooks_are_added_up_beforehand_where_there_are_groups_enough():
    large, small = (stored_of(CodeSpec(3, 4, 4), rows, 64)[0] for rows in (1024, 8))
    assert [(first, bits, len(table)) for first, bits, table in gather._tables(large)] == [(0, 12, 4096)]
    assert [bits for _, bits, _ in gather._tables(small)] == [4, 4, 4]
    out = torch.empty(1024, 64)
    gather.gather(large, out)
    assert torch.equal(out, large.working().dequantize())
