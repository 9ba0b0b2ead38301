"""Text, JSON and YAML files that users give: read up to a size limit; every fault is a ValueError of one line."""

from __future__ import annotations

import codecs
import datetime
import json
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

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
