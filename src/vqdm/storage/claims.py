"""Whether a run may write into an output folder: its own only, and only with the settings that it was started with."""

from __future__ import annotations

from pathlib import Path

from vqdm.config import differences
from vqdm.documents import read_json
from vqdm.errors import UserError
from vqdm.storage.atomic import UNFINISHED
from vqdm.storage.locks import LOCK


def check_free(folder: Path) -> None:
    """Raise UserError where something else than a run is in a folder."""
    occupied = folder.exists() and not (folder / "run.json").is_file()
    if occupied and (not folder.is_dir() or _foreign(folder)):
        raise UserError(f"--output_dir {folder} exists and is not a run of vqdm; choose an empty or new folder")


def check_claim(folder: Path, settings: dict, resume: bool) -> None:
    """Look at `folder`/run.json, without writing.

    Raises:
        UserError: the folder holds something else, holds a run and `resume` is off, or a run of other settings.
    """
    record = folder / "run.json"
    if record.is_file():
        _check_resumable(record, settings, resume)
    check_free(folder)


def _foreign(folder: Path) -> bool:
    """Whether there is more in it than a run leaves that was killed before it had claimed the folder."""
    left = lambda path: path.name.endswith(UNFINISHED) or path.name.startswith(LOCK)  # noqa: E731
    return any(path != folder / "work" and not left(path) for path in folder.rglob("*"))


def _check_resumable(record: Path, settings: dict, resume: bool) -> None:
    folder = record.parent
    if not resume:
        raise UserError(f"--output_dir {folder} holds a run already; add --resume, or choose another folder")
    try:
        changed = differences(read_json(record)["settings"], settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--resume: {record} is damaged; choose another folder") from None
    if changed:
        raise UserError(f"--resume: {folder} was started with other settings: {'; '.join(changed)}")
