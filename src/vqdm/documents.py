"""JSON and YAML that someone else may have written: read within bounds, and wrong in no other way than ValueError.

Python's parsers answer hostile text with RecursionError, AttributeError, KeyError, or with memory without end.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2**30  # of a document
PIECE_BYTES = 2**20
MOST_REPEATED = 10**6  # nodes that the aliases of a YAML document may add to those that are written
LINE_END = re.compile(r"\r\n?|\n")  # Unicode's other separators, such as U+2028, may stand inside a prompt
# Byte order marks, those of UTF-32 before those of UTF-16, which they begin with.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """A text file: UTF-8, or UTF-16 or UTF-32 with the byte order mark that says so.

    Raises:
        OSError: it cannot be read.
        ValueError: it is in another encoding (names the line), or has more than `most` bytes, as a device without end.
    """
    data = bytearray()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            data += piece
            if len(data) > most:
                raise ValueError(f"it has more than {most} bytes")
    return decoded(bytes(data))


def decoded(data: bytes) -> str:
    """The text of a file's bytes. Raises ValueError as `read_text`."""
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
    """The value of a JSON file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def read_yaml(path: Path) -> Any:
    """The value of a YAML file, or of a JSON file by its name. Raises as `read_text`, `parse_yaml`, `parse_json`."""
    text = read_text(path)
    # JSON is YAML but for tabs, which people indent it with.
    return parse_json(text, unique=True) if path.suffix.lower() == ".json" else parse_yaml(text)


def parse_json(text: str, unique: bool = False, first: int = 1) -> Any:
    """The value of a JSON text.

    Args:
        unique: refuse an object that has a name twice, of which Python would keep the last.
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
        raise ValueError(f"{line}: {error.msg}; it is not JSON, or was cut off") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object names {shortened(twice)} twice; leave one out")
    return found


def parse_yaml(text: str) -> Any:
    """The value of a YAML text of plain types.

    Raises:
        ValueError: it is not YAML (names the line), has a key twice, or aliases that repeat without measure.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _check_aliases(node)
        _check_keys(node)
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = _lines_before(text[: error.position]) + 1
        raise ValueError(f"line {line} holds the character U+{error.character:04X}, unlike YAML") from None
    except (yaml.YAMLError, AttributeError, KeyError, IndexError, TypeError, OverflowError) as error:
        # Anything but YAMLError is a scalar that its explicit tag does not fit, such as `!!bool perhaps`.
        raise ValueError(first_line(error)) from None


def _check_aliases(root: yaml.Node | None) -> None:
    """Raise ValueError where a document without its aliases would be endless, or larger by `MOST_REPEATED` nodes."""
    sizes: dict[int, int | None] = {}
    written = 0

    def size(node: yaml.Node | None) -> int:
        nonlocal written
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = None  # while it is being counted
            pairs = isinstance(node, yaml.MappingNode)
            below = [one for pair in node.value for one in pair] if pairs else node.value
            written += len(below)
            sizes[id(node)] = 1 + sum(map(size, below))
        counted = sizes[id(node)]
        if counted is None:
            raise ValueError("it holds an alias of what it stands in")
        return counted

    if size(root) > 1 + written + MOST_REPEATED:
        raise ValueError("its aliases repeat too much")


def _check_keys(root: yaml.Node | None) -> None:
    """Raise ValueError, naming the line, for a mapping with a key twice, of which PyYAML would keep the last."""
    seen: set[int] = set()
    waiting = [root] if root else []
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in keys:
                    raise ValueError(f"line {key.start_mark.line + 1}: {shortened(key.value)} is there twice")
                keys.add((key.tag, key.value))
            waiting += [one for pair in node.value for one in pair]
        else:
            waiting += node.value


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shortened(value: Any, most: int = 80) -> str:
    """How a value looks in a message, also one that is long, or a number of more digits than Python prints."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= most else f"{text[:most]}…"


def printable(line: str, most: int = 2000) -> str:
    """A line as a terminal may show it: what a file smuggled in of control characters is spelled out."""
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line[:most])
    return shown + ("…" if len(line) > most else "")
