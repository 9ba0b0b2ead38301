"""One process at a time in a folder: a lock that the system drops with its holder, however that ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vqdm.errors import UserError
from vqdm.tracking import log, log_info

LOCK = ".vqdm-lock"  # how the names of lock files begin
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
SECONDS_BETWEEN_TRIES = 0.5


@contextmanager
def locked(folder: Path, flag: str = "--output_dir", part: str = "", wait: bool = False) -> Iterator[None]:
    """Inside, no other process is, on any machine that shares the folder; it is made where it is missing.

    The file of the lock names its holder and is deleted at the end. A killed holder leaves the file but not the lock.

    Args:
        part: of the folder; parts do not exclude each other.
        wait: until another holder is done, rather than raise.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
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
        with suppress(OSError):  # of a full disk the run itself will speak
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: whoever waits notices, and makes the file again
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
    """Who holds a lock, as far as its file says."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"
