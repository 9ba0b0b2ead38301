"""Files that are either whole or not there, and that know whether they are still what was written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import time
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from vqdm.documents import first_line, read_json

UNFINISHED = ".vqdm-tmp"
SECONDS_OF_SILENCE = 3600.0  # after which a writer on another machine counts as gone
CHECK = "sha256"  # name of a file's own digest: in a safetensors header, or in a sealed JSON file


class Damaged(ValueError):
    """A file is not what was written; the message says how."""


def save_bytes(data: bytes, path: Path) -> None:
    """Write `data` under `path`: no reader ever sees a part of it, and a crash leaves the old file or the new.

    Raises:
        OSError: names `path` also where the system does not, as on a full disk.
    """
    beside = path.with_name(f".{path.name}.{_writer()}-{secrets.token_hex(3)}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        if beside.exists():
            beside.unlink()


def probe(folder: Path) -> None:
    """Raise OSError unless files can be made in `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".probe.{_writer()}{UNFINISHED}"
    path.touch()
    path.unlink()


def sweep(folder: Path, below: bool = True) -> None:
    """Delete what killed writers left in `folder`, and below it, but nothing that may still be being written."""
    for path in folder.glob(f"{'**/' if below else ''}.*{UNFINISHED}"):
        if _abandoned(path):
            path.unlink(missing_ok=True)


def _writer() -> str:
    """This process among those of all machines that may share a folder, in few letters: file names are limited."""
    return f"{_host()}-{os.getpid()}"


@cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _abandoned(path: Path) -> bool:
    """Whether a temporary file's writer has ended; of one on another machine, whether it has not written for long."""
    writer = re.search(r"\.([0-9a-f]{8})-(\d+)(-[0-9a-f]+)?" + re.escape(UNFINISHED), path.name)
    if not writer:  # an older version's
        return True
    if writer[1] == _host():
        return int(writer[2]) == os.getpid() or not _is_alive(int(writer[2]))
    try:
        return time.time() - path.stat().st_mtime > SECONDS_OF_SILENCE
    except FileNotFoundError:
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def save_text(text: str, path: Path) -> None:
    save_bytes(text.encode(), path)


def save_json(value, path: Path) -> None:
    """Readable JSON with a final newline."""
    save_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file; tensors are made contiguous and moved to the CPU."""
    save_bytes(to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata), path)


# --------------------------------------------------------------------------------------------- with a digest inside


def save_sealed_json(value, path: Path) -> None:
    """JSON with the digest of its value, for `load_sealed_json`."""
    save_json({CHECK: _json_digest(value), "value": value}, path)


def load_sealed_json(path: Path):
    """The value that was saved. Raises Damaged, or OSError where it cannot be read."""
    try:
        held = read_json(path)
        intact = held[CHECK] == _json_digest(held["value"])
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None
    if not intact:
        raise Damaged("its checksum does not match")
    return held["value"]


def _json_digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_sealed(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_tensors` with a digest of everything in the header, for `load_sealed`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = metadata or {}
    save_bytes(to_bytes(tensors, metadata | {CHECK: _tensor_digest(tensors, metadata)}), path)


def load_sealed(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata that were saved. Raises Damaged, or OSError where the file cannot be read.

    Tensors are copied from the mapped file to where torch allocates: with some processors the last bits of a product
    depend on the alignment of its operands, and a resumed run must compute as one that holds its tensors in memory.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise Damaged(first_line(error)) from None
    if CHECK not in metadata:
        raise Damaged("it has no checksum, or an older version wrote it")
    if metadata.pop(CHECK) != _tensor_digest(tensors, metadata):
        raise Damaged("its checksum does not match")
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, metadata


def _tensor_digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # [N] → [bytes]
    return digest.hexdigest()
