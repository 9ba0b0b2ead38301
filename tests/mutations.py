"""Broken files for the tests: valid documents, tables, tensors and archives, changed with knowledge of their structure.

Every function draws from hypothesis, so that a failure is shrunk to its smallest form and can be repeated.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import struct
import zipfile

import numpy as np
from hypothesis import strategies as st

# Stand in a document as text, and are replaced by what a JSON writer could not write.
MARKS = {
    "@deep-list@": "[" * 20_000 + "]" * 20_000,
    "@deep-object@": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@huge-integer@": "9" * 5_000,
    "@huge-exponent@": "1e999",
    "@surrogate@": '"\\ud800"',
    "@duplicate@": '1, "prompt": 2, "prompt": [3], "code": 4, "settings": 5, "x": 6',
}
YAML_MARKS = {
    "@tag@": '!!python/object/apply:os.system ["touch escaped"]',
    "@timestamp@": "!!timestamp never",
    "@bool@": "!!bool perhaps",
    "@int@": '!!int ""',
    "@float@": '!!float ""',
    "@hex@": "0x" + "f" * 6_000,
    "@cycle@": "&cycle [*cycle]",
    "@merge@": "{<<: [1, 2]}",
    "@laughs@": "[&a0 [x,x,x,x,x,x,x,x], "
    + ", ".join(f"&a{k + 1} [{','.join([f'*a{k}'] * 8)}]" for k in range(12))
    + "]",
    "@set@": "!!set {a, b}",
    "@binary@": "!!binary AAAA",
    "@date@": "2001-99-99",
    "@key@": "{? [a, b] : c}",
}
STRINGS = (
    "", " ", "\0", "a\nb", "../../../etc/passwd", "/etc/passwd", "..\\x", "a" * 10_000, "é" * 300, "\x1b[31m",
    "</script><script>", "{{DATA}}", "%s{0}", "None", "nan", "(", "(a{999999999999})", "forward", "a.b", "conv_in",
    "=1+1", "\u2028",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 3, 8, 16, 17, 255, 10**6, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, float("nan"))
SCALARS = (None, True, False, *NUMBERS, float("inf"), *STRINGS, *MARKS)
NESTED = ([], {}, [[]], [None], {"": None}, {"x": {}}, [1, 2, 3], ["a", "b"], {"a": 1}, [{"prompt": "x"}])


def junk(*more) -> st.SearchStrategy:
    """Values of every JSON type, and `more`."""
    return st.one_of(
        st.sampled_from([*SCALARS, *more]),
        st.sampled_from(NESTED).map(copy.deepcopy),
        st.integers(),
        st.text(max_size=9),
    )


# ------------------------------------------------------------------------------------------------ documents


def places(value, path=()) -> list[tuple]:
    """Paths of everything inside a document, itself first."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, one in below for deeper in places(one, (*path, key)))]


def at(value, path):
    for key in path:
        value = value[key]
    return value


def edited(draw, value, more=()):
    """The document with one change."""
    path = draw(st.sampled_from(places(value)))
    kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "wrap", "move", "rename", "add", "repeat"]))
    new = draw(junk(*more))
    if not path:
        return new if kind == "replace" else [value] if kind == "wrap" else value
    parent, key = at(value, path[:-1]), path[-1]
    if kind == "delete":
        del parent[key]
    elif kind == "wrap":
        parent[key] = [parent[key]]
    elif kind == "move":
        parent[key] = copy.deepcopy(at(value, draw(st.sampled_from(places(value)))))
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(STRINGS))] = parent.pop(key)
    elif kind == "add" and isinstance(parent, dict):
        parent[draw(st.text(max_size=5))] = new
    elif kind == "repeat" and isinstance(parent, list):
        parent.extend([copy.deepcopy(parent[key])] * 200)
    else:
        parent[key] = new
    return value


def broken_value(draw, value, more=(), most=3):
    """The document after up to `most` changes."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        value = edited(draw, value, more)
    return value


def text_of(value, marks=MARKS) -> str:
    """JSON text in which marks have become what they stand for."""
    text = json.dumps(value)
    for mark, meaning in marks.items():
        text = text.replace(json.dumps(mark), meaning)
    return text


def broken_json(draw, value) -> bytes:
    """A JSON document with changes in its structure, its bytes, or both."""
    data = text_of(broken_value(draw, value)).encode()
    return broken_bytes(draw, data) if draw(st.integers(0, 3)) == 0 else data


def broken_yaml(draw, value) -> bytes:
    """A YAML document of the same kind."""
    data = text_of(broken_value(draw, value, YAML_MARKS), MARKS | YAML_MARKS).encode()
    return broken_bytes(draw, data) if draw(st.integers(0, 3)) == 0 else data


def broken_lines(draw, rows: list) -> bytes:
    """JSON lines, some of them changed."""
    victims = draw(st.sets(st.integers(0, len(rows) - 1), min_size=1, max_size=2))
    lines = [text_of(broken_value(draw, row)) if k in victims else json.dumps(row) for k, row in enumerate(rows)]
    data = "\n".join(lines).encode()
    return broken_bytes(draw, data) if draw(st.integers(0, 3)) == 0 else data


# ------------------------------------------------------------------------------------------------ bytes and tables


def broken_bytes(draw, data: bytes) -> bytes:
    """Bytes cut off, flipped, inserted, removed or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 64)))
        piece = draw(
            st.one_of(st.sampled_from([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"[", b"\r"]), st.binary(max_size=9))
        )
        kind = draw(st.sampled_from(["cut", "insert", "remove", "repeat", "overwrite"]))
        if kind == "cut":
            data = data[:start]
        elif kind == "insert":
            data = data[:start] + piece + data[start:]
        elif kind == "remove":
            data = data[:start] + data[stop:]
        elif kind == "repeat":
            data = data[:stop] + data[start:stop] * 50 + data[stop:]
        else:
            data = data[:start] + piece + data[start + len(piece) :]
    return data


def broken_table(draw, delimiter: str) -> bytes:
    """A CSV file: odd headers and cells, more or fewer cells than columns, or more columns than anyone has."""
    cell = st.one_of(
        st.sampled_from([text for text in STRINGS if "\ud800" not in text]), st.integers().map(str), st.text(max_size=6)
    )
    names = st.lists(st.one_of(st.sampled_from(["prompt", "Caption", "id", "seed", "height", ""]), cell), max_size=5)
    header = draw(names)
    if draw(st.integers(0, 29)) == 0:
        header = ["prompt", *(f"c{k}" for k in range(100_000))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerow(header)
    writer.writerows(draw(st.lists(st.lists(cell, max_size=6), max_size=6)) * draw(st.sampled_from([1, 1, 1, 100])))
    data = buffer.getvalue().encode("utf-8", "surrogatepass")
    return broken_bytes(draw, data) if draw(st.booleans()) else data


# ------------------------------------------------------------------------------------------------ tensors and archives


def broken_safetensors(draw, data: bytes) -> bytes:
    """A safetensors file whose header lies, or whose bytes are damaged."""
    size = struct.unpack("<Q", data[:8])[0]
    kind = draw(st.sampled_from(["header", "header", "header", "length", "bytes"]))
    if kind == "bytes":
        return broken_bytes(draw, data)
    if kind == "length":
        lie = draw(st.sampled_from([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1]))
        return struct.pack("<Q", lie) + data[8:]
    more = ("F32", "F16", "BF16", "U8", "I8", "I64", "BOOL", "F4", [2**40], [2**40, 2**40], [-1], [0], [0, 8], [8, 0])
    header = text_of(broken_value(draw, json.loads(data[8 : 8 + size]), more)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def lying_npy(dtype: str, shape: tuple) -> bytes:
    """The header of an array that is not there."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def broken_npz(draw, arrays: dict[str, np.ndarray]) -> bytes:
    """An .npz with members of other shapes, types or sizes, or damaged bytes."""
    odd = st.sampled_from(
        [
            np.zeros(()), np.zeros(0), np.zeros((2, 3)), np.zeros((0, 0)), np.array("text"), np.array([1, "a"], object),
            np.array([np.nan]), np.full((4, 4), np.nan), np.full((4, 4), np.inf), np.zeros(4, complex),
            np.zeros(3, "i8"), np.zeros(4, [("a", "f4")]), np.array([b"x"]), np.array(2**62),
            np.array(-1), np.array("2020", "M8[Y]"),
        ]
    )  # fmt: skip
    lies = st.sampled_from(
        [
            ("<f8", (10**6, 10**6)),
            ("<f8", (2**40,)),
            ("<f8", (-1,)),
            ("<U1000000000", (9,)),
            ("|O", (3,)),
            ("<f8", (2**70,)),
        ]
    )
    members = {name: npy(array) for name, array in arrays.items()}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*members, "new"]) if members else st.just("mu"))
        kind = draw(st.sampled_from(["odd", "odd", "lie", "bytes", "drop", "bomb"]))
        if kind == "drop":
            members.pop(name, None)
        elif kind == "bomb":
            members[name] = lying_npy("<f8", (2**22,)) + bytes(2**25)
        elif kind == "bytes":
            members[name] = broken_bytes(draw, members.get(name, b""))
        else:
            members[name] = npy(draw(odd)) if kind == "odd" else lying_npy(*draw(lies))
    data = zipped({f"{name}.npy": content for name, content in members.items()})
    return broken_bytes(draw, data) if draw(st.booleans()) else data


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()
