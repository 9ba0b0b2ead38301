"""JSON and YAML that someone else may have written: read within bounds, and wrong in no other way than ValueError.

Python's parsers answer hostile text with RecursionError, AttributeError, KeyError, or with memory without end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2**30  # of a document
PIECE_BYTES = 2**20
MOST_REPEATED = 10**6  # nodes that the aliases of a YAML document may add to those that are written


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """A UTF-8 text file, also with a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or has more than `most` bytes, as a device without end has.
    """
    data = bytearray()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            data += piece
            if len(data) > most:
                raise ValueError(f"it has more than {most} bytes")
    return data.decode("utf-8-sig")


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises as `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path))


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text of plain types. Raises ValueError, also where aliases would repeat without measure."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _check_aliases(node)
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
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
