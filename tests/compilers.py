"""Whether C can be compiled here, which tests of our C code ask before they demand that it works."""

import subprocess
import tempfile
from functools import cache
from pathlib import Path

from vqdm.compiled import compiler


@cache
def compiles() -> bool:
    """Whether the C compiler, if there is one, makes a library of one line; whether it makes ours is for the tests."""
    path = compiler()
    if path is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "one.c", Path(folder) / "one.so"
        source.write_text("int one(void) { return 1; }")
        words = [path, "-march=native", "-shared", "-fPIC", str(source), "-o", str(made)]
        return subprocess.run(words, capture_output=True).returncode == 0 and made.is_file()
