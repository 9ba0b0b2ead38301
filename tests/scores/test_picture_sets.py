"""Folders and zip files of pictures as they come from elsewhere."""

import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from vqdm.errors import UserError
from vqdm.scores.picture_sets import open_pictures


def test_files_that_differ_only_in_their_ending_are_pictures_of_their_own(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = open_pictures(str(tmp_path), "IMAGES").pictures
    assert {key: picture.file for key, picture in found.items()} == {
        ("a.jpg", 0): "a.jpg",
        ("a.png", 0): "a.png",
        ("b", 0): "b.png",
    }


def test_grey_of_16_bits_keeps_its_levels(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "a.png")
    found = open_pictures(str(tmp_path), "IMAGES")
    pixels = np.asarray(found.load(found.pictures["a", 0]))
    assert (pixels == (levels // 256)[:, :, None]).all()


def test_a_name_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    with pytest.raises(UserError, match=r"IMAGES: .* holds 'caf\\udce9', whose name is not UTF-8"):
        open_pictures(str(tmp_path), "IMAGES")


def test_so_is_such_an_id_of_a_manifest(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"index": 0, "sample": 0, "id": "\ud800", "file": "a.png", "sha256": "0"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"whose name is not UTF-8"):
        open_pictures(str(tmp_path), "IMAGES")


# --------------------------------------------------------------------------------------- zipped results


@pytest.fixture
def result(tmp_path):
    """A folder as generate.py leaves it."""
    folder = tmp_path / "result"
    (folder / "samples").mkdir(parents=True)
    rows = []
    for k in range(3):
        file = f"samples/{k:06d}_00.png"
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / file)
        rows.append({"index": k, "sample": 0, "id": f"p{k}", "file": file, "sha256": "0", "prompt": f"red {k}"})
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"full_precision": True, "settings": {"dtype": "float16"}}))
    return folder


def zipped(folder, base, **entries):
    """A zip file of `folder`, whose names begin at `base`, and of other entries."""
    path = base.parent / f"{base.name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(base))
        for name, data in entries.items():
            archive.writestr(name, data)
    return str(path)


@pytest.mark.parametrize("inside", [False, True])
def test_a_zipped_result_is_the_result(result, inside):
    """Its prompts, run and keys, be the folder itself in the archive or only what it holds."""
    expected = open_pictures(str(result), "IMAGES")
    found = open_pictures(zipped(result, result.parent if inside else result), "IMAGES")
    assert list(found.pictures) == [("p0", 0), ("p1", 0), ("p2", 0)]
    assert found.run == expected.run and found.full_precision
    for key, picture in found.pictures.items():
        assert picture.row == expected.pictures[key].row
        assert found.load(picture).getpixel((0, 0)) == expected.load(expected.pictures[key]).getpixel((0, 0))


def test_a_zipped_result_may_hold_what_a_mac_adds(result):
    path = zipped(result, result.parent, **{"__MACOSX/result/._grid.png": b"x"})
    assert len(open_pictures(path, "IMAGES").pictures) == 3


def test_a_zipped_result_that_lacks_a_picture_is_refused(result):
    (result / "samples" / "000001_00.png").unlink()
    with pytest.raises(UserError, match=r"result/samples/000001_00.png and 0 more of its manifest are not there"):
        open_pictures(zipped(result, result.parent), "IMAGES")


def test_a_zipped_result_that_is_not_finished_is_refused(result):
    path = zipped(result, result.parent, **{"result/manifest.0.jsonl": "{}"})
    with pytest.raises(UserError, match="is not finished"):
        open_pictures(path, "IMAGES")


def test_a_manifest_of_a_zip_file_is_bounded_and_damage_is_said(result, monkeypatch):
    path = zipped(result, result.parent)
    with monkeypatch.context() as limited:
        limited.setattr("vqdm.scores.picture_files.MOST_TEXT", 100)
        with pytest.raises(UserError, match="more than 100 bytes"):
            open_pictures(path, "IMAGES")
    (result / "manifest.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="1 of 1 lines are not rows of it"):
        open_pictures(zipped(result, result.parent), "IMAGES")
