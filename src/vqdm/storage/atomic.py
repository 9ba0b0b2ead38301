"""Files that are either whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save as to_bytes
from torch import Tensor


def save_bytes(data: bytes, path: Path) -> None:
    """Write `data` under `path`: no reader ever sees a part of it, and a crash leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def save_text(text: str, path: Path) -> None:
    save_bytes(text.encode(), path)


def save_json(value, path: Path) -> None:
    """Readable JSON with a final newline."""
    save_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file; tensors are made contiguous and moved to the CPU."""
    save_bytes(to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata), path)
