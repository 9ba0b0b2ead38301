"""Prompt files as people have them: each is read as meant, read with a line in the log, or refused with what to do."""

import logging
from pathlib import Path

import pytest

from vqdm.errors import UserError
from vqdm.prompts import load_prompts, load_rows

CASES = Path(__file__).parent / "cases" / "prompts"


def read(path, caplog) -> tuple[list[dict] | str, list[str]]:
    """Rows, or the text of the refusal; and the lines of the log."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="vqdm"):
        try:
            rows = load_rows(str(path), "PROMPTS")
        except UserError as error:
            rows = str(error)
    return rows, [record.getMessage() for record in caplog.records]


def check(path, expected, words, caplog):
    rows, lines = read(path, caplog)
    if isinstance(expected, str):
        assert isinstance(rows, str), rows
        assert rows.startswith(f"PROMPTS: {path}") and "\n" not in rows
        assert all(word in rows for word in (expected, *words)), rows
    else:
        assert [row["prompt"] for row in rows] == expected, rows
        assert len(lines) == bool(words), lines
        assert all(word in lines[0] for word in words), lines


@pytest.mark.parametrize(
    ("name", "expected", "words"),
    [
        ("unquoted.csv", "line 2 has 3 cells, but the header has 2", ["double quotes"]),
        ("unclosed.csv", "line 2: a double quote is opened and never closed", ["close it"]),
        (
            "tsv_quotes.tsv",
            ['sign that says "hello"', '"hello" on a sign', '5" disk', '"unbalanced', "a blue star"],
            [],
        ),
        ("trail.jsonl", "line 3, column 11: Unterminated string", ["cut off"]),
        ("utf16.csv", ["a red circle"], ["separated by a tab"]),
        ("utf16.txt", ["a red circle", "a blue star"], []),
        ("cp1252.csv", "line 2: byte 0x93 is not UTF-8; save it as UTF-8", []),
        ("latin1.txt", "line 1: byte 0xe4 is not UTF-8; save it as UTF-8", []),
    ],
)
def test_cases_from_reports(name, expected, words, caplog):
    check(CASES / name, expected, words, caplog)


TWO = ["a red circle", "a blue star"]
# Suffix, content, the prompts or a part of the refusal, and what the line in the log (or the refusal) says besides.
FILES = {
    # --- separators
    "european Excel": ("csv", "prompt;id\na red circle, big;1\n", ["a red circle, big"], ["a semicolon"]),
    "Excel's sep=": ("csv", "sep=;\r\nid;prompt\r\n1;a red circle\r\n", TWO[:1], []),
    "bars": ("csv", "id|prompt\n1|a red circle\n", TWO[:1], ["a bar"]),
    "tsv with commas": ("tsv", 'id,prompt\n1,"a red circle"\n', TWO[:1], ["a comma"]),
    "blanks behind commas": ("csv", 'id, prompt\n1, "a red, big circle"\n', ["a red, big circle"], []),
    "one column, commas": ("csv", "prompt\na red circle, big\n", "line 2 has 2 cells", ["a comma"]),
    "spreadsheet tail": ("csv", "prompt,id,,\na red circle,1,,\n,,,\n,,,\n", TWO[:1], []),
    "tsv, too many cells": ("tsv", "prompt\tid\na red\tcircle\t1\n", "line 2 has 3 cells", ["header has 2"]),
    "pandas index": ("csv", ",prompt\n0,a red circle\n1,a blue star\n", TWO, []),
    # --- quotes
    "words behind a quote": ("csv", 'id,prompt\n1,"hello" on a sign\n', "line 2: text follows", ["twice"]),
    "backslashes": ("csv", 'prompt\n"sign \\"hello\\""\n', "line 2: text follows", ["twice"]),
    "quote closed lines later": ("csv", 'id,prompt\n1,"a red\n2,"b"\n', "line 2: a double quote is opened", ["line 3"]),
    "inches": ("csv", 'id,prompt\n1,5" disk\n', ['5" disk'], []),
    "lines in a cell": ("csv", 'prompt\n"a red\ncircle"\n', ["a red\ncircle"], ["several lines", "line 2"]),
    "swallowed rows": ("csv", 'id,prompt\n1,"a red\n2,a blue\n3,"\n', ["a red\n2,a blue\n3,"], ["several lines"]),
    "tsv, all quoted": ("tsv", '"id"\t"prompt"\n"1"\t"a ""red"" circle"\n', ['a "red" circle'], ["taken off"]),
    "tsv, some quoted": ("tsv", 'prompt\n"a ""red"" one"\na blue star\n', ['a "red" one', TWO[1]], ["taken off"]),
    "tsv, a quoted sign": ("tsv", 'prompt\n"hello"\na blue star\n', ['"hello"', TWO[1]], []),
    "tsv, a cell of two lines": (
        "tsv",
        'id\tprompt\n1\t"a red\ncircle"\n',
        ['"a red'],
        ["line 2 opens", "line 3 may close", "1 of 2 rows without a prompt"],
    ),
    # --- headers
    "case and blanks": ("csv", " Prompt , ID\na red circle,1\n", TWO[:1], []),
    "no header": ("csv", "a red circle\na blue star\n", "no column named prompt", ["first line must name"]),
    "header below blank lines": ("csv", "\n\nprompt\na red circle\n", TWO[:1], []),
    "two captions": ("csv", "caption,text\na red circle,x\n", TWO[:1], ["column caption, not from text"]),
    "a name twice": ("csv", "prompt,id,prompt\na,1,b\n", "its header has two columns of one name", ["rename"]),
    "a name twice but for case": ("csv", "Prompt,prompt\na,b\n", "its header has two columns of one name", ["Prompt"]),
    "plural": ("csv", "prompts\na red circle\n", TWO[:1], []),
    "byte order mark": ("csv", "\ufeffprompt\na red circle\n", TWO[:1], []),
    "joined tables": (
        "csv",
        "id,prompt\n1,a red circle\n\ufeffid,prompt\nid, prompt,\n2,a blue star\n",
        TWO,
        ["2 of 4 rows repeat the header", "line 3"],
    ),
    "joined tables, tsv": ("tsv", "prompt\na red circle\nprompt\na blue star\n", TWO, ["1 of 3 rows repeat", "line 3"]),
    # --- rows
    "several missing values": ("csv", "prompt\nnan\na\nNone\n", ["nan", "a", "None"], ["2 of 3", "'nan' or 'None'"]),
    "short rows": ("csv", "prompt,id,n\na red circle,1,2\na blue star\n", TWO, ["1 of 2 rows have fewer", "line 3"]),
    "short rows, tsv": ("tsv", "prompt\tid\na red circle\na blue star\n", TWO, ["2 of 2 rows have fewer", "line 2"]),
    "lists in cells": (
        "csv",
        "prompt\na\n\"['a', 'b']\"\n[art] a\n",
        ["a", "['a', 'b']", "[art] a"],
        ["1 of 3", "list"],
    ),
    "no prompt": ("csv", "id,prompt\n1,\n2,a red circle\n3\n", TWO[:1], ["2 of 3 rows without a prompt", "line 2"]),
    "empty row": ("csv", "prompt\na red circle\n\n  \na blue star\n", TWO, ["2 of 4 rows", "line 3"]),
    "missing values as text": ("csv", "prompt\nnan\na red circle\n", ["nan", TWO[0]], ["read as the prompt 'nan'"]),
    "only a header": ("csv", "prompt\n", "holds no prompt", []),
    # --- line ends and encodings
    "old Mac": ("csv", "prompt,id\ra red circle,1\ra blue star,2\r", TWO, []),
    "mixed line ends": ("txt", "a red circle\r\na blue star\r", TWO, []),
    "utf-16 big end": ("txt", "\ufeffa red circle\n".encode("utf-16-be"), TWO[:1], []),
    "utf-32": ("txt", "a red circle\n".encode("utf-32"), TWO[:1], []),
    "utf-16 json": ("json", '["a red circle"]'.encode("utf-16"), TWO[:1], []),
    "utf-16 without a mark": ("txt", "a\nb\n".encode("utf-16-le"), "line 1 holds a NUL byte", ["save it as UTF-8"]),
    "NUL byte": ("csv", b"prompt\na red circle\na \0 star\n", "line 3 holds a NUL byte", ["save it as UTF-8"]),
    "cut utf-16": ("txt", "a red\n".encode("utf-16") + b"a", "line 2: it is cut UTF-16", []),
    "joined files": ("txt", "a red circle\n\ufeffa blue star\n", TWO, []),
    "latin-1 json": ("json", '["a",\n"é"]'.encode("latin-1"), "line 2: byte 0xe9", ["save it as UTF-8"]),
    "latin-1 yaml": ("yaml", "- a\n- é\n".encode("latin-1"), "line 2: byte 0xe9", ["save it as UTF-8"]),
    "cp1252 Mac": ("csv", b"prompt\ra red circle\r\x93a\x94\r", "line 3: byte 0x93", ["save it as UTF-8"]),
    "gzip": ("csv", b"\x1f\x8b\x08\0", "it is a gzip file; unpack it", []),
    "a spreadsheet": ("csv", b"PK\x03\x04\x14\0", "a spreadsheet", ["save it as UTF-8"]),
    "Parquet by another name": ("csv", b"PAR1\x15", "it is a Parquet file", ["rename"]),
    # --- text
    "characters lost": (
        "txt",
        "a caf\ufffd\na blue star\n",
        ["a caf\ufffd", TWO[1]],
        ["1 of 2 rows hold", "U+FFFD in line 1"],
    ),
    "colours of a terminal": (
        "txt",
        "a\n\x1b[31mb\n",
        ["a", "\x1b[31mb"],
        ["1 of 2 rows hold control", "U+001B in line 2"],
    ),
    "end of a DOS file": ("csv", "prompt\r\na red circle\r\n\x1a", TWO[:1], ["1 of 2 rows without a prompt", "line 3"]),
    "no visible character": ("txt", "a red circle\n\u200b\n", TWO[:1], []),
    "objects as text": (
        "txt",
        '{"prompt": "a"}\n{b}\n',
        ['{"prompt": "a"}', "{b}"],
        ["1 of 2 rows look like JSON", "line 1"],
    ),
    "quotes around lines": (
        "txt",
        '"a"\n\n"b"\n',
        ['"a"', '"b"'],
        ["all prompts are in double quotes", "part of them"],
    ),
    "some quotes": ("txt", '"a"\nb\n', ['"a"', "b"], []),
    "blank lines": ("txt", "a red circle\n\n \na blue star\n\n", TWO, ["2 of 4 rows without a prompt", "line 2"]),
    "comments": ("txt", "# colours\na red circle\n", ["# colours", TWO[0]], ["1 of 2 rows begin with #", "line 1"]),
    "a table as text": ("txt", "id,prompt\n1,a\n", ["id,prompt", "1,a"], ["looks like the header"]),
    # --- json
    "numbers": ("json", '["a", 5]', "row 2 is 5, a number", ["expected strings or objects"]),
    "number as a prompt": ("json", '[{"prompt": "a"}, {"prompt": 5}]', "row 2: its prompt is 5", ["quotes"]),
    "nulls": ("json", '["a red circle", null, {"prompt": null}]', TWO[:1], ["2 of 3 rows", "row 2"]),
    "nested lists": ("json", '[["a", "b"]]', "row 1 is ['a', 'b'], a list", []),
    "objects without a prompt": ("json", '[{"prompt": "a red circle"}, {"id": 3}]', TWO[:1], ["1 of 2 rows", "row 2"]),
    "unknown keys": ("json", '["a", {"words": "b"}]', "row 2: no column named prompt", ["its columns are words"]),
    "unknown keys in lines": ("jsonl", '"a"\n{"words": "b"}', "line 2: no column named prompt", ["are words"]),
    "texts and objects": ("json", '["a red circle", {"prompt": "a blue star"}]', TWO, []),
    "columns by turns": ("json", '[{"prompt": "a red circle"}, {"caption": "a blue star"}]', TWO, ["caption (1 rows)"]),
    "a key twice": (
        "json",
        '[{"prompt": "a"},\n{"prompt": "a", "prompt": "b"}]',
        "line 2: an object names 'prompt' twice",
        [],
    ),
    "a key twice, deep": (
        "json",
        '[{"prompt": "a",\n"x": [\n{"y": 1,\n"y": 2}]}]',
        "line 3: an object names 'y' twice",
        [],
    ),
    "a key twice in lines": (
        "jsonl",
        '"a"\n{"text": "a", "text": "b"}',
        "line 2: an object names 'text' twice",
        ["leave"],
    ),
    "a comma too many": (
        "json",
        '["a",\n"b",\n]',
        "line 3, column 1: Expecting value",
        ["take out the comma before it"],
    ),
    "a comma too many, object": (
        "jsonl",
        '"a"\n{"prompt": "b",}',
        "line 2, column 16",
        ["take out the comma before it"],
    ),
    "commas between lines": (
        "jsonl",
        '{"prompt": "a"},\n{"prompt": "b"}',
        "line 1, column 16",
        ["each line", "nothing else"],
    ),
    "objects of several lines": (
        "jsonl",
        '{\n"prompt": "a"\n}\n{\n"prompt": "b"\n}',
        "line 1",
        ["one whole JSON value"],
    ),
    "joined lines": ("jsonl", '{"prompt": "a red circle"}\n\ufeff{"prompt": "a blue star"}\n', TWO, []),
    "two cases of a key": ("json", '[{"prompt": "a", "Prompt": "b"}]', "row 1 has two columns of one name", []),
    "prompts: [...]": ("json", '{"prompts": ["a red circle", "a blue star"], "n": 2}', TWO, ["left out", "n"]),
    "prompts: [{...}]": ("json", '{"prompts": [{"text": "a red circle"}]}', TWO[:1], []),
    "columns of two lengths": ("json", '{"prompt": ["a", "b"], "seed": [1]}', "list seed has 1 entries", ["has 2"]),
    "a single object": ("json", '{"prompt": "a", "negative_prompt": "b"}', "a single object", ["into a list"]),
    "lines in .json": (
        "json",
        '{"prompt": "a red circle"}\n{"prompt": "a blue star"}\n',
        TWO,
        ["one JSON value per line"],
    ),
    "one value in .jsonl": ("jsonl", '[\n"a red circle",\n"a blue star"\n]', TWO, ["one JSON value"]),
    "lists in lines": ("jsonl", '"a"\n["b"]\n', "line 2 is ['b'], a list", []),
    "json, cut off": ("json", '["a",\n"b', "line 2, column 1: Unterminated string", ["cut off"]),
    "single quotes": ("jsonl", '{"prompt": "a"}\n{\'prompt\': "b"}\n', "line 2, column 2", ["not JSON"]),
    # --- what is no character
    "NUL in json": ("json", '["a", "a\\u0000b"]', "row 2: its prompt holds a NUL character (\\u0000)", ["take it out"]),
    "half a pair in json": (
        "json",
        '["\\ud800"]',
        "row 1: its prompt holds half a surrogate pair (\\ud800)",
        ["write"],
    ),
    "NUL in lines": ("jsonl", '{"prompt": "a\\u0000"}', "line 1: its prompt holds a NUL", []),
    "NUL in yaml": ("yaml", '- "a\\0b"', "row 1: its prompt holds a NUL", []),
    "half a pair in yaml": ("yaml", '- "\\udfff"', "row 1: its prompt holds half a surrogate pair (\\udfff)", []),
    "other texts": ("json", '[{"prompt": "a", "negative_prompt": "\\u0000"}]', "its negative_prompt holds a NUL", []),
    "texts in lists": ("json", '[{"prompt": "a", "tags": ["\\ud83d"]}]', "its tags holds half a surrogate pair", []),
    "names": ("json", '[{"prompt": "a", "x\\u0000": 1}]', "holds a NUL", []),
    "whole pairs and backslashes": ("json", r'["\ud83d\ude00 \\u0000"]', ["\U0001f600 \\u0000"], []),
    # --- yaml
    "yaml booleans": ("yaml", "- a red circle\n- no\n", "row 2 is true or false", ["expected strings", "in quotes"]),
    "yaml numbers": ("yaml", "- prompt: 1999\n", "row 1: its prompt is 1999, a number", ["quotes"]),
    "yaml dates": ("yaml", "- prompt: 2024-05-01\n", "row 1: its prompt is 2024-05-01, a date", ["quotes"]),
    "yaml colon": ("yaml", "- a\n- a sign: hello\n", "row 2 has only the key 'a sign'; put the prompt in quotes", []),
    "yaml colon in a prompt": ("yaml", "- prompt: a sign: hello\n", "line 1: mapping values", ["colon in quotes"]),
    "yaml colons": ("yaml", "- prompt: a\n- {sign: 1, b: 2}\n", "row 2 has only the keys 'sign', 'b'; put the", []),
    "yaml colon, named": ("yaml", "x:\n  sign: open\n", "row 1 has only the key 'sign'", ["quotes"]),
    "yaml colon in a list": ("yaml", "prompts:\n- a\n- sign: open\n", "row 2 has only the key 'sign'", ["quotes"]),
    "yaml key twice": ("yaml", "x: a\ny: b\nx: c\n", "line 3: 'x' appears twice", []),
    "yaml tabs": ("yaml", "- prompt: a\n\t id: 3\n", "line 2", []),
    "yaml open list": ("yaml", "- a\n- [b\n", "line 3", []),
    "yaml documents": ("yaml", "- a\n---\n- b\n", "line 2", []),
    "yaml named": ("yaml", "x: a red circle\ny:\n", TWO[:1], ["1 of 2 rows", "row 2"]),
    "yaml prompts": ("yaml", "Prompts:\n- a red circle\n- a blue star\n", TWO, []),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_people_have(tmp_path, name, caplog):
    suffix, content, expected, words = FILES[name]
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check(path, expected, words, caplog)


PARQUET = {
    "nulls": ({"prompt": ["a red circle", None, " "]}, TWO[:1], ["2 of 3 rows", "row 2"]),
    "lists": ({"captions": [["a", "b"]]}, "its column captions holds list<", ["expected text"]),
    "bytes": ({"prompt": [b"a"]}, "its column prompt holds binary", []),
    "NUL": ({"prompt": ["a", "a\0b"]}, "row 2: its prompt holds a NUL character", ["take it out"]),
    "numbers": ({"prompt": [5]}, "row 1: its prompt is 5", ["quotes"]),
    "images beside": ({"prompt": TWO, "image": [b"x", b"y"]}, TWO, ["columns left out: image (binary)"]),
    "other names": ({"words": ["a"]}, "no column named prompt", ["its columns are words"]),
}


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_files_that_people_have(tmp_path, name, caplog):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns, expected, words = PARQUET[name]
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    check(tmp_path / "p.parquet", expected, words, caplog)


def test_categories_of_a_parquet_file_are_text(tmp_path, caplog):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(TWO).dictionary_encode()
    parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "p.parquet")
    check(tmp_path / "p.parquet", TWO, [], caplog)


def test_columns_that_only_generate_reads_are_named(tmp_path, caplog):
    (tmp_path / "p.csv").write_text("prompt,Seed,height,note\na,1,,x\n")
    with caplog.at_level(logging.INFO, logger="vqdm"):
        assert load_prompts(str(tmp_path / "p.csv"), "CALIBRATION_PROMPTS") == ["a"]
    assert [record.getMessage().partition(".csv: ")[2] for record in caplog.records] == [
        "columns that only generate.py uses: seed"
    ]


@pytest.mark.parametrize("row", ["a red circle, big", "a red circle, 5, big"])
def test_a_comma_that_moves_the_rest_of_a_prompt_into_a_column_of_numbers_is_named(tmp_path, row):
    (tmp_path / "p.csv").write_text(f"prompt,seed,Guidance Scale\na blue star,1,7.5\n{row}\n")
    with pytest.raises(UserError, match=r"^PROMPTS: .*p\.csv: line 3: its .* is 'big', text; .*double quotes$"):
        load_prompts(str(tmp_path / "p.csv"), "PROMPTS")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder; give a prompt file"):
        load_rows(str(tmp_path), "PROMPTS")


def test_one_process_of_several_logs(tmp_path, caplog, monkeypatch):
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    monkeypatch.setenv("RANK", "1")
    assert read(tmp_path / "p.txt", caplog)[1] == []
