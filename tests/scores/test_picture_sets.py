"""Folders and zip files of pictures as they come from elsewhere."""

import json
import os

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
