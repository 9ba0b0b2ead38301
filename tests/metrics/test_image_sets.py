"""Folders and zip files of images as they come from elsewhere."""

import json
import os
import zipfile

import numpy as np
import pytest
from PIL import ExifTags, Image, features

from vqdm.errors import RunError, UserError
from vqdm.metrics.image_sets import open_images


def test_files_that_differ_only_in_their_ending_are_images_of_their_own(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = open_images(str(tmp_path), "IMAGES").entries
    assert {key: image.file for key, image in found.items()} == {
        ("a.jpg", 0): "a.jpg",
        ("a.png", 0): "a.png",
        ("b", 0): "b.png",
    }


def test_grey_of_16_bits_keeps_its_levels(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "a.png")
    found = open_images(str(tmp_path), "IMAGES")
    pixels = np.asarray(found.load(found.entries["a", 0]))
    assert (pixels == (levels // 256)[:, :, None]).all()


def test_a_name_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    with pytest.raises(UserError, match=r"IMAGES: .* holds 'caf\\udce9', whose name is not UTF-8"):
        open_images(str(tmp_path), "IMAGES")


def test_so_is_such_an_id_of_a_manifest(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"index": 0, "sample": 0, "id": "\ud800", "file": "a.png", "sha256": "0"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"whose name is not UTF-8"):
        open_images(str(tmp_path), "IMAGES")


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
    expected = open_images(str(result), "IMAGES")
    found = open_images(zipped(result, result.parent if inside else result), "IMAGES")
    assert list(found.entries) == [("p0", 0), ("p1", 0), ("p2", 0)]
    assert found.run == expected.run and found.full_precision
    for key, image in found.entries.items():
        assert image.row == expected.entries[key].row
        assert found.load(image).getpixel((0, 0)) == expected.load(expected.entries[key]).getpixel((0, 0))


def test_a_zipped_result_may_hold_what_a_mac_adds(result):
    path = zipped(result, result.parent, **{"__MACOSX/result/._grid.png": b"x"})
    assert len(open_images(path, "IMAGES").entries) == 3


def test_a_zipped_result_that_lacks_a_image_is_refused(result):
    (result / "samples" / "000001_00.png").unlink()
    with pytest.raises(UserError, match=r"result/samples/000001_00.png and 0 more of its manifest are not found"):
        open_images(zipped(result, result.parent), "IMAGES")


def test_a_zipped_result_that_is_not_finished_is_refused(result):
    path = zipped(result, result.parent, **{"result/manifest.0.jsonl": "{}"})
    with pytest.raises(UserError, match="is not finished"):
        open_images(path, "IMAGES")


def test_a_manifest_of_a_zip_file_is_bounded_and_damage_is_said(result, monkeypatch):
    path = zipped(result, result.parent)
    with monkeypatch.context() as limited:
        limited.setattr("vqdm.metrics.image_sets.MOST_TEXT", 100)
        with pytest.raises(UserError, match="more than 100 bytes"):
            open_images(path, "IMAGES")
    (result / "manifest.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="1 of 1 lines are not rows of it"):
        open_images(zipped(result, result.parent), "IMAGES")


# --------------------------------------------------------------------------------------- files that people have


FORMATS = ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "dib", "gif", "tif", "tiff", "ppm", "jp2", "avif")


@pytest.mark.parametrize("suffix", [*FORMATS, *(suffix.upper() for suffix in FORMATS), "Png"])
def test_formats_that_pillow_reads_are_read(tmp_path, suffix):
    if suffix.lower() == "avif" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    Image.new("RGB", (16, 8), (200, 30, 30)).save(tmp_path / f"a.{suffix}")
    found = open_images(str(tmp_path), "IMAGES")
    (image,) = found.entries.values()
    image = found.load(image)
    assert image.size == (16, 8) and image.mode == "RGB" and not found.notes
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 30)).max() < 12


def frames(path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second])


def files_of(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, format="PNG")


def turned():
    image = Image.new("RGB", (16, 8))
    image.getexif()[ExifTags.Base.Orientation] = 6
    return image


NOTES = {
    "other formats": (lambda f: files_of(f, "b.heic", "c.HEIC", "d.svg"), "formats that are not read: 2 .heic, 1 .svg"),
    "no ending": (lambda f: files_of(f, "b"), "not read: 1 without an ending (the first is 'b')"),
    "hidden": (lambda f: files_of(f, ".b.png", ".cache/c.jpg"), "hidden: 1 .png, 1 .jpg (the first is '.b.png')"),
    "below": (
        lambda f: files_of(f, "thumbs/b.png"),
        "below the others: 1 .png (the first is 'thumbs/b.png')",
    ),
    "gif": (lambda f: frames(f / "b.gif"), "animated, of which the first frame is taken: 1 .gif"),
    "animated png": (lambda f: frames(f / "b.png"), "animated, of which the first frame is taken: 1 .png"),
    "animated webp": (lambda f: frames(f / "b.webp"), "animated, of which the first frame is taken: 1 .webp"),
    "pages": (lambda f: frames(f / "b.tiff"), "animated, of which the first frame is taken: 1 .tiff"),
    "transparency": (lambda f: Image.new("RGBA", (8, 8)).save(f / "b.webp"), "the colours alone are taken: 1 .webp"),
    "a transparent colour": (
        lambda f: Image.new("P", (8, 8)).save(f / "b.png", transparency=0),
        "with transparency, of which the colours alone are taken: 1 .png",
    ),
    "turned": (lambda f: turned().save(f / "b.jpg", exif=turned().getexif()), "not applied: 1 .jpg"),
    "broken link": (lambda f: (f / "b.png").symlink_to("nowhere.png"), "not followed: 1 .png"),
    "linked folder": (lambda f: (f / "more").symlink_to(f.parent), "not followed: 1 without an ending"),
}


@pytest.mark.parametrize(
    ("name", "zip_it"),
    [(name, zip_it) for name in NOTES for zip_it in (False, True) if not ("link" in name and zip_it)],
)
def test_what_is_left_out_is_counted_and_named(tmp_path, name, zip_it):
    make, words = NOTES[name]
    folder = tmp_path / "set"
    files_of(folder, "a.png")
    make(folder)
    (note,) = open_images(zipped(folder, folder) if zip_it else str(folder), "IMAGES").notes
    assert note.startswith("IMAGES: ") and words in note


def test_what_lies_beside_images_is_not_mentioned(tmp_path):
    files_of(tmp_path, "a.png", "__MACOSX/._a.png", "._b.png")
    for name in ("a.txt", "metadata.csv", "stats.npz", "Thumbs.db", ".DS_Store", "README.md"):
        (tmp_path / name).write_bytes(b"x")
    assert not open_images(str(tmp_path), "IMAGES").notes


def test_images_that_the_manifest_does_not_name_are_counted(result):
    files_of(result, "grids/p0.png")
    (note,) = open_images(str(result), "IMAGES").notes
    assert "not named by the manifest: 1 .png (the first is 'grid.png')" in note


def test_a_set_of_unread_formats_says_what_it_holds(tmp_path):
    files_of(tmp_path, "a.heic", "b.heic")
    with pytest.raises(UserError, match=r"holds no image .*; left out, in formats that are not read: 2 .heic"):
        open_images(str(tmp_path), "IMAGES")


def test_the_first_frame_is_what_is_scored(tmp_path):
    frames(tmp_path / "a.gif")
    found = open_images(str(tmp_path), "IMAGES")
    assert found.load(found.entries["a", 0]).getpixel((0, 0)) == (255, 0, 0)


def test_values_of_32_bits_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tiff")
    found = open_images(str(tmp_path), "IMAGES")
    with pytest.raises(RunError, match="it has values of 32 bits; save it with 8 or 16"):
        found.load(found.entries["a", 0])


def test_arrays_are_no_images(tmp_path):
    np.savez(tmp_path / "batch.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="holds arrays, not images; give a folder or zip file"):
        open_images(str(tmp_path / "batch.npz"), "IMAGES")


def test_a_zip_file_with_a_name_twice_is_refused(tmp_path):
    files_of(tmp_path, "a.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for _ in range(2):
            archive.write(tmp_path / "a.png", "a.png")
    with pytest.raises(UserError, match=r"it holds 'a.png' twice"):
        open_images(str(tmp_path / "set.zip"), "IMAGES")
