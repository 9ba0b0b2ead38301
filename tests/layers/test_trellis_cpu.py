"""Every decode backend gives a trellis the weights of the plain reference, for widths and shapes of all kinds."""

import pytest
import torch

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.additive.trellis import UNITS, allowed_widths, segment_rows, table, unpack
from vqdm.layers.decode import decode
from vqdm.layers.decode_compiled import pointwise
from vqdm.layers.stored import Stored
from vqdm.layers.trellis_cpu import native_trellis

SHAPES = [(4, 3), (6, 17), (48, 1), (48, 70), (320, 5), (640, 17)]


def random_states(rows: int, widths: torch.Tensor, L: int, generator: torch.Generator) -> torch.Tensor:
    """States [O, I] of rings of random bits, each ring read by itself."""
    T = segment_rows(rows)
    states = torch.zeros(rows, len(widths), dtype=torch.int64)
    for j, q in enumerate(widths.tolist()):
        for start in range(0, rows if q else 0, T):
            ring = torch.randint(256, (-(-T * q // UNITS // 8),), dtype=torch.uint8, generator=generator)
            states[start : start + T, j] = unpack(ring, torch.tensor([q]), T, T, L)[:, 0]
    return states


def trellis_of(rows: int, columns: int, L: int, log_scales: bool) -> tuple[Stored, AdditiveCode]:
    """A random layer whose columns have all kinds of widths."""
    generator = torch.Generator().manual_seed(rows * columns + L)
    T = segment_rows(rows)
    allowed = torch.tensor(allowed_widths(T, L))
    widths = allowed[torch.randint(len(allowed), (columns,), generator=generator)]
    widths[-1] = allowed[-1]
    spec = CodeSpec(
        num_codebooks=1,
        nbits_per_codebook=L,
        in_group_size=1,
        input_channel_scales=True,
        shared_codebooks="table",
        segment_rows=T,
        segment_bits=int(widths.sum()) * T // UNITS,
        log_scales=log_scales,
        scale_exponent=-5 if log_scales else 0,
    )
    states = random_states(rows, widths, L, generator)
    scales = 0.5 + torch.rand(rows, 1, generator=generator)
    columns_scales = 0.03 * (0.5 + torch.rand(columns, generator=generator)) * (widths > 0)
    books = table(L).half().view(1, -1, 1, 1)
    code = AdditiveCode(spec, states[:, :, None], books, scales, columns_scales, widths).stored()
    return Stored.of(spec, (rows, columns), code.pack(), books), code


@pytest.fixture(params=[True, False], ids=["logarithms", "float16"])
def log_scales(request):
    return request.param


@pytest.mark.parametrize("L", [4, 8, 12, 16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_native_and_pointwise_are_exact(rows, columns, L, log_scales):
    stored, code = trellis_of(rows, columns, L, log_scales)
    expected = code.dequantize()
    out = torch.full((rows, columns), torch.nan)
    native_trellis(stored, out)
    assert torch.equal(out, expected) and torch.equal(pointwise(stored), expected)
    assert not expected[:, code.widths == 0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("path", ["native", "torch"])
def test_other_types(dtype, path, log_scales):
    stored, code = trellis_of(48, 17, 10, log_scales)
    torch.testing.assert_close(decode(stored, dtype, path=path), code.dequantize().to(dtype))


def test_the_choice_is_measured_on_the_first_segment():
    stored, code = trellis_of(640, 70, 8, True)
    assert torch.equal(decode(stored, torch.float32), code.dequantize())


def test_nothing_after_the_codes_is_read():
    stored, code = trellis_of(48, 17, 12, True)
    for poison in (0, 255):
        behind = torch.cat([stored.codes, torch.full((64,), poison, dtype=torch.uint8)])
        out = torch.empty(48, 17)
        native_trellis(stored._replace(codes=behind[: len(stored.codes)]), out)
        assert torch.equal(out, code.dequantize())
