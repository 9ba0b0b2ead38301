"""Random layers of every kind of format, as their tensors are stored."""

import torch
from test_quantized import SPECS, random_code

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.additive.trellis import UNITS, allowed_widths, segment_rows, table, unpack
from vqdm.layers.decode import Stored

WIDTHS = [CodeSpec(M, b, 4) for b in range(1, 17) for M in (1, 3)]
VARIABLE = [
    CodeSpec(1, 12, 4, shared_codebooks="shared", row_bits=31),
    CodeSpec(1, 5, 8, shared_codebooks="shared", row_bits=7, input_channel_scales=True, scale_nbits=3),
    CodeSpec(1, 7, 2, out_group_size=3, shared_codebooks="shared", row_bits=16, scale_nbits=16),
    CodeSpec(1, 16, 8, shared_codebooks="shared", row_bits=1),
    CodeSpec(1, 12, 2, shared_codebooks="shared", row_bits=91, input_channel_scales=True),
    CodeSpec(1, 12, 1, shared_codebooks="shared", row_bits=150, input_channel_scales=True),
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
    codebooks = code.codebooks.half() if spec.shared_codebooks else None
    return Stored.of(spec, (rows, columns), code.pack(), codebooks), code


def random_states(rows: int, widths: torch.Tensor, L: int, generator: torch.Generator) -> torch.Tensor:
    """States [O, I] of rings of random bits, each ring read by itself."""
    T = segment_rows(rows)
    states = torch.zeros(rows, len(widths), dtype=torch.int64)
    for j, q in enumerate(widths.tolist()):
        for start in range(0, rows if q else 0, T):
            ring = torch.randint(256, (-(-T * q // UNITS // 8),), dtype=torch.uint8, generator=generator)
            states[start : start + T, j] = unpack(ring, torch.tensor([q]), T, T, L)[:, 0]
    return states


def trellis_of(
    rows: int, columns: int, L: int, log_scales: bool, widest: int = UNITS * 16
) -> tuple[Stored, AdditiveCode]:
    """A random layer whose columns have all kinds of widths, to `widest` quarter bits."""
    generator = torch.Generator().manual_seed(rows * columns + L)
    T = segment_rows(rows)
    allowed = torch.tensor([q for q in allowed_widths(T, L) if q <= widest])
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
