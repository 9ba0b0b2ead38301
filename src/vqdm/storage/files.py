"""Files of a run: written whole or not at all, with checksums, locks on folders, and fingerprints of models."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from vqdm.documents import first_line, parse_json, read_json
from vqdm.errors import UserError
from vqdm.tracking import log, log_info

UNFINISHED = ".vqdm-tmp"
SECONDS_OF_SILENCE = 3600.0  # after which a writer on another machine is considered gone
CHECK = "crc32"  # key of a file's own checksum: in a safetensors header, or in a JSON file
LOCK = ".vqdm-lock"  # prefix of the names of lock files
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
SECONDS_BETWEEN_TRIES = 0.5
SAMPLES, SAMPLE_BYTES = 16, 4096
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class CorruptFileError(ValueError):
    """A file differs from what was written; the message says how."""


def save_bytes(data: bytes, path: Path) -> None:
    """Write a file atomically: no reader sees a part of it, and a crash leaves the old file or the new one.

    Raises:
        OSError: names `path`, which the system does not do for a full disk.
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
    """Raise OSError unless files can be created in `folder`, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".probe.{_writer()}{UNFINISHED}"
    path.touch()
    path.unlink()


def sweep(folder: Path, below: bool = True) -> None:
    """Delete temporary files of killed writers in `folder`, and below it, but none that may still be written to."""
    for path in folder.glob(f"{'**/' if below else ''}.*{UNFINISHED}"):
        if _abandoned(path):
            path.unlink(missing_ok=True)


def _writer() -> str:
    """Name this process among those of all machines that may share a folder; short, since file names are limited."""
    return f"{_host()}-{os.getpid()}"


@cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _abandoned(path: Path) -> bool:
    """Return whether a temporary file's writer has ended; on another machine: has not written for an hour."""
    writer = re.search(r"\.([0-9a-f]{8})-(\d+)(-[0-9a-f]+)?" + re.escape(UNFINISHED), path.name)
    if not writer:  # of an older version
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
    except OSError:  # of another user
        return True
    return True


def save_text(text: str, path: Path) -> None:
    save_bytes(text.encode(), path)


def save_json(value, path: Path) -> None:
    """Write indented JSON with a final newline."""
    save_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file; tensors are made contiguous and moved to the CPU."""
    save_bytes(to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata), path)


# ------------------------------------------------------------------------------------------- with a checksum inside


def save_checked_json(value, path: Path) -> None:
    """Write JSON with a checksum of its value, for `load_checked_json`."""
    save_json({CHECK: _json_checksum(value), "value": value}, path)


def load_checked_json(path: Path):
    """Return the saved value. Raises CorruptFileError, or OSError if the file cannot be read."""
    try:
        held = read_json(path)
        intact = held[CHECK] == _json_checksum(held["value"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{type(error).__name__}: {error}") from None
    if not intact:
        raise CorruptFileError("its checksum does not match")
    return held["value"]


def _json_checksum(value) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def save_checked(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with a checksum of everything in the header, for `load_checked`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = metadata or {}
    save_bytes(to_bytes(tensors, metadata | {CHECK: _tensor_checksum(tensors, metadata)}), path)


def load_checked(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the saved tensors and metadata. Raises CorruptFileError, or OSError if the file cannot be read.

    Tensors are copied from the mapped file into memory of torch: on some processors the last bits of a product depend
    on the alignment of its operands, and a resumed run must give the results of an uninterrupted one.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise CorruptFileError(first_line(error)) from None
    if CHECK not in metadata:
        raise CorruptFileError("it has no checksum, or an older version wrote it")
    if metadata.pop(CHECK) != _tensor_checksum(tensors, metadata):
        raise CorruptFileError("its checksum does not match")
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, metadata


def _tensor_checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Return the CRC-32 of names, types, shapes, bytes and metadata: enough against accidents on scratch files."""
    crc = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)  # [N] → [bytes]
    return f"{crc:08x}"


# ---------------------------------------------------------------------------------------------------------------- locks


@contextmanager
def locked(folder: Path, flag: str = "--output_dir", part: str = "", wait: bool = False) -> Iterator[None]:
    """Lock a folder against all other processes, also of other machines that share it; creates it if necessary.

    The lock file names its holder and is deleted at the end. A killed holder leaves the file but not the lock.

    Args:
        flag: that named the folder, for messages.
        part: of the folder; parts do not exclude each other.
        wait: for another holder to finish, instead of raising.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    path = folder / f"{LOCK}{part}"
    lock = FileLock(path, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(lock, f"{flag} {folder}", path, wait)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"{flag} {folder} cannot be written: {error.strerror}") from None
        log.warning("warning: the file system of %s has no locks; no other run may write there", folder)
        yield
        return
    try:
        with suppress(OSError):  # the run itself will report a full disk
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: a waiting process notices, and creates the file again
        lock.release()


def _acquire(lock: FileLock, folder: str, path: Path, wait: bool) -> None:
    try:
        lock.acquire(blocking=False)
        return
    except Timeout:
        holder = _holder(path)
    if not wait:
        raise UserError(f"{folder} is in use by {holder}; wait until it has ended, or choose another folder")
    log_info(f"{folder} is in use by {holder}; waiting for it")
    lock.acquire(poll_interval=SECONDS_BETWEEN_TRIES)


def _holder(path: Path) -> str:
    """Return the holder of a lock as its file names it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"


# --------------------------------------------------------------------------------------------------------- fingerprints


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pipeline_fingerprint(folder: Path) -> str:
    """Return the SHA-256 over a pipeline's `model_index.json` and the folders of its components."""
    index = (folder / "model_index.json").read_bytes()
    parts = [folder / name for name, value in parse_json(index.decode()).items() if isinstance(value, list)]
    digests = [folder_fingerprint(part) for part in sorted(parts) if part.is_dir()]
    return hashlib.sha256(b"\0".join([index, *(digest.encode() for digest in digests)])).hexdigest()


def single_file_fingerprint(file: Path, configuration: Path) -> str:
    """Return the SHA-256 over size and samples of a pipeline in one file, and the `.json` and `.txt` files beside it.

    Args:
        configuration: pipeline folder of these files, whose weights do not count.
    """
    digest = hashlib.sha256(_samples(file))
    for path in sorted(path for kind in ("json", "txt") for path in configuration.glob(f"**/*.{kind}")):
        if not path.name.endswith(".index.json"):
            digest.update(f"{path.relative_to(configuration)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Return the SHA-256 over a component's `.json` and `.txt` files, and over size and 16 samples of weight files.

    A model of several gigabytes takes milliseconds; weights that were trained further differ in nearly every sample.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        content = _content(path)
        if content is not None:
            digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _content(path: Path) -> bytes | None:
    """Return the bytes of a file that count, or None for a file that is not part of a model."""
    if path.suffix in WEIGHTS:
        return _samples(path)
    return path.read_bytes() if path.suffix in (".json", ".txt") else None


def _samples(path: Path) -> bytes:
    size = path.stat().st_size
    parts = [str(size).encode()]
    with open(path, "rb") as file:
        for k in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * k // (SAMPLES - 1))
            parts.append(file.read(SAMPLE_BYTES))
    return b"".join(parts)
