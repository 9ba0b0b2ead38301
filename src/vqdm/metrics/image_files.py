"""Files of a folder, or of a zip file that is read in place, by names relative to it."""

from __future__ import annotations

import os
import zipfile
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol

from vqdm.documents import decoded, read_text

MOST_TEXT = 2**28  # bytes of a text file once unpacked
MANIFEST = "manifest.jsonl"


class PictureFiles(Protocol):
    """What a set of pictures asks of the place where its files lie."""

    path: Path

    def names(self) -> list[str]:
        """All files, at any depth. Raises OSError where a folder cannot be looked into."""

    def unreachable(self) -> list[str]:
        """What is neither a file nor a folder to look into: links to folders, or to nowhere."""

    def matching(self, pattern: str) -> list[str]:
        """Files beside the manifest whose names match."""

    def beside_manifest(self, name: str) -> str:
        """A file as the manifest calls it → as it is called here."""

    def has(self, name: str) -> bool: ...

    def leaves(self, name: str) -> bool:
        """Whether a file lies elsewhere in truth."""

    def open(self, name: str) -> IO[bytes]: ...

    def text(self, name: str) -> str:
        """The content of a text file. Raises OSError, or ValueError where it is too long or not UTF-8."""


class FolderFiles:
    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        return [name for name in self._entries if (self.path / name).is_file()]

    def unreachable(self) -> list[str]:
        return [name for name in self._entries if not (self.path / name).is_file()]

    @cached_property
    def _entries(self) -> list[str]:
        """Everything at any depth but folders; os.walk, unlike glob, says which folder cannot be read."""
        found = []
        for folder, folders, files in os.walk(self.path, onerror=_raise):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            found += [Path(folder, name).relative_to(self.path).as_posix() for name in (*files, *links)]
        return found

    def matching(self, pattern: str) -> list[str]:
        return [path.name for path in self.path.glob(pattern)]

    def beside_manifest(self, name: str) -> str:
        return name

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def leaves(self, name: str) -> bool:
        return not (self.path / name).resolve().is_relative_to(self.path.resolve())

    def open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb")

    def text(self, name: str) -> str:
        return read_text(self.path / name, MOST_TEXT)


class ZipFiles:
    """A zip file; the manifest's folder may be its only one at the top, as `zip -r` leaves it."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.names())

    @cached_property
    def _top(self) -> str:
        """The folder of the manifest, with its slash."""
        tops = {name.split("/")[0] for name in self._names if not name.startswith("__MACOSX/")}
        top = f"{tops.pop()}/" if len(tops) == 1 else ""
        return top if top + MANIFEST in self._names else ""

    def names(self) -> list[str]:
        return [name for name in self._archive.namelist() if not name.endswith("/")]

    def unreachable(self) -> list[str]:
        return []

    def matching(self, pattern: str) -> list[str]:
        return [name for name in self._names if fnmatchcase(name, self._top + pattern)]

    def beside_manifest(self, name: str) -> str:
        return self._top + name

    def has(self, name: str) -> bool:
        return name in self._names

    def leaves(self, name: str) -> bool:
        return False

    def open(self, name: str) -> IO[bytes]:
        return self._archive.open(name)

    def text(self, name: str) -> str:
        if self._archive.getinfo(name).file_size > MOST_TEXT:
            raise ValueError(f"it has more than {MOST_TEXT} bytes")
        return decoded(self._archive.read(name))


def _raise(error: OSError) -> None:
    raise error


def open_files(path: Path) -> PictureFiles:
    """Of a folder, or of a zip file, which is opened with the first look into it."""
    return ZipFiles(path) if path.is_file() else FolderFiles(path)
