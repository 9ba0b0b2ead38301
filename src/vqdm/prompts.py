"""Prompt files: read, and draw without replacement.

A file is `.txt` (a prompt a line), `.csv`, `.tsv`, `.json`, `.jsonl`, `.yaml` or `.parquet`; tables need a column named
`prompt`, `caption`, `captions` or `text`. Anything that is not a file is taken as the name of a `datasets` data set.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

from vqdm.errors import UserError

COLUMNS = ("prompt", "caption", "captions", "text")


def load_prompts(source: str, flag: str) -> list[str]:
    """All prompts of a file or data set, in order.

    Raises:
        UserError: missing or unreadable file, unknown suffix, no known column, or no prompt in it; names `flag`.
    """
    path = Path(source)
    if not path.exists() and path.suffix.lower() not in _READERS:
        return _checked(_from_data_set(source, flag), source, flag)
    if not path.is_file():
        raise UserError(f"{flag}: {source} is not there, or is not a file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{flag}: {source} ends in {path.suffix!r}; allowed are {' '.join(_READERS)}")
    try:
        prompts = reader(path)
    except UserError as error:
        raise UserError(f"{flag}: {source}: {error}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{flag}: {source} cannot be read: {str(error).splitlines()[0]}") from None
    return _checked(prompts, source, flag)


def draw(prompts: list[str], count: int, seed: int, source: str, flag: str) -> list[str]:
    """`count` prompts drawn without replacement, seeded; 0 means all, in order.

    Raises:
        UserError: fewer than `count` prompts are there.
    """
    if count > len(prompts):
        raise UserError(f"{flag} is {count}, but {source} holds {len(prompts)} prompts")
    return random.Random(seed).sample(prompts, count) if count else list(prompts)


def _checked(prompts: list, source: str, flag: str) -> list[str]:
    kept = [str(prompt).strip() for prompt in prompts if prompt is not None and str(prompt).strip()]
    if not kept:
        raise UserError(f"{flag}: {source} holds no prompt")
    return kept


def _pick_column(names: list[str]) -> str:
    for wanted in COLUMNS:
        for name in names:
            if name is not None and str(name).strip().lower() == wanted:
                return name
    found = ", ".join(str(name) for name in names[:8]) or "none"
    raise UserError(f"no column named {', '.join(COLUMNS)}; its columns are {found}")


def _from_rows(rows: list) -> list:
    """Prompts of a list of strings, or of mappings with a known column."""
    if not rows or isinstance(rows[0], str):
        return [row for row in rows if isinstance(row, str)]
    if not isinstance(rows[0], dict):
        raise UserError(f"its entries are {type(rows[0]).__name__}; expected strings or objects")
    column = _pick_column(list(rows[0]))
    return [row.get(column) for row in rows if isinstance(row, dict)]


def _read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig").splitlines()


def _read_table(delimiter: str) -> Callable[[Path], list]:
    def read(path: Path) -> list:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=delimiter)
            column = _pick_column(list(table.fieldnames or []))
            return [row[column] for row in table]

    return read


def _read_json(path: Path) -> list:
    value = json.loads(path.read_text(encoding="utf-8-sig"))
    return _from_rows(_listed(value))


def _read_json_lines(path: Path) -> list:
    return _from_rows([json.loads(line) for line in _read_lines(path) if line.strip()])


def _read_yaml(path: Path) -> list:
    import yaml

    try:
        return _from_rows(_listed(yaml.safe_load(path.read_text(encoding="utf-8-sig"))))
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def _listed(value) -> list:
    """A list as it is; an object of columns or of named prompts as a list."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        known = [value[name] for name in COLUMNS if isinstance(value.get(name), list)]
        return known[0] if known else list(value.values())
    raise UserError(f"it holds a {type(value).__name__}; expected a list")


def _read_parquet(path: Path) -> list:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet needs pyarrow (pip install pyarrow)") from None
    table = pyarrow.parquet.read_table(path)
    return table.column(_pick_column(table.column_names)).to_pylist()


def _from_data_set(source: str, flag: str) -> list:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{flag}: {source} is not a file; to read it as a data set's name, install datasets (pip install datasets)"
        ) from None
    try:
        rows = datasets.load_dataset(source, split="train")
    except Exception as error:
        raise UserError(f"{flag}: {source} is neither a file nor a data set: {str(error).splitlines()[0]}") from None
    return list(rows[_pick_column(rows.column_names)])


_READERS: dict[str, Callable[[Path], list]] = {
    ".txt": _read_lines,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".parquet": _read_parquet,
}
