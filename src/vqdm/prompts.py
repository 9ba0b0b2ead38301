"""Prompt files: read them, and choose prompts without replacement.

A file is `.txt` (one prompt per line), `.csv`, `.tsv`, `.json`, `.jsonl`, `.yaml` or `.parquet`; tables need a column
named `prompt`, `prompts`, `caption`, `captions` or `text`. Anything that is not a file is taken as the name of a
`datasets` dataset. A row that cannot be read is refused with its line, or counted and named in one line of the log.
Prompts for calibration and for evaluation ship with the package, for when no file is given.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from vqdm.documents import (
    LINE_END,
    QUOTED,
    check_names,
    described,
    first_line,
    kind_of,
    parse_json,
    parse_yaml,
    printable,
    read_table,
    read_text,
    shortened,
)
from vqdm.errors import UserError

COLUMNS = ("prompt", "prompts", "caption", "captions", "text")
# Columns by which a row overrules the flags of generate.py; see `generation.requests`.
SETTING_COLUMNS = ("seed", "negative_prompt", "guidance_scale", "num_inference_steps", "height", "width")
ID_COLUMNS = ("id", "item_id")
# Around prompts; a byte order mark stands where two files were joined, \x1a at the end of files of DOS.
BLANKS = " \t\r\n\v\f\x1a\x1c\x1d\x1e\x1f\x85\xa0\u2028\u2029\u200b\u3000\ufeff"
ACTING = {*COLUMNS, *SETTING_COLUMNS, *ID_COLUMNS}
EXPECTED = {
    False: 'a list, ["a prompt", "another"]',
    True: 'a list, each prompt on a line of its own behind "- "',
}  # YAML?
LIST = re.compile(r"""\[\s*(['"]).*\1\s*,?\s*\]""", re.DOTALL)  # a list of texts that a program wrote into a cell
# In JSON: an escaped NUL, and half of a surrogate pair. Tokenizers, PNG and UTF-8 take neither.
NO_CHARACTER = re.compile(r"(?<!\\)(?:\\\\)*(\\u0000)|([\ud800-\udfff])")
JSON_OBJECT = re.compile(r"\{\s*\".*\}\s*,?")
UNUSUAL = re.compile(r"[\x01-\x08\x0e-\x1b\x7f\ufffd]")  # what a conversion or a terminal left behind
NOT_A_PROMPT = ("nan", "none", "null", "<na>", "n/a")  # how programs write a missing text
MOST_CHARACTERS = 2**30  # of all cells of a Parquet file, which may say one long text a billion times in a few bytes
ROWS_AT_ONCE = 256
# Types of Parquet columns that are read.
PLAIN = re.compile(r"int|uint|float|double|bool|halffloat|(large_)?string|dictionary<values=(large_)?string")


class Row(dict):
    """A row of a prompt file, by column, and the place where it stands there: "line 7" or "row 7"."""

    def __init__(self, values: dict, place: str):
        super().__init__(values)
        self.place = place


def default_file(kind: str) -> str:
    """Return the file of the prompts that ship with vqdm: "calibration" (256) or "evaluation" (64)."""
    return str(Path(__file__).parent / "default_prompts" / f"{kind}.csv")


def default_prompts(kind: str, flag: str) -> str:
    """Return the file of the prompts that ship with vqdm, and log that it is used."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("vqdm").info("no %s given; using the %s prompts that ship with vqdm", flag, kind)
    return default_file(kind)


def load_prompts(source: str, flag: str) -> list[str]:
    """Load all prompts of a file or dataset, in order.

    Raises:
        UserError: missing or unreadable file, unknown suffix, no known column, or no prompt in it; names `flag`.
    """
    rows, notes = _load(source, flag)
    filled = {plain_name(name) for row in rows for name, value in row.items() if str(value or "").strip()}
    unused = [name for name in SETTING_COLUMNS if name in filled]
    if unused:
        notes.append(f"columns that only generate.py uses: {', '.join(unused)}")
    try:
        for row in rows:
            _check_numbers(row)
    except UserError as error:
        raise UserError(f"{flag}: {source}: {error}") from None
    log_notes(notes, source, flag)
    return [row["prompt"] for row in rows]


def _check_numbers(row: Row) -> None:
    """Raise UserError where a column of numbers holds none: an unquoted comma in the prompt moves its rest there."""
    for name, value in row.items():
        if plain_name(name) in SETTING_COLUMNS and plain_name(name) != "negative_prompt" and str(value or "").strip():
            try:
                float(value)
            except (ValueError, TypeError, OverflowError):
                advice = "allowed are numbers; put a prompt that holds a separator in double quotes"
                raise UserError(f"{row.place}: its {name} is {described(value)}; {advice}") from None


def check_prompts(prompts: Sequence[str], flag: str) -> list[str]:
    """Return the prompts of a list as those of a file: stripped, empty ones left out with a line in the log.

    Raises:
        UserError: it is no list, an entry is no text, or no prompt is left; names `flag`.
    """
    if not isinstance(prompts, Sequence):
        raise UserError(f"{flag} is {kind_of(prompts)}; expected a list of prompts, or a prompt file")
    notes: list[str] = []
    try:
        for number, prompt in enumerate(prompts, start=1):
            if not isinstance(prompt, str):
                raise UserError(f"entry {number} is {described(prompt)}; expected text")
        rows = _checked([Row({"prompt": one}, f"entry {number}") for number, one in enumerate(prompts, 1)], notes)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    log_notes(notes, "the list", flag)
    return [row["prompt"] for row in rows]


def load_rows(source: str, flag: str) -> list[Row]:
    """Load all prompts of a file or dataset, in order, each a dict of `prompt` and the row's other columns as read.

    An object of named prompts gives its names as the column `id`.

    Raises:
        UserError: as `load_prompts`.
    """
    rows, notes = _load(source, flag)
    log_notes(notes, source, flag)
    return rows


def log_notes(notes: list[str], source: str, flag: str) -> None:
    """One line for all that a user should know of a file; of several processes the first one logs it."""
    if notes and os.environ.get("RANK", "0") == "0":
        logging.getLogger("vqdm").warning("%s: %s: %s", flag, source, printable("; ".join(notes)))


def _load(source: str, flag: str) -> tuple[list[Row], list[str]]:
    """Rows, and notes on what was left out of the file or may not be what is meant."""
    path, notes = Path(source), []
    if path.is_dir():
        raise UserError(f"{flag}: {source} is a folder; give a prompt file ({' '.join(_READERS)})")
    reader = _READERS.get(path.suffix.lower())
    if reader and not path.is_file():
        raise UserError(f"{flag}: {source} is not found, or is not a file")
    if not reader and path.exists():
        raise UserError(f"{flag}: {source} ends in {path.suffix!r}; allowed are {' '.join(_READERS)}")
    try:
        return _checked(reader(path, notes) if reader else _from_dataset(source, notes), notes), notes
    except UserError as error:
        raise UserError(f"{flag}: {source}: {error}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{flag}: {source} cannot be read: {first_line(error)}") from None


def choose(
    prompts: list[str], count: int, seed: int, source: str, flag: str, zero_is_offered: bool = False
) -> list[str]:
    """Choose `count` prompts without replacement, by a seed; 0 means all, in order.

    Args:
        zero_is_offered: whether the flag takes 0, so that a complaint can say so.

    Raises:
        UserError: there are fewer than `count` prompts.
    """
    if count > len(prompts):
        advice = f"give {len(prompts)}{', or 0 for all' if zero_is_offered else ' or fewer'}"
        raise UserError(f"{flag} is {count}, but {source} holds {len(prompts)} prompts; {advice}")
    return random.Random(seed).sample(prompts, count) if count else list(prompts)


# ------------------------------------------------------------------------------------------- rows of any file


def _checked(rows: list[Row], notes: list[str]) -> list[Row]:
    """Rows with a prompt, stripped of the blanks around it, in the column `prompt`.

    Raises:
        UserError: there is none, one is no text, or a cell is no text that can be written.
    """
    found = [_renamed(row) for row in rows]
    if rows and not any(column for _, column in found):
        raise UserError(_no_column(list(rows[0])))
    for row, _ in found:
        _check_row(row)
    filled = [row for row, _ in found if row["prompt"]]
    if not filled:
        raise UserError("it holds no prompt")
    empty = [row for row, _ in found if not row["prompt"]]
    if empty:
        notes.append(f"{_count(empty, len(found))} without a prompt left out, the first is {empty[0].place}")
    _note_columns(rows, [column for _, column in found], notes)
    missing = [row for row in filled if row["prompt"].lower() in NOT_A_PROMPT]
    if missing:
        values = " or ".join(repr(value) for value in dict.fromkeys(row["prompt"] for row in missing))
        first = f"which looks like missing data, the first is {missing[0].place}"
        notes.append(f"{_count(missing, len(filled))} read as the prompt {values}, {first}")
    odd = [(row, found[0]) for row in filled if (found := UNUSUAL.search(row["prompt"]))]
    if odd:
        first = f"the first is U+{ord(odd[0][1]):04X} in {odd[0][0].place}"
        notes.append(f"{len(odd)} of {len(filled)} rows hold control characters or U+FFFD, a lost character, {first}")
    lists = [row for row in filled if LIST.fullmatch(row["prompt"])]
    if lists:
        first = f"the first is {lists[0].place}; give each prompt a row"
        notes.append(f"{_count(lists, len(filled))} have a prompt that looks like a list, {first}")
    return filled


def _count(some: list[Row], total: int) -> str:
    return f"{len(some)} of {total} rows"


def _renamed(row: Row) -> tuple[Row, str | None]:
    """The row with its prompt as `prompt`, and the column that held it; None where it has no such column."""
    check_names([name for name in row if plain_name(name) in ACTING], row.place)
    column = _pick_column(list(row))
    others = {str(name).strip(): value for name, value in row.items() if name != column}
    prompt = None if column is None else row[column]
    prompt = prompt.strip(BLANKS) if isinstance(prompt, str) else prompt
    return Row(
        {"prompt": prompt} | {name: value for name, value in others.items() if name != "prompt"}, row.place
    ), column


def _check_row(row: Row) -> None:
    prompt = row["prompt"]
    if isinstance(prompt, dict | list | set | tuple | bytes):
        raise UserError(f"{row.place}: its prompt is {kind_of(prompt)}; expected text")
    try:
        _check_characters(row)
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        # A number of thousands of digits, a list within itself, a key that is no text.
        raise UserError(f"{row.place} cannot be written as JSON: {first_line(error)}") from None
    if not isinstance(prompt, str | None):
        shown = kind_of(prompt) if isinstance(prompt, bool) else f"{prompt}, {kind_of(prompt)}"
        raise UserError(f"{row.place}: its prompt is {shown}; put it in quotes if it is text")


def _check_characters(row: Row) -> None:
    """Raise UserError where a text of the row holds what is no character, also deep inside a list or object."""
    if not NO_CHARACTER.search(json.dumps(row, default=str, ensure_ascii=False)):
        return
    for name, value in row.items():
        found = NO_CHARACTER.search(json.dumps({name: value}, default=str, ensure_ascii=False))
        if found:
            what = "a NUL character (\\u0000); take it out"
            if found[2]:
                what = f"half a surrogate pair (\\u{ord(found[2]):04x}); write the whole character, or take it out"
            raise UserError(f"{row.place}: its {printable(str(name), 40)} holds {what}")


def _note_columns(rows: list[Row], columns: list[str | None], notes: list[str]) -> None:
    """Note where rows have more than one column that could be the prompt, or not all of them the same."""
    used = Counter(column for column in columns if column is not None)
    known = {name for row in rows for name in row if str(name).strip().lower() in COLUMNS}
    others = sorted(str(name) for name in known - used.keys())
    if len(used) > 1:
        notes.append("prompts are read from columns " + ", ".join(f"{name} ({used[name]} rows)" for name in used))
    elif others:
        notes.append(f"prompts are read from column {next(iter(used))}, not from {', '.join(others)}")


def _pick_column(names: list) -> str | None:
    """The name that stands for the prompt, the first of COLUMNS that exists."""
    plain = {str(name).strip().lower(): name for name in reversed(names)}
    return next((plain[wanted] for wanted in COLUMNS if wanted in plain), None)


def _no_column(names: list) -> str:
    found = ", ".join(printable(str(name), 40) for name in names[:8]) or "none"
    return f"no column named {', '.join(COLUMNS)}; its columns are {found}"


def plain_name(name) -> str:
    """A column's name without what people write differently: "Negative Prompt" is negative_prompt."""
    return re.sub(r"[\s_-]+", "_", str(name).strip().lower())


# ------------------------------------------------------------------------------------------- kinds of files


def _text(path: Path) -> str:
    """The text of a file. Raises UserError where there is none."""
    text = read_text(path)
    if not text.strip(BLANKS):
        raise UserError("the file is empty; it holds no prompt")
    return text


def _read_lines(path: Path, notes: list[str]) -> list[Row]:
    lines = LINE_END.split(_text(path))
    while lines and not lines[-1].strip(BLANKS):
        lines.pop()
    rows = [Row({"prompt": line}, f"line {number}") for number, line in enumerate(lines, start=1)]
    comments = [row for row in rows if row["prompt"].lstrip(BLANKS).startswith("#")]
    if comments:
        notes.append(f"{_count(comments, len(rows))} begin with # and are prompts, the first is {comments[0].place}")
    cells = [cell.strip(BLANKS + '"').lower() for cell in re.split(r"[,;\t|]", lines[0])] if lines else []
    if set(cells) & set(COLUMNS):
        notes.append("line 1 is a prompt, but looks like the header of a table; name a table .csv or .tsv")
    objects = [row for row in rows if JSON_OBJECT.fullmatch(row["prompt"].strip(BLANKS))]
    if objects:
        first = f"the first is {objects[0].place}; name such a file .jsonl"
        notes.append(f"{_count(objects, len(rows))} look like JSON and are prompts, {first}")
    filled = [row["prompt"].strip(BLANKS) for row in rows if row["prompt"].strip(BLANKS)]
    if filled and all(QUOTED.fullmatch(prompt) for prompt in filled):
        notes.append("all prompts are in double quotes, which are part of them; name a table .csv or .tsv")
    return rows


def _read_table(usual: str) -> Callable[[Path, list[str]], list[Row]]:
    def read(path: Path, notes: list[str]) -> list[Row]:
        table = read_table(_text(path), usual, lambda names: _pick_column(names) is not None)
        column = _pick_column(table.names)
        if column is None:
            raise UserError(f"{_no_column(table.names)}; the first line must name the columns")
        notes += table.notes
        # Cells that a row lacks stay away: thousands of columns times thousands of short rows would fill memory.
        rows = [
            Row({column: None} | dict(zip(table.names, cells, strict=False)), f"line {number}")
            for number, cells in table.rows
        ]
        long = [row for row in rows if LINE_END.search((row[column] or "").strip())]
        if long:
            notes.append(
                f"{_count(long, len(rows))} have a prompt of several lines, the first begins in {long[0].place}"
            )
        return rows

    return read


def _read_json(path: Path, notes: list[str]) -> list[Row]:
    text = _text(path)
    try:
        return _from_value(parse_json(text, unique=True), notes)
    except ValueError as error:
        if "Extra data" not in str(error) or isinstance(error, UserError):
            raise
    rows = _from_lines(text)
    notes.append("it holds one JSON value per line, and is read so")
    return rows


def _read_json_lines(path: Path, notes: list[str]) -> list[Row]:
    text = _text(path)
    try:
        return _from_lines(text)
    except ValueError as error:
        try:
            value = parse_json(text, unique=True)
        except ValueError:
            raise error from None
        if not isinstance(value, list | dict):
            raise
    notes.append("it holds one JSON value, not one per line, and is read so")
    return _from_value(value, notes)


def _from_lines(text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(LINE_END.split(text), start=1):
        line = line.strip("\ufeff")  # where files were joined
        if not line.strip():
            continue
        try:
            value = parse_json(line, unique=True, first=number)
        except ValueError as error:
            more = "; each line must hold one whole JSON value and nothing else" if "is not JSON" in str(error) else ""
            raise ValueError(f"{error}{more}") from None
        rows.append(_entry(value, f"line {number}"))
    return rows


def _read_yaml(path: Path, notes: list[str]) -> list[Row]:
    return _from_value(parse_yaml(_text(path)), notes, yaml=True)


def _entry(entry, place: str, yaml: bool = False) -> Row:
    """The row of a text or an object; of null a row without a prompt.

    Raises:
        UserError: it is neither, or an object of columns that nobody knows: YAML makes one of `a sign: hello`.
    """
    if isinstance(entry, str | None):
        return Row({"prompt": entry}, place)
    if not isinstance(entry, dict):
        advice = "" if isinstance(entry, list) else "; put it in quotes if it is text"
        raise UserError(f"{place} is {described(entry)}; expected strings or objects{advice}")
    if entry and not any(plain_name(name) in ACTING for name in entry):
        if not yaml:
            raise UserError(f"{place}: {_no_column(list(entry))}")
        keys = ", ".join(shortened(str(name), 40) for name in list(entry)[:8])
        raise UserError(f"{place} has only the key{'s' * (len(entry) > 1)} {keys}; put the prompt in quotes")
    return Row(entry, place)


def _from_value(value, notes: list[str], yaml: bool = False) -> list[Row]:
    """Rows of a list, of an object of columns, or of an object of named prompts."""
    if isinstance(value, list):
        return [_entry(entry, f"row {number}", yaml) for number, entry in enumerate(value, start=1)]
    if not isinstance(value, dict):
        raise UserError(f"it holds {described(value)}; expected {EXPECTED[yaml]}")
    check_names(list(value), "its object")
    column = _pick_column([name for name, cells in value.items() if isinstance(cells, list)])
    if column is not None:
        return _from_columns(value, column, notes, yaml)
    single = _pick_column(list(value))
    if single is not None and len(value) > 1 and isinstance(value[single], str):
        raise UserError(f"it is a single object with a {single}; put objects into a list, [{{...}}, ...]")
    rows = []
    for number, (name, entry) in enumerate(value.items(), start=1):
        row = _entry(entry, f"row {number}", yaml)
        rows.append(Row({"id": name} | row, row.place))
    return rows


def _from_columns(value: dict, column: str, notes: list[str], yaml: bool) -> list[Row]:
    """Rows of an object of columns, or of the list of objects that one of them is.

    Raises:
        UserError: a column is not as long as that of the prompts.
    """
    prompts = value[column]
    columns = {name: cells for name, cells in value.items() if isinstance(cells, list)}
    if any(isinstance(entry, dict) for entry in prompts):
        columns = {column: prompts}
    left_out = [printable(str(name), 40) for name in value if name not in columns]
    if left_out:
        notes.append(f"left out beside the list {column}: {', '.join(left_out)}")
    for name, cells in columns.items():
        if len(cells) != len(prompts):
            raise UserError(f"its list {name} has {len(cells)} entries, and {column} has {len(prompts)}")
    places = [f"row {number}" for number in range(1, len(prompts) + 1)]
    if len(columns) == 1:
        return [_entry(entry, place, yaml) for entry, place in zip(prompts, places, strict=True)]
    return [Row({name: cells[i] for name, cells in columns.items()}, place) for i, place in enumerate(places)]


def _read_parquet(path: Path, notes: list[str]) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet needs pyarrow (pip install pyarrow)") from None
    try:
        return _parquet_rows(pyarrow.parquet.ParquetFile(path), notes)
    except pyarrow.ArrowException as error:  # not all of them are ValueError or OSError
        raise ValueError(first_line(error)) from None


def _parquet_rows(file, notes: list[str]) -> list[Row]:
    kinds = [(field.name, str(field.type)) for field in file.schema_arrow]
    plain = _plain_columns(kinds, notes)
    rows, characters = [], 0
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=plain):
        rows += [Row(row, f"row {len(rows) + k}") for k, row in enumerate(batch.to_pylist(), start=1)]
        characters += batch.nbytes
        if characters > MOST_CHARACTERS:
            raise UserError(f"it holds more than {MOST_CHARACTERS} bytes of text")
    return rows


def _plain_columns(kinds: list[tuple[str, str]], notes: list[str]) -> list[str]:
    """Columns of text or numbers, given names and types of all; images beside the prompts are not read.

    Raises:
        UserError: no column of prompts, or it is of another type.
    """
    check_names([name for name, _ in kinds], "it")
    column = _pick_column([name for name, _ in kinds])
    if column is None:
        raise UserError(_no_column([name for name, _ in kinds]))
    plain = [name for name, kind in kinds if PLAIN.match(kind)]
    if column not in plain:
        raise UserError(f"its column {column} holds {dict(kinds)[column]}; expected text")
    left_out = [f"{printable(name, 40)} ({printable(kind, 40)})" for name, kind in kinds if name not in plain]
    if left_out:
        notes.append(f"columns left out: {', '.join(left_out)}")
    return plain


def _from_dataset(source: str, notes: list[str]) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "it is not a file; to read it as a dataset's name, install datasets (pip install datasets)"
        ) from None
    try:
        rows = datasets.load_dataset(source, split="train")
    except Exception as error:
        raise UserError(f"it is neither a file nor a dataset: {first_line(error)}") from None
    kinds = [(name, str(getattr(kind, "dtype", type(kind).__name__))) for name, kind in rows.features.items()]
    plain = _plain_columns(kinds, notes)
    return [Row(row, f"row {number}") for number, row in enumerate(rows.select_columns(plain), start=1)]


_READERS: dict[str, Callable[[Path, list[str]], list[Row]]] = {
    ".txt": _read_lines,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".parquet": _read_parquet,
}
