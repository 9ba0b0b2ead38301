"""The C loop against the definition, to the last bit."""

import platform
from pathlib import Path

import pytest
import torch
from compilers import compiles
from stored_layers import FORMATS, VARIABLE, WIDTHS, stored_of, trellis_of

from vqdm.additive.code import CodeSpec, pack_codes
from vqdm.compiled import build
from vqdm.layers import decode_cpu as native
from vqdm.layers.decode import Stored, decode, pointwise

needs_compiler = pytest.mark.skipif(not compiles(), reason="no C compiler that works")
SIZES = [CodeSpec(M, 5, g) for M in (1, 2, 3, 4, 5) for g in (1, 4, 6, 8, 16)] + [
    CodeSpec(16, 16, 8),
    CodeSpec(8, 7, 8),
]


@needs_compiler
@pytest.mark.parametrize("spec", [*WIDTHS, *FORMATS, *SIZES], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_format_decodes_to_the_last_bit(spec, threads, monkeypatch):
    monkeypatch.setattr(native, "WEIGHTS_AT_ONCE", 200)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    stored, code = stored_of(spec, 18, 48)
    out = torch.full((18, 48), torch.nan)
    native.decode_additive(stored, out)
    assert torch.equal(out, code.dequantize())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_are_rounded_once(dtype):
    stored, code = stored_of(CodeSpec(3, 5, 8, out_group_size=2, input_channel_scales=True), 16, 32)
    out = torch.empty(16, 32, dtype=dtype)
    native.decode_additive(stored, out)
    assert torch.equal(out, code.dequantize().to(dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_sixteen_bit_number_is_read_and_every_rounding_is_to_the_nearest_even(dtype):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    halves = halves[halves.isfinite()]
    book = torch.nn.functional.pad(halves, (0, 2**16 - len(halves)))
    codes = pack_codes(torch.arange(2**16), 16)
    scales = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-8, 1.00071, 3e4])
    stored = Stored(CodeSpec(1, 16, 1), (5, 2**16), codes.repeat(5), book.view(1, -1, 1, 1), scales)
    for written in (torch.float32, dtype):
        out = torch.empty(5, 2**16, dtype=written)
        native.decode_additive(stored, out)
        assert torch.equal(out, (scales[:, None] * book.float()).to(written))


@needs_compiler
def test_rows_longer_than_what_is_decoded_at_once():
    for spec in (CodeSpec(3, 5, 4, scale_nbits=16), CodeSpec(2, 3, 8, out_group_size=4, input_channel_scales=True)):
        stored, code = stored_of(spec, 8, 4 * 1080)
        out = torch.empty(8, 4 * 1080)
        native.decode_additive(stored, out)
        assert torch.equal(out, code.dequantize())


@needs_compiler
@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("groupwise", [False, True])
def test_long_rows_of_every_scale(M, groupwise):
    for p in (1, 3):
        spec = CodeSpec(M, 7, 4, p, scale_nbits=4, groupwise_codebooks=groupwise, input_channel_scales=True)
        stored, code = stored_of(spec, 6, 4 * 300)
        out = torch.empty(6, 4 * 300)
        native.decode_additive(stored, out)
        assert torch.equal(out, code.dequantize())


@needs_compiler
@pytest.mark.parametrize("row_bits", [1, 2801, 2808, 3600])
@pytest.mark.parametrize("g", [1, 2, 4])
def test_long_rows_of_variable_rate(row_bits, g):
    spec = CodeSpec(1, 12, g, shared_codebooks="shared", row_bits=row_bits, input_channel_scales=True)
    stored, code = stored_of(spec, 21, g * 300)
    for codebooks in (stored.codebooks, stored.codebooks.float()):
        out = torch.full((21, g * 300), torch.nan)
        native.decode_additive(stored._replace(codebooks=codebooks), out)
        assert torch.equal(out, code.dequantize())


@needs_compiler
@pytest.mark.parametrize("spec", [CodeSpec(3, 5, 4), CodeSpec(1, 11, 4), VARIABLE[0]], ids=str)
def test_codes_past_the_end_are_zero(spec):
    stored, _ = stored_of(spec, 64, 160)
    zeros = torch.zeros_like(stored.codes)
    for kept in (0, 1, len(zeros) // 2, len(zeros) - 1):
        codes = torch.cat([stored.codes[:kept], zeros[kept:]])
        found, wanted = torch.empty(2, 64, 160)
        native.decode_additive(stored._replace(codes=stored.codes[:kept]), found)
        native.decode_additive(stored._replace(codes=codes), wanted)
        assert torch.equal(found, wanted)


@needs_compiler
@pytest.mark.parametrize("width", [6, 16, 255])
def test_widths_that_no_codebook_has_do_not_lead_past_its_end(width):
    spec = CodeSpec(1, 5, 4, shared_codebooks="shared", row_bits=200)
    stored, _ = stored_of(spec, 8, 160)
    codebooks = torch.full((1, 2**17, 1, 4), torch.nan)
    codebooks[:, : spec.entries] = stored.codebooks
    crafted = stored._replace(
        codes=torch.full_like(stored.codes, 255),
        codebooks=codebooks[:, : spec.entries],
        code_widths=torch.full_like(stored.code_widths, width),
    )
    out = torch.empty(8, 160)
    native.decode_additive(crafted, out)
    assert out.isfinite().all()


@needs_compiler
def test_types_and_layouts_that_the_loop_does_not_read_are_converted():
    stored, code = stored_of(CodeSpec(2, 4, 4), 8, 16)
    books = stored.codebooks.double().movedim(1, 0).contiguous().movedim(0, 1)
    out = torch.empty(8, 16, dtype=torch.float64)
    native.decode_additive(stored._replace(codebooks=books, scales=stored.scales.bfloat16().float()[:, None]), out)
    wanted = code.dequantize() / code.scales * code.scales.bfloat16().float()
    torch.testing.assert_close(out.float(), wanted)


@needs_compiler
def test_without_a_team_of_threads_one_does_the_work(monkeypatch):
    monkeypatch.setattr(native, "team", lambda: None)
    monkeypatch.setattr(native, "WEIGHTS_AT_ONCE", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    stored, code = stored_of(CodeSpec(2, 6, 4), 16, 32)
    out = torch.full((16, 32), torch.nan)
    native.decode_additive(stored, out)
    assert torch.equal(out, code.dequantize())


SHAPES = [(4, 3), (6, 17), (48, 1), (48, 70), (320, 5), (640, 17)]


@pytest.fixture(params=[True, False], ids=["logarithms", "float16"])
def log_scales(request):
    return request.param


@needs_compiler
@pytest.mark.parametrize("L", [4, 8, 12, 16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_native_and_pointwise_are_exact(rows, columns, L, log_scales):
    stored, code = trellis_of(rows, columns, L, log_scales)
    expected = code.dequantize()
    out = torch.full((rows, columns), torch.nan)
    native.decode_trellis(stored, out)
    assert torch.equal(out, expected) and torch.equal(pointwise(stored), expected)
    assert not expected[:, code.widths == 0].any()


@needs_compiler
@pytest.mark.parametrize("left_out", ["-mno-avx2", "-mno-avx512f", None])
def test_a_trellis_on_processors_with_shorter_vectors(left_out, monkeypatch):
    if left_out and platform.machine() != "x86_64":
        pytest.skip("of x86 processors")
    flags = (*native.FLAGS, left_out) if left_out else native.FLAGS
    built = build(Path(native.__file__).with_name("decode_cpu_trellis.c"), flags)
    monkeypatch.setattr(native, "library", lambda name: built)
    for rows, columns in (640, 144), (521, 130):  # whole tiles and vectors; neither, and rows beyond one tile
        for L, widest in (12, 12), (12, 25), (12, 26), (16, 54):  # words of 8, 8, 4 and 4 rows
            stored, code = trellis_of(rows, columns, L, True, widest)
            out = torch.full((rows, columns), torch.nan)
            native.decode_trellis(stored, out)
            assert torch.equal(out, code.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_compiler), "torch"])
def test_other_types(dtype, backend, log_scales):
    stored, code = trellis_of(48, 17, 10, log_scales)
    torch.testing.assert_close(decode(stored, dtype, backend=backend), code.dequantize().to(dtype))


def test_the_choice_is_measured_on_the_first_segment():
    stored, code = trellis_of(640, 70, 8, True)
    assert torch.equal(decode(stored, torch.float32), code.dequantize())


@needs_compiler
def test_nothing_after_the_codes_is_read():
    stored, code = trellis_of(48, 17, 12, True)
    for poison in (0, 255):
        behind = torch.cat([stored.codes, torch.full((64,), poison, dtype=torch.uint8)])
        out = torch.empty(48, 17)
        native.decode_trellis(stored._replace(codes=behind[: len(stored.codes)]), out)
        assert torch.equal(out, code.dequantize())
