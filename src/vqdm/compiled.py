"""C that is compiled on first use, where there is a compiler, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

PROCESSOR = Path("/proc/cpuinfo")


def compiler() -> str | None:
    """The C compiler: `$CC`, or cc, gcc or clang on the path; None where there is none."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library made of a C file, which may include headers that lie beside it.

    Raises RuntimeError where it cannot be made or loaded.
    """
    path = compiler()
    if path is None:
        raise RuntimeError("no C compiler: neither $CC nor cc, gcc, clang")
    text = b"".join(file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(text + repr((path, flags, _processor(flags))).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqdm"
    built = folder / f"{source.stem}-{key}.so"
    try:
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            compile_beside(path, flags, source, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
        raise RuntimeError(f"{path} cannot compile {source.name} to {built}: {reason}") from None


def compile_beside(path: str, flags: tuple[str, ...], source: Path, built: Path) -> None:
    """Compile beside `built`, then rename: another process may be doing the same."""
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder) / built.name
        words = [path, *flags, "-shared", "-fPIC", str(source), "-o", str(made)]
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
        made.replace(built)


def _processor(flags: tuple[str, ...]) -> str:
    """What the compiled code may depend on: with -march=native, all that the processor can do."""
    if "-march=native" not in flags or not PROCESSOR.is_file():
        return platform.machine()
    lines = PROCESSOR.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine())
