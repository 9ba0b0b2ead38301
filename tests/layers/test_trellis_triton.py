"""The Triton kernel against the definition, on a GPU or in Triton's interpreter."""

import pytest
import torch
from test_decode_triton import on
from test_trellis_cpu import trellis_of

trellis_kernel = pytest.importorskip("vqdm.layers.trellis_triton")


@pytest.mark.parametrize("log_scales", [True, False])
@pytest.mark.parametrize(("rows", "columns", "L"), [(4, 3, 4), (6, 17, 8), (48, 70, 12), (640, 5, 12), (48, 3, 16)])
def test_every_shape_decodes_to_the_last_bit(rows, columns, L, log_scales, triton_device):
    stored, code = trellis_of(rows, columns, L, log_scales)
    out = torch.full((rows, columns), torch.nan, device=triton_device)
    trellis_kernel.decode(on(triton_device, stored), out)
    assert torch.equal(out.cpu(), code.dequantize())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_sixteen_bits_are_written_directly(dtype, tolerance, triton_device):
    stored, code = trellis_of(48, 17, 12, True)
    out = torch.empty(48, 17, dtype=dtype, device=triton_device)
    trellis_kernel.decode(on(triton_device, stored), out)
    torch.testing.assert_close(out.cpu().float(), code.dequantize(), rtol=tolerance, atol=1e-5)
