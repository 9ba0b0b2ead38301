"""Prompt files: read, and draw without replacement.

A file is `.txt` (a prompt a line), `.csv`, `.tsv`, `.json`, `.jsonl`, `.yaml` or `.parquet`; tables need a column named
`prompt`, `caption`, `captions` or `text`. Anything that is not a file is taken as the name of a `datasets` data set.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from vqdm.documents import first_line, parse_json, printable, read_json, read_text, read_yaml
from vqdm.errors import UserError

COLUMNS = ("prompt", "caption", "captions", "text")
MOST_CHARACTERS = 2**30  # of all cells of a Parquet file, which may say one long text a billion times in a few bytes
ROWS_AT_ONCE = 256


def load_prompts(source: str, flag: str) -> list[str]:
    """All prompts of a file or data set, in order.

    Raises:
        UserError: missing or unreadable file, unknown suffix, no known column, or no prompt in it; names `flag`.
    """
    return [row["prompt"] for row in load_rows(source, flag)]


def load_rows(source: str, flag: str) -> list[dict]:
    """All prompts of a file or data set, in order, each a dict of `prompt` and the row's other columns as read.

    An object of named prompts gives its names as the column `id`.

    Raises:
        UserError: as `load_prompts`.
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
        rows = reader(path)
    except UserError as error:
        raise UserError(f"{flag}: {source}: {error}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{flag}: {source} cannot be read: {first_line(error)}") from None
    return _checked(rows, source, flag)


def draw(prompts: list[str], count: int, seed: int, source: str, flag: str) -> list[str]:
    """`count` prompts drawn without replacement, seeded; 0 means all, in order.

    Raises:
        UserError: fewer than `count` prompts are there.
    """
    if count > len(prompts):
        raise UserError(f"{flag} is {count}, but {source} holds {len(prompts)} prompts")
    return random.Random(seed).sample(prompts, count) if count else list(prompts)


def _checked(rows: list[dict], source: str, flag: str) -> list[dict]:
    """Rows with a prompt, stripped of the blanks around it.

    Raises:
        UserError: there is none, one is a list or an object, or a cell is no text that can be written.
    """
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{flag}: {source}: row {number}")
    stripped = [row | {"prompt": str(row["prompt"]).strip()} for row in rows if row["prompt"] is not None]
    kept = [row for row in stripped if row["prompt"]]
    if not kept:
        raise UserError(f"{flag}: {source} holds no prompt")
    return kept


def _check_row(row: dict, where: str) -> None:
    if isinstance(row["prompt"], dict | list | set | tuple | bytes):
        raise UserError(f"{where}: its prompt is a {type(row['prompt']).__name__}; expected text")
    try:
        json.dumps(row, default=str, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        # Half a surrogate pair, a number of thousands of digits, a list within itself, a key that is no text.
        raise UserError(f"{where} cannot be written as JSON: {first_line(error)}") from None


def _pick_column(names: list[str]) -> str:
    for wanted in COLUMNS:
        for name in names:
            if name is not None and str(name).strip().lower() == wanted:
                return name
    found = ", ".join(printable(str(name), 40) for name in names[:8]) or "none"
    raise UserError(f"no column named {', '.join(COLUMNS)}; its columns are {found}")


def _row(values: dict, column: str) -> dict:
    """A row whose prompt, in `column`, goes by the name `prompt`."""
    others = {str(name).strip(): value for name, value in values.items() if name not in (column, None)}
    return {"prompt": values.get(column)} | {name: value for name, value in others.items() if name != "prompt"}


def _from_rows(rows: list) -> list[dict]:
    """Rows of a list of strings, or of mappings with a known column."""
    if not rows or isinstance(rows[0], str):
        return [{"prompt": row} for row in rows if isinstance(row, str)]
    if not isinstance(rows[0], dict):
        raise UserError(f"its entries are {type(rows[0]).__name__}; expected strings or objects")
    column = _pick_column(list(rows[0]))
    return [_row(row, column) for row in rows if isinstance(row, dict)]


def _read_lines(path: Path) -> list[dict]:
    # A prompt may hold other separators of lines, such as U+2028.
    return [{"prompt": line} for line in re.split(r"\r\n?|\n", read_text(path))]


def _read_table(delimiter: str) -> Callable[[Path], list[dict]]:
    def read(path: Path) -> list[dict]:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, delimiter=delimiter)
            names = next(table, [])
            column = _pick_column(names)
            # Cells that a row lacks stay away: thousands of columns times thousands of short rows would fill memory.
            return [_row(dict(zip(names, cells, strict=False)), column) for cells in table if cells]

    return read


def _read_json(path: Path) -> list[dict]:
    return _from_value(read_json(path))


def _read_json_lines(path: Path) -> list[dict]:
    lines = read_text(path).split("\n")  # a text may hold other separators of lines, such as U+2028
    return _from_rows([parse_json(line) for line in lines if line.strip()])


def _read_yaml(path: Path) -> list[dict]:
    return _from_value(read_yaml(path))


def _from_value(value) -> list[dict]:
    """Rows of a list, of an object of columns, or of an object of named prompts."""
    if isinstance(value, list):
        return _from_rows(value)
    if not isinstance(value, dict):
        raise UserError(f"it holds a {type(value).__name__}; expected a list")
    known = [name for name in COLUMNS if isinstance(value.get(name), list)]
    if known:
        return _from_columns(value, known[0])
    rows = _from_rows(list(value.values()))
    return [{"id": name} | row for name, row in zip(value, rows, strict=True)] if len(rows) == len(value) else rows


def _from_columns(value: dict, column: str) -> list[dict]:
    """Rows of an object of columns; those that are not as long as the prompts' are left out."""
    count = len(value[column])
    columns = {name: cells for name, cells in value.items() if isinstance(cells, list) and len(cells) == count}
    return [_row({name: cells[i] for name, cells in columns.items()}, column) for i in range(count)]


def _read_parquet(path: Path) -> list[dict]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet needs pyarrow (pip install pyarrow)") from None
    try:
        return _parquet_rows(pyarrow.parquet.ParquetFile(path))
    except pyarrow.ArrowException as error:  # not all of them are ValueError or OSError
        raise ValueError(first_line(error)) from None


def _parquet_rows(file) -> list[dict]:
    column = _pick_column(file.schema_arrow.names)
    plain = [field.name for field in file.schema_arrow if _is_plain(str(field.type))]
    rows, characters = [], 0
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=plain):
        rows += [_row(row, column) for row in batch.to_pylist()]
        characters += batch.nbytes
        if characters > MOST_CHARACTERS:
            raise UserError(f"it holds more than {MOST_CHARACTERS} bytes of text")
    return rows


def _is_plain(kind: str) -> bool:
    """Whether a column holds text or numbers; pictures beside the prompts are not worth reading."""
    return kind.startswith(("int", "uint", "float", "double", "bool", "string", "large_string"))


def _from_data_set(source: str, flag: str) -> list[dict]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{flag}: {source} is not a file; to read it as a data set's name, install datasets (pip install datasets)"
        ) from None
    try:
        rows = datasets.load_dataset(source, split="train")
    except Exception as error:
        raise UserError(f"{flag}: {source} is neither a file nor a data set: {first_line(error)}") from None
    column = _pick_column(rows.column_names)
    plain = [name for name, kind in rows.features.items() if _is_plain(str(getattr(kind, "dtype", "")))]
    return [_row(row, column) for row in rows.select_columns(plain)]


_READERS: dict[str, Callable[[Path], list[dict]]] = {
    ".txt": _read_lines,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".parquet": _read_parquet,
}
