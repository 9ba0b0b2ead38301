"""Reading .npz files of others: no pickles, and no array larger than what the file declares to hold and may hold."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

MOST_BYTES = 2**32  # of all arrays together, once they are unpacked


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of these names that an .npz file holds; others are not looked at.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, holds Python objects, or unpacks to more than `MOST_BYTES`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: f"{name}.npy" for name in names if f"{name}.npy" in archive.namelist()}
            if sum(archive.getinfo(member).file_size for member in members.values()) > MOST_BYTES:
                raise ValueError(f"its arrays take more than {MOST_BYTES} bytes")
            return {name: _read_array(archive, member) for name, member in members.items()}
    except (OSError, MemoryError):
        raise
    except Exception as error:  # archives, decompressors and the parser of headers know a dozen kinds
        raise ValueError(str(error)) from None


def _read_array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    """An array whose header is checked against the size of the member before anything is allocated."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
    if math.prod(shape) * dtype.itemsize > archive.getinfo(member).file_size:
        raise ValueError(f"{member} declares an array {shape} that it does not hold")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
