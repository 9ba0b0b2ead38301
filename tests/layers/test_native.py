"""The C loop against the definition, to the last bit, and what happens where it cannot be compiled."""

import pytest
import torch
from test_gather import FORMATS, WIDTHS, stored_of

from vqdm.additive.code import CodeSpec
from vqdm.layers import native, parts

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C compiler")
SIZES = [CodeSpec(M, 5, g) for M in (1, 2, 3, 4, 5) for g in (1, 4, 6, 8, 16)] + [
    CodeSpec(16, 16, 8),
    CodeSpec(8, 7, 8),
]


@needs_compiler
@pytest.mark.parametrize("spec", [*WIDTHS, *FORMATS, *SIZES], ids=str)
@pytest.mark.parametrize("at_once", [20, 2**15])
def test_every_format_decodes_to_the_last_bit(spec, at_once, monkeypatch):
    monkeypatch.setattr(parts, "GROUPS_AT_ONCE", at_once)
    stored, code = stored_of(spec, 18, 48)
    out = torch.full((18, 48), torch.nan)
    native.native(stored, out)
    assert torch.equal(out, code.dequantize())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_are_rounded_once(dtype):
    stored, code = stored_of(CodeSpec(3, 5, 8), 16, 32)
    out = torch.empty(16, 32, dtype=dtype)
    native.native(stored, out)
    assert torch.equal(out, code.dequantize().to(dtype))


@needs_compiler
def test_it_is_compiled_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    native.library()
    (built,) = (tmp_path / "vqdm").iterdir()
    monkeypatch.setattr(native, "_compile", None)
    native.library.cache_clear()
    native.library()
    assert built.suffix == ".so"


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    with pytest.raises(RuntimeError, match=r"broken cannot compile native\.c to .*: no such target"):
        native.library()
    monkeypatch.setattr(native, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match="no C compiler"):
        native.library()
    native.library.cache_clear()
