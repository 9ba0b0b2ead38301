"""Text, JSON, YAML and CSV files that users give: read up to a size limit; every fault is a ValueError of one line."""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vqdm.errors import UserError

MOST_BYTES = 2**30  # of a file
CHUNK_BYTES = 2**20
LINE_END = re.compile(r"\r\n?|\n")  # other line separators of Unicode, such as U+2028, may be part of a prompt
# Byte order marks, those of UTF-32 before those of UTF-16, which they begin with.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# How files begin that are no text whatever they are called → what they are, and what to do.
NO_TEXT = {
    b"\x1f\x8b": "it is a gzip file; unpack it",
    b"PK\x03\x04": "it is a zip file or a spreadsheet; unpack it, or save it as UTF-8 text",
    b"PAR1": "it is a Parquet file; rename it to .parquet",
    b"%PDF-": "it is a PDF; save it as UTF-8 text",
    b"\xd0\xcf\x11\xe0": "it is a spreadsheet or document of Office; save it as UTF-8 text",
}


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Read a text file: UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is in another encoding (names the line), or has more than `most` bytes.
    """
    data = bytearray()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            data += chunk
            if len(data) > most:
                raise ValueError(f"it has more than {most} bytes")
    return decoded(bytes(data))


def decoded(data: bytes) -> str:
    """Decode the text of a file's bytes. Raises ValueError as `read_text`."""
    for mark, advice in NO_TEXT.items():
        if data.startswith(mark):
            raise ValueError(advice)
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = _lines_before(data[: error.start].decode(encoding, "ignore")) + 1
        kind = encoding.removesuffix("-sig").upper()
        found = f"byte 0x{data[error.start]:02x} is not {kind}" if encoding.startswith("utf-8") else f"it is cut {kind}"
        raise ValueError(f"line {line}: {found}; save it as UTF-8") from None
    if "\0" in text:
        line = _lines_before(text[: text.index("\0")]) + 1
        raise ValueError(f"line {line} holds a NUL byte, as UTF-16 and files that are not text do; save it as UTF-8")
    return text


def _lines_before(text: str) -> int:
    return len(LINE_END.findall(text))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def read_yaml(path: Path) -> Any:
    """Read a YAML file, or a JSON file by its name. Raises as `read_text`, `parse_yaml`, `parse_json`."""
    text = read_text(path)
    # JSON is YAML except for tabs, which people indent it with.
    return parse_json(text, unique=True) if path.suffix.lower() == ".json" else parse_yaml(text)


def parse_json(text: str, unique: bool = False, first: int = 1) -> Any:
    """Parse a JSON text.

    Args:
        unique: refuse an object with a repeated name, of which Python would keep the last value.
        first: number of the text's first line in its file.

    Raises:
        ValueError: it is not JSON; names the line.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        line = f"line {first + error.lineno - 1}, column {error.colno}"
        advice = "it is not JSON, or was cut off"
        if error.doc[: error.pos].rstrip().endswith(",") and error.doc[error.pos :][:1] in ("]", "}"):
            advice = "take out the comma before it"
        raise ValueError(f"{line}: {error.msg}; {advice}") from None
    except _NamedTwice as error:
        line = first + _lines_before(text[: _start_of_object(text)])
        raise ValueError(f"line {line}: an object names {shortened(error.args[0])} twice; leave one out") from None


class _NamedTwice(Exception):
    """An object has this name twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _NamedTwice(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
    return found


def _start_of_object(text: str) -> int:
    """Return where the object begins in which `_unique` finds a name twice; the fast parser does not know."""
    starts: list[int] = []

    def parse_object(start: tuple[str, int], *rest):
        starts.append(start[1] - 1)
        found = json.decoder.JSONObject(start, *rest)
        starts.pop()
        return found

    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    decoder.parse_object = parse_object
    decoder.scan_once = json.scanner.py_make_scanner(decoder)
    with suppress(_NamedTwice, RecursionError):
        decoder.decode(text)
    return starts[-1] if starts else 0


class _StrictLoader(yaml.SafeLoader):
    """Plain types only, without repeated keys, of which PyYAML would keep the last, and without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                None, None, f"*{event.anchor} is an alias; write its value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                problem = f"{shortened(key.value)} appears twice; leave one out"
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse a YAML text of plain types.

    Raises:
        ValueError: it is not YAML (names the line), repeats a key, or uses an alias.
    """
    try:
        return _StrictLoader(text).get_single_data()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        problem = error.problem or error.context
        advice = "; put a text that holds a colon in quotes" if problem == "mapping values are not allowed here" else ""
        raise ValueError(f"{where}{problem}{advice}") from None
    except yaml.reader.ReaderError as error:
        line = _lines_before(text[: error.position]) + 1
        raise ValueError(f"line {line} holds the character U+{error.character:04X}, unlike YAML") from None
    except Exception as error:  # of a value that its explicit tag does not fit, such as `!!bool perhaps`
        raise ValueError(first_line(error)) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shortened(value: Any, most: int = 80) -> str:
    """Return how a value looks in a message, also a long one, or a number of more digits than Python prints."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"{kind_of(value)} too long to print"
    return text if len(text) <= most else f"{text[:most]}…"


KINDS = (
    (bool, "true or false"),
    (int | float, "a number"),
    (str, "text"),
    (dict, "an object"),
    (list | tuple | set, "a list"),
    (bytes, "binary data"),
    (datetime.date, "a date"),
)


def kind_of(value: Any) -> str:
    """Return the kind of a value in words, as a message to someone who writes JSON or YAML may name it."""
    if value is None:
        return "nothing"
    return next((words for kind, words in KINDS if isinstance(value, kind)), f"a {type(value).__name__}")


def described(value: Any, most: int = 40) -> str:
    """Return how a value looks, with its kind: "5, a number"; the kind alone of what YAML writes in several ways."""
    kind = kind_of(value)
    return kind if value is None or isinstance(value, bool) else f"{shortened(value, most)}, {kind}"


def printable(line: str, most: int = 2000) -> str:
    """Return a line as a terminal may show it: control characters are escaped."""
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line[:most])
    return shown + ("…" if len(line) > most else "")


# --------------------------------------------------------------------------------------------------------------- tables
#
# Tables as people have them: CSV of any usual separator, strictly quoted; TSV, which is mostly not quoted at all.
#
# Nothing is dropped or changed without a note: a stray quote or comma is refused with its line.

SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
QUOTED = re.compile(r'"(?:[^"]|"")*"', re.DOTALL)
FIRST_LINE = re.compile(r"sep=(.)(?:\r\n?|\n)", re.IGNORECASE)  # how Excel notes the separator


@dataclass
class Table:
    """A table's header and rows.

    Attributes:
        names: of the columns, as written.
        rows: (number of the line it begins in, cells); a row may have fewer cells than there are names.
        notes: what a user should know about how it was read.
    """

    names: list[str]
    rows: list[tuple[int, list[str]]]
    notes: list[str] = field(default_factory=list)


def read_table(text: str, usual: str, is_header: Callable[[list[str]], bool]) -> Table:
    """The table of a text.

    Args:
        usual: the separator that the file's name promises: "," or a tab.
        is_header: whether these are the names of a table's columns; decides between separators.

    Raises:
        UserError: quotes that do not fit, more cells than the header has, a name twice; names the line.
    """
    announced = FIRST_LINE.match(text)
    skipped = 1 if announced else 0
    text = text[announced.end() :] if announced else text
    usual = announced[1] if announced else usual
    separator = next((one for one in (usual, *SEPARATORS) if is_header(_header(text, one))), usual)
    if separator == "\t" == usual and not announced:
        table = _unquoted(text)
    else:
        records = list(_records(text, separator, skipped))
        first = next((k for k, (_, cells) in enumerate(records) if cells), len(records))
        table = Table(records[first][1] if records[first:] else [], records[first + 1 :])
    if separator != usual:
        table.notes.append(f"cells are separated by {SEPARATORS[separator]}")
    return _checked(table, separator)


def _header(text: str, separator: str) -> list[str]:
    """The first line that is not empty, as cells; none where its quotes do not fit."""
    try:
        return next((cells for _, cells in _records(text, separator, 0) if cells), [])
    except UserError:
        return []


def _records(text: str, separator: str, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) by the rules of CSV, strictly: csv's default drops quotes, and rows behind an open one."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    while True:
        first = skipped + lines.line_num + 1
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(_fault(first, skipped + lines.line_num, str(error))) from None
        yield first, cells


def _fault(first: int, last: int, words: str) -> str:
    """What is wrong with a record of these lines, and what to do."""
    advice = 'put the whole cell in double quotes, and write each quote inside it twice ("")'
    if "end of data" in words:
        return f"line {first}: a double quote is opened and never closed; close it, or {advice}"
    if "limit" in words:
        return f"line {first}: {words}; is a double quote opened and never closed? If so, close it, or {advice}"
    if last > first:
        return f"line {first}: a double quote is opened that line {last} closes inside its text; close it, or {advice}"
    return f"line {first}: text follows a closing double quote; {advice}"


def _unquoted(text: str) -> Table:
    """A table that separates by tabs and lines alone; quotes belong to the text, except in a column that is quoted.

    That is one of which all cells are in quotes, or all that hold a quote are, with those inside doubled: so do
    programs that quote every text, or what needs it.
    """
    lines = [(number, line.split("\t")) for number, line in enumerate(LINE_END.split(text), start=1)]
    rows = [(number, cells if any(cell.strip() for cell in cells) else []) for number, cells in lines]
    first = next((k for k, (_, cells) in enumerate(rows) if cells), len(rows))
    names = [_bare(name) if QUOTED.fullmatch(name) else name for _, row in rows[first : first + 1] for name in row]
    table = Table(names, rows[first + 1 :])
    for column, name in enumerate(names):
        cells = [row[column] for _, row in table.rows if len(row) > column and row[column].strip()]
        if _is_quoted(cells):
            table.notes.append(f"quotes around cells of column {printable(name, 40)} are taken off")
            for _, row in table.rows:
                if len(row) > column and QUOTED.fullmatch(row[column]):
                    row[column] = _bare(row[column])
    table.notes += _several_lines(table.rows)
    return table


def _several_lines(rows: list[tuple[int, list[str]]]) -> list[str]:
    """A note where a cell opens a double quote and a later line closes one, as in a cell of several lines."""
    odd = [(number, cell.strip()) for number, cells in rows for cell in cells if cell.count('"') % 2]
    opens = [number for number, cell in odd if cell.startswith('"')]
    closes = [number for number, cell in odd if cell.endswith('"') and not cell.startswith('"')]
    closed = next((number for number in closes if number > opens[0]), None) if opens else None
    if closed is None:
        return []
    return [f"line {opens[0]} opens a double quote that line {closed} may close; each line is read as a row"]


def _is_quoted(cells: list[str]) -> bool:
    holding = [cell for cell in cells if '"' in cell]
    if not holding or not all(QUOTED.fullmatch(cell) for cell in holding):
        return False
    return len(holding) == len(cells) or all('""' in cell[1:-1] for cell in holding)


def _bare(cell: str) -> str:
    return cell[1:-1].replace('""', '"')


def _checked(table: Table, separator: str) -> Table:
    """The table without the empty columns and rows at its end, which spreadsheets leave.

    Raises:
        UserError: a name twice, or a row with more cells than the header.
    """
    names = table.names
    while names and not names[-1].strip():
        names.pop()
    check_names(names, "its header")
    for number, cells in table.rows:
        if any(cell.strip() for cell in cells[len(names) :]):
            raise UserError(
                f"line {number} has {len(cells)} cells, but the header has {len(names)}; "
                f"put a cell that holds {SEPARATORS.get(separator, repr(separator))} in double quotes"
                if separator != "\t"
                else f"line {number} has {len(cells)} cells, but the header has {len(names)}; take out what is too many"
            )
    table.names = [name.strip() or f"column {k}" for k, name in enumerate(names, start=1)]
    while table.rows and not any(cell.strip() for cell in table.rows[-1][1]):
        table.rows.pop()
    repeated = [number for number, cells in table.rows if _plain(cells) == _plain(names)]  # where files were joined
    if repeated:
        count = f"{len(repeated)} of {len(table.rows)} rows"
        table.notes.append(f"{count} repeat the header and are left out, the first is line {repeated[0]}")
        table.rows = [(number, cells) for number, cells in table.rows if _plain(cells) != _plain(names)]
    short = [number for number, cells in table.rows if any(map(str.strip, cells)) and len(cells) < len(names)]
    if short:
        count = f"{len(short)} of {len(table.rows)} rows"
        table.notes.append(f"{count} have fewer cells than the header, the first is line {short[0]}")
    return table


def _plain(cells: list[str]) -> list[str]:
    """Cells without blanks, the byte order mark of a joined file, and empty cells at the end."""
    plain = [cell.strip().strip("\ufeff") for cell in cells]
    while plain and not plain[-1]:
        plain.pop()
    return plain


def check_names(names: list, where: str) -> None:
    """Raise UserError where two names are the same but for case and blanks around them."""
    seen: dict[str, str] = {}
    for name in map(str, names):
        key = name.strip().lower()
        if key and key in seen:
            both = f"{printable(seen[key], 40)!r} and {printable(name, 40)!r}"
            raise UserError(f"{where} has two columns of one name, {both}; rename one, or leave it out")
        seen[key] = name
