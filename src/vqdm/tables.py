"""Tables as people have them: CSV of any usual separator, strictly quoted; TSV, which is mostly not quoted at all.

Nothing is dropped or changed without a note: a stray quote or comma is refused with its line.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vqdm.documents import LINE_END, printable
from vqdm.errors import UserError

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
