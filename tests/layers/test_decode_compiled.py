"""The expression that is compiled: equal to the definition, and one kernel without a break."""

import shutil

import pytest
import torch
from stored_layers import FORMATS, stored_of

from vqdm.additive.code import CodeSpec
from vqdm.layers.decode_compiled import pointwise

WIDTHS = [CodeSpec(2, b, 4) for b in range(1, 17)]


@pytest.mark.parametrize("spec", [*WIDTHS, *FORMATS], ids=str)
def test_every_format_decodes_to_the_last_bit(spec):
    stored, code = stored_of(spec, 18, 24)
    assert torch.equal(pointwise(stored), code.dequantize())


def test_it_is_differentiable_as_the_definition_is():
    stored, _ = stored_of(CodeSpec(2, 3, 4, scale_nbits=3, input_channel_scales=True), 8, 16)
    names = "codebooks", "scale_values", "input_scales"
    learned = {name: getattr(stored, name).float().requires_grad_() for name in names}
    weights, stored = torch.randn(8, 16), stored._replace(**learned)
    found = torch.autograd.grad((pointwise(stored) * weights).sum(), learned.values())
    wanted = torch.autograd.grad((stored.working().dequantize() * weights).sum(), learned.values())
    torch.testing.assert_close(found, wanted)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_the_compiler_makes_one_kernel_of_it():
    from torch._inductor.utils import run_and_get_code

    stored, code = stored_of(CodeSpec(3, 5, 4, scale_nbits=4, input_channel_scales=True), 16, 16)
    out, sources = run_and_get_code(torch.compile(pointwise, fullgraph=True), stored)
    torch.testing.assert_close(out, code.dequantize())
    assert len(sources) == 1 and sources[0].count("async_compile.cpp") == 1
