"""Digests that tell whether files are still the same; of models, cheap ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vqdm.documents import parse_json

PIECES, PIECE_BYTES = 16, 4096
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a whole file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pipeline_fingerprint(folder: Path) -> str:
    """SHA-256 over a pipeline's `model_index.json` and the folders of the components that it names."""
    index = (folder / "model_index.json").read_bytes()
    parts = [folder / name for name, value in parse_json(index.decode()).items() if isinstance(value, list)]
    digests = [folder_fingerprint(part) for part in sorted(parts) if part.is_dir()]
    return hashlib.sha256(b"\0".join([index, *(digest.encode() for digest in digests)])).hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over a component's `.json` and `.txt` files whole, and over size and 16 spread pieces of weight files.

    A model of several gigabytes takes milliseconds; weights that were trained further differ in nearly every piece.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        content = _content(path)
        if content is not None:
            digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _content(path: Path) -> bytes | None:
    """The bytes of a file that count, or None for a file that is not part of a model."""
    if path.suffix in WEIGHTS:
        return _pieces(path)
    return path.read_bytes() if path.suffix in (".json", ".txt") else None


def _pieces(path: Path) -> bytes:
    size = path.stat().st_size
    parts = [str(size).encode()]
    with open(path, "rb") as file:
        for k in range(PIECES):
            file.seek(max(0, size - PIECE_BYTES) * k // (PIECES - 1))
            parts.append(file.read(PIECE_BYTES))
    return b"".join(parts)
