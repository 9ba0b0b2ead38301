"""C files are compiled once, kept for this processor, and what fails is named."""

import pytest
from compilers import compiles

from vqdm import compiled

needs_compiler = pytest.mark.skipif(not compiles(), reason="no C compiler that works")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }")
    return path


@needs_compiler
def test_it_is_compiled_once_and_kept(source, tmp_path, monkeypatch):
    assert compiled.build(source, ("-O1",)).answer() == 42
    (built,) = (tmp_path / "cache" / "vqdm").iterdir()
    monkeypatch.setattr(compiled, "compile_beside", None)
    assert compiled.build(source, ("-O1",)).answer() == 42
    assert built.name.startswith("answer-") and built.suffix == ".so"


@needs_compiler
def test_other_flags_and_processors_get_their_own(source, tmp_path, monkeypatch):
    other = tmp_path / "cpuinfo"
    monkeypatch.setattr(compiled, "PROCESSOR", other)
    for content in ("flags : sse2", "flags : sse2 avx512f"):
        other.write_text(content)
        compiled.build(source, ("-O1", "-march=native"))
        compiled.build(source, ("-O1",))
    assert len(list((tmp_path / "cache" / "vqdm").iterdir())) == 3


@needs_compiler
def test_a_changed_header_is_compiled_again(source):
    header = source.with_name("number.h")
    source.write_text('#include "number.h"\nint answer(void) { return NUMBER; }')
    for number in (42, 43):
        header.write_text(f"enum {{ NUMBER = {number} }};")
        assert compiled.build(source, ("-O1",)).answer() == number


def test_a_compiler_that_fails_is_named(source, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(RuntimeError, match=r"broken cannot compile answer\.c to .*: no such target"):
        compiled.build(source, ())
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match="no C compiler"):
        compiled.build(source, ())
