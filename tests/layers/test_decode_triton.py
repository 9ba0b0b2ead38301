"""The Triton kernels against the definition, on a GPU or in Triton's interpreter."""

import pytest
import torch
from stored_layers import FORMATS, stored_of, trellis_of

from vqdm.additive.code import CodeSpec
from vqdm.layers.decode import Stored

kernels = pytest.importorskip("vqdm.layers.decode_triton")

WIDTHS = [CodeSpec(2, b, 4) for b in range(1, 17)]


def on(device: str, stored: Stored) -> Stored:
    return Stored(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in stored))


@pytest.mark.parametrize("spec", [*WIDTHS, *FORMATS], ids=str)
def test_every_format_decodes_to_the_last_bit(spec, triton_device):
    stored, code = stored_of(spec, 18, 24)
    out = torch.full((18, 24), torch.nan, device=triton_device)
    kernels.decode_additive(on(triton_device, stored), out)
    assert torch.equal(out.cpu(), code.dequantize())


@pytest.mark.parametrize("bits", range(1, 9))
def test_scales_of_any_width(bits, triton_device):
    stored, code = stored_of(CodeSpec(1, 2, 2, scale_nbits=bits), 10, 22)
    out = torch.empty(10, 22, device=triton_device)
    kernels.decode_additive(on(triton_device, stored), out)
    assert torch.equal(out.cpu(), code.dequantize())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_sixteen_bits_are_written_directly(dtype, tolerance, triton_device):
    stored, code = stored_of(CodeSpec(3, 8, 8, input_channel_scales=True), 16, 32)
    out = torch.empty(16, 32, dtype=dtype, device=triton_device)
    kernels.decode_additive(on(triton_device, stored), out)
    torch.testing.assert_close(out.cpu().float(), code.dequantize(), rtol=tolerance, atol=tolerance)


def test_more_groups_than_one_program_holds(triton_device, monkeypatch):
    monkeypatch.setattr(kernels, "VALUES_AT_ONCE", 64)
    stored, code = stored_of(CodeSpec(2, 6, 4), 13, 28)
    out = torch.empty(13, 28, device=triton_device)
    kernels.decode_additive(on(triton_device, stored), out)
    assert torch.equal(out.cpu(), code.dequantize())


def test_codebooks_of_another_type_and_layout(triton_device):
    stored, code = stored_of(CodeSpec(2, 4, 4), 8, 16)
    books = stored.codebooks.float().movedim(1, 0).contiguous().movedim(0, 1)
    out = torch.empty(8, 16, device=triton_device)
    kernels.decode_additive(on(triton_device, stored._replace(codebooks=books)), out)
    assert torch.equal(out.cpu(), code.dequantize())


@pytest.mark.parametrize("log_scales", [True, False])
@pytest.mark.parametrize(("rows", "columns", "L"), [(4, 3, 4), (6, 17, 8), (48, 70, 12), (640, 5, 12), (48, 3, 16)])
def test_every_shape_of_a_trellis_decodes_to_the_last_bit(rows, columns, L, log_scales, triton_device):
    stored, code = trellis_of(rows, columns, L, log_scales)
    out = torch.full((rows, columns), torch.nan, device=triton_device)
    kernels.decode_trellis(on(triton_device, stored), out)
    assert torch.equal(out.cpu(), code.dequantize())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_sixteen_bits_of_a_trellis_are_written_directly(dtype, tolerance, triton_device):
    stored, code = trellis_of(48, 17, 12, True)
    out = torch.empty(48, 17, dtype=dtype, device=triton_device)
    kernels.decode_trellis(on(triton_device, stored), out)
    torch.testing.assert_close(out.cpu().float(), code.dequantize(), rtol=tolerance, atol=1e-5)
