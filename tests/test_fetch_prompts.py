"""Published prompts from small local copies in the form in which each is published."""

import csv
import json
import sys
import zipfile
from pathlib import Path

import pytest

from vqdm.errors import UserError
from vqdm.prompts import load_rows

sys.path.insert(0, "scripts")
import fetch_prompts

CAPTIONS = {
    "images": [{"id": 900, "file_name": "COCO_val2014_000000000900.jpg"}],
    "annotations": [
        {"id": 31, "image_id": 900, "caption": "A later caption."},
        {"id": 12, "image_id": 900, "caption": "Two dogs\n on a  bench. "},
        {"id": 20, "image_id": 42, "caption": 'A bowl, blue and "round".'},
    ],
}


def fetch(folder: Path, name: str, source: Path, *flags: str) -> list[dict]:
    """What the programs read in the file that was written."""
    target = folder / "new" / "prompts.csv"
    fetch_prompts.main([name, str(target), "--source", str(source), *flags])
    return load_rows(str(target), "PROMPTS")


def written(path: Path, value) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture
def mjhq(tmp_path) -> Path:
    rows = {f"{k:04x}": {"category": "animals", "prompt": f"a cat with {k} hats"} for k in range(40)}
    return written(tmp_path / "meta_data.json", rows)


def test_coco_keeps_the_first_caption_of_each_picture(tmp_path):
    rows = fetch(tmp_path, "coco", written(tmp_path / "captions_val2014.json", CAPTIONS))
    assert rows == [
        {"prompt": 'A bowl, blue and "round".', "id": "42"},
        {"prompt": "Two dogs on a bench.", "id": "900"},
    ]


def test_coco_from_the_zip_of_annotations_takes_the_validation_captions(tmp_path):
    path, other = tmp_path / "annotations.zip", {"annotations": [{"id": 1, "image_id": 7, "caption": "training"}]}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("annotations/captions_val2014.json", json.dumps(CAPTIONS))
        archive.writestr("annotations/captions_train2014.json", json.dumps(other))
        archive.writestr("annotations/instances_val2014.json", "{}")
    assert [row["id"] for row in fetch(tmp_path, "coco", path)] == ["42", "900"]


def test_coco_from_a_table(tmp_path):
    named = written(tmp_path / "captions.csv", "image_id,text\n8,first\n8,second\n3,third\n")
    numbered = written(tmp_path / "captions.tsv", "id\timage_id\tcaption\n5\t8\tfirst\n6\t8\tsecond\n7\t3\tthird\n")
    for table in (named, numbered):
        assert [row["prompt"] for row in fetch(tmp_path, "coco", table)] == ["third", "first"]


def test_coco_captions_of_parquet_files(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, names in enumerate((["a", "b"], ["c"])):
        table = pyarrow.table({"image": [b"x"] * len(names), "caption": names})
        parquet.write_table(table, tmp_path / f"part-{number}.parquet")
    rows = fetch_prompts.captions_of(fsspec.filesystem("file"), f"{tmp_path}/*.parquet")
    assert [(row["id"], row["prompt"]) for row in rows] == [(0, "a"), (1, "b"), (2, "c")]


def test_parti_keeps_its_categories(tmp_path):
    text = 'Prompt\tCategory\tChallenge\tNote\na gray "cat"\tAnimals\tBasic\t\nbond\tAbstract\tBasic\tone word\n'
    rows = fetch(tmp_path, "parti", written(tmp_path / "PartiPrompts.tsv", text))
    assert rows[1] == {"prompt": "bond", "category": "Abstract", "challenge": "Basic", "note": "one word"}


def test_mjhq_keeps_ids(tmp_path, mjhq):
    rows = fetch(tmp_path, "mjhq", mjhq)
    assert len(rows) == 40 and rows[10] == {"prompt": "a cat with 10 hats", "id": "000a", "category": "animals"}


def test_sdci_keeps_the_names_of_images(tmp_path):
    text = 'sa_100: "A bench, painted: green."\nsa_7: a dog\n  beside a wall\n"042": "2"\n'
    rows = fetch(tmp_path, "sdci", written(tmp_path / "sDCI.yaml", text))
    assert [row["id"] for row in rows] == ["sa_100", "sa_7", "042"]
    assert [row["prompt"] for row in rows] == ["A bench, painted: green.", "a dog beside a wall", "2"]


def test_a_draw_is_repeatable_ordered_and_without_replacement(tmp_path, mjhq):
    first, again = (fetch(tmp_path, "mjhq", mjhq, "--count", "20", "--seed", "3") for _ in range(2))
    other = fetch(tmp_path, "mjhq", mjhq, "--count", "20", "--seed", "4")
    names = [row["id"] for row in first]
    assert first == again != other and names == sorted(set(names)) and len(names) == 20


def test_the_file_is_plain_csv(tmp_path, mjhq):
    fetch(tmp_path, "mjhq", mjhq)
    with open(tmp_path / "new" / "prompts.csv", newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["id", "prompt", "category"]


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("coco", "nowhere.json", None, "is not found"),
        ("coco", "a.json", '{"annotations": [{"id": 1}]}', "is not COCO's file of captions"),
        ("coco", "a.json", "{", "cannot be read: line 1, column 2"),
        ("coco", "a.zip", "not a zip", "cannot be read"),
        ("parti", "a.tsv", "Name\tKind\nx\ty\n", "no column named prompt"),
        ("mjhq", "a.json", "3", "expected a list"),
    ],
)
def test_bad_copies_end_in_one_line(tmp_path, name, file, content, words):
    path = tmp_path / file
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        fetch(tmp_path, name, path)
    assert "\n" not in str(caught.value) and "--source" in str(caught.value)


def test_what_is_left_out_is_said(tmp_path, capsys):
    rows = [{"image_id": 1, "id": 1, "caption": " "}, {"image_id": 2, "id": 2, "caption": "a cat"}]
    assert len(fetch(tmp_path, "coco", written(tmp_path / "captions.json", {"annotations": rows}))) == 1
    assert "1 of 2 rows have no prompt and are left out" in capsys.readouterr().out
    table = written(tmp_path / "parti.tsv", "Prompt\tCategory\tSeed\na cat\tanimals\t3\n")
    fetch(tmp_path, "parti", table)
    assert "columns left out: seed; " in capsys.readouterr().out


def test_a_copy_in_another_encoding_names_the_line(tmp_path):
    (tmp_path / "captions.json").write_bytes(b'{"annotations":\n["caf\xe9"]}')
    with pytest.raises(UserError, match="line 2: byte 0xe9 is not UTF-8; save it as UTF-8"):
        fetch(tmp_path, "coco", tmp_path / "captions.json")


def test_bad_flags(tmp_path, mjhq):
    with pytest.raises(UserError, match="--count is 41, but there are 40"):
        fetch(tmp_path, "mjhq", mjhq, "--count", "41")
    with pytest.raises(UserError, match="allowed are names that end in"):
        fetch_prompts.main(["mjhq", str(tmp_path / "x.txt"), "--source", str(mjhq)])


def test_without_a_network_the_line_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"mjhq cannot be had from the hub \(no route\); give a local copy as --source"):
        fetch_prompts.main(["mjhq", str(tmp_path / "x.csv")])
