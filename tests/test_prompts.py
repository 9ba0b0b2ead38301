import json

import pytest

from vqdm.errors import UserError
from vqdm.prompts import choose, default_file, load_prompts, load_rows

PROMPTS = ["a red circle", 'a "blue" star, small', "ein grüner Stern"]


def write(path, kind: str) -> str:
    """The three prompts as a file of one kind."""
    file = path / f"prompts.{kind}"
    quoted = [f'"{prompt.replace(chr(34), chr(34) * 2)}"' for prompt in PROMPTS]
    texts = {
        "txt": "\n".join(PROMPTS) + "\n\n",
        "csv": "id,Caption\r\n" + "".join(f"{i},{prompt}\r\n" for i, prompt in enumerate(quoted)),
        "tsv": "text\tid\n" + "".join(f"{prompt}\t{i}\n" for i, prompt in enumerate(quoted)),
        "json": json.dumps({"captions": PROMPTS}),
        "jsonl": "".join(json.dumps({"id": 1, "prompt": prompt}) + "\n" for prompt in PROMPTS),
        "yaml": "".join(f"- prompt: {json.dumps(prompt)}\n" for prompt in PROMPTS),
    }
    if kind == "parquet":
        table = pytest.importorskip("pyarrow").table({"id": [1, 2, 3], "prompt": PROMPTS})
        pytest.importorskip("pyarrow.parquet").write_table(table, file)
    else:
        file.write_bytes(texts[kind].encode())
    return str(file)


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "json", "jsonl", "yaml", "parquet"])
def test_every_kind_reads_the_same(tmp_path, kind):
    assert load_prompts(write(tmp_path, kind), "PROMPTS") == PROMPTS


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_prompt_of_a_text_file_ends_with_its_line_only(tmp_path, end):
    """Other separators, which str.splitlines knows, stand inside prompts that were copied from elsewhere."""
    prompts = ["a red\u2028circle", "a\x0bblue\x85star", "a heart"]
    (tmp_path / "p.txt").write_bytes(end.join(["\ufeff" + prompts[0], "", *prompts[1:], ""]).encode())
    assert load_prompts(str(tmp_path / "p.txt"), "PROMPTS") == prompts


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_keep_the_other_columns(tmp_path, kind):
    rows = load_rows(write(tmp_path, kind), "PROMPTS")
    assert [row["prompt"] for row in rows] == PROMPTS
    ids = {"csv": "012", "tsv": "012", "jsonl": [1, 1, 1], "parquet": [1, 2, 3]}[kind]
    assert [row["id"] for row in rows] == list(ids)
    assert all(row.keys() == {"prompt", "id"} for row in rows)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('["a", "b"]', [{"prompt": "a"}, {"prompt": "b"}]),
        ('{"x": "a", "y": "b"}', [{"id": "x", "prompt": "a"}, {"id": "y", "prompt": "b"}]),
        ('{"x": {"prompt": "a", "kind": 1}}', [{"id": "x", "prompt": "a", "kind": 1}]),
        ('{"caption": ["a", " "], "seed": [1, 2], "note": "z"}', [{"prompt": "a", "seed": 1}]),
        ('[{"text": "t", "Caption": "c"}]', [{"prompt": "c", "text": "t"}]),
    ],
)
def test_rows_of_json(tmp_path, text, rows):
    (tmp_path / "p.json").write_text(text)
    assert load_rows(str(tmp_path / "p.json"), "PROMPTS") == rows


def test_choice_is_seeded_and_without_replacement():
    prompts = [str(i) for i in range(50)]
    first = choose(prompts, 20, 0, "file", "--n")
    assert first == choose(prompts, 20, 0, "file", "--n") != choose(prompts, 20, 1, "file", "--n")
    assert len(set(first)) == 20
    assert choose(prompts, 0, 0, "file", "--n") == prompts
    with pytest.raises(UserError, match=r"--n is 51, but file holds 50 prompts; give 50, or 0 for all$"):
        choose(prompts, 51, 0, "file", "--n", zero_is_offered=True)
    with pytest.raises(UserError, match=r"--n is 51, but file holds 50 prompts; give 50 or fewer$"):
        choose(prompts, 51, 0, "file", "--n")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "is not found"),
        ("empty.txt", b"\n  \n", "holds no prompt"),
        ("empty.csv", b"", "the file is empty"),
        ("empty.json", b"\n", "the file is empty"),
        ("empty.jsonl", b"", "the file is empty"),
        ("empty.tsv", b"\n\n", "the file is empty"),
        ("empty.yaml", b" ", "the file is empty"),
        ("comment.yaml", b"# later", "it holds nothing; expected a list"),
        ("wrong.csv", b"id,words\n1,a\n", "its columns are id, words"),
        ("bad.json", b"{", "cannot be read"),
        ("number.json", b"3", "it holds 3, a number; expected a list"),
        ("text.json", b'"a star"', "it holds 'a star', text; expected a list, .*another"),
        ("text.yaml", b"a star\na circle", 'text; expected a list, each prompt on a line of its own behind "- "'),
        ("numbers.json", b"[1, 2]", "expected strings or objects"),
        ("bad.yaml", b"a: [", "cannot be read"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read"),
        ("bad.parquet", b"not parquet", "cannot be read"),
        ("prompts.docx", b"x", "allowed are .txt .csv"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_prompts(str(path), "CALIBRATION_PROMPTS")
    assert "CALIBRATION_PROMPTS" in str(caught.value) and name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_data_set_that_cannot_be_had_is_named():
    with pytest.raises(UserError, match="CALIBRATION_PROMPTS: no-such-owner/no-such-set"):
        load_prompts("no-such-owner/no-such-set", "CALIBRATION_PROMPTS")


@pytest.mark.parametrize(("kind", "count"), [("calibration", 256), ("evaluation", 64)])
def test_prompts_that_ship_are_the_first_of_the_repositorys_files(kind, count):
    """Which are in turn from many categories, and share no scene."""
    shipped = load_prompts(default_file(kind), "PROMPTS")
    assert shipped == load_prompts(f"prompts/{kind}.csv", "PROMPTS")[:count] and len(set(shipped)) == count
