import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vqdm.diffusion.sampling import compare_images
from vqdm.errors import UserError
from vqdm.images import (
    ImageFolder,
    check_layout,
    comparable,
    generated_image,
    grid,
    pair_sheet,
    png_bytes,
    problems_of,
    read_rows,
    save_png,
)
from vqdm.storage.run_folder import check_claim
from vqdm.tracking import JsonLines


def plain(colour, side=64) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def test_sheet_holds_every_pair_beside_each_other():
    left, right = [plain("red"), plain("lime"), plain("blue")], [plain("cyan"), plain("magenta"), plain("yellow")]
    pixels = np.asarray(pair_sheet(["one", "two", "three"], left, right, ("full precision", "quantized")))
    for first, second in zip(left, right, strict=True):
        a, b = np.array(first.getpixel((0, 0))), np.array(second.getpixel((0, 0)))
        at_a, at_b = (np.argwhere((pixels == colour).all(-1)) for colour in (a, b))
        assert len(at_a) == len(at_b) == 128 * 128
        assert (at_a[:, 0] == at_b[:, 0]).all() and at_a[:, 1].max() < at_b[:, 1].min()


def test_labels_and_prompts_are_drawn():
    sheet = pair_sheet(["a long prompt " * 20], [plain("white")], [plain("white")], ("full precision", "quantized"))
    assert (np.asarray(sheet) < 128).sum() > 200


def test_large_images_are_not_enlarged():
    sheet = pair_sheet(["x"], [plain("red", 200)], [plain("red", 200)], ("a", "b"))
    assert sheet.width < 2 * 200 + 60


def test_png_appears_whole(tmp_path):
    save_png(plain("red"), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.getpixel((5, 5)) == (255, 0, 0)


def image(value: float, replaced: bool = False) -> Image.Image:
    return generated_image(torch.full((3, 4, 4), value), replaced).image


SOUND, NAN, BLACK, REPLACED = image(0.5), image(float("nan")), image(0.0), image(0.0, True)


def test_what_is_wrong_with_an_image_stays_with_its_file(tmp_path):
    for number, one in enumerate((SOUND, NAN, BLACK, REPLACED)):
        save_png(one, tmp_path / f"{number}.png")
    again = [Image.open(path).convert("RGB") for path in sorted(tmp_path.glob("*.png"))]
    assert (
        problems_of(again) == problems_of([SOUND, NAN, BLACK, REPLACED]) == {"black": 1, "nan": 1, "safety_checker": 1}
    )
    assert [one.info.get("problem") for one in again] == [None, "nan", "black", "safety_checker"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (SOUND, SOUND, True),
        (SOUND, BLACK, True),  # one that is black by mistake is far from the other
        (BLACK, BLACK, False),
        (NAN, SOUND, False),
        (SOUND, NAN, False),
        (NAN, NAN, False),
        (REPLACED, SOUND, False),
    ],
)
def test_pairs_of_images_that_went_wrong_are_not_compared(first, second, expected):
    assert comparable(first, second) is expected


def test_images_that_went_wrong_leave_the_scores_and_are_counted(caplog):
    prompts = ["a heart", "a star", "a circle"]
    scores = compare_images([SOUND, NAN, BLACK], [SOUND, NAN, BLACK], prompts, "quantized")
    assert scores["count"] == 1 and scores["psnr_db"] == 100 and scores["mse"] == 0
    assert scores["problems"] == {"full_precision": {"black": 1, "nan": 1}, "quantized": {"black": 1, "nan": 1}}
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1] == (
        "warning: 1 of 3 images of the full-precision model hold NaN or infinity and are black there; "
        "use --dtype bfloat16 or float32, or a MODEL whose VAE is made for float16 (an fp16-fix VAE); "
        "the first is of 'a star'"
    )
    assert "1 of 3 images of the quantized model are black all over" in lines[2] and "'a circle'" in lines[2]
    without = compare_images([NAN], [SOUND], prompts[:1], "quantized")
    assert without["count"] == 0 and without["psnr_db"] is None and without["lpips"] is None


def sample_image(level: int, size=(4, 6)) -> Image.Image:
    return Image.new("RGB", size, (level, 255 - level, 7))


def add(folder: ImageFolder, key, level: int, rank: int = 0) -> dict:
    """Save a image and its row, as a rank does."""
    digest = folder.save(key, sample_image(level), {"prompt": "ein grüner Stern"})
    row = {"index": key[0], "sample": key[1], "file": folder.file_of(key), "sha256": digest}
    JsonLines(folder.part(rank)).write(row)
    return row


@pytest.mark.parametrize(
    ("layout", "name"),
    [("flat", "000012_03.png"), ("geneval", "00012/samples/00003.png"), ("dpg", "samples/000012_03.png")],
)
def test_layouts(tmp_path, layout, name):
    folder = ImageFolder(tmp_path, layout)
    row = add(folder, (12, 3), 9)
    assert row["file"] == name
    assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == row["sha256"]


def test_png_keeps_pixels_and_metadata_and_is_deterministic():
    about = {"prompt": "ein grüner Stern", "seed": 2**62}
    data = png_bytes(sample_image(9), about)
    assert data == png_bytes(sample_image(9), about)
    import io

    with Image.open(io.BytesIO(data)) as image:
        assert json.loads(image.text["parameters"]) == about
        assert np.array_equal(np.asarray(image), np.asarray(sample_image(9)))


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    path = tmp_path / "manifest.jsonl"
    row = {"index": 1, "sample": 0, "file": "a.png", "sha256": "0"}
    path.write_text(json.dumps(row) + '\n[1]\n{"index": 2}\n' + json.dumps(row)[:-9])
    assert read_rows(path) == [row]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_merge_sorts_the_rows_of_all_ranks_and_removes_their_files(tmp_path):
    folder = ImageFolder(tmp_path)
    rows = {key: add(folder, key, 20 * rank, rank) for rank, key in enumerate([(2, 0), (0, 1), (0, 0)])}
    assert list(folder.merge().values()) == [rows[key] for key in sorted(rows)]
    assert read_rows(tmp_path / "manifest.jsonl") == [rows[key] for key in sorted(rows)]
    assert not list(tmp_path.glob("manifest.*.jsonl"))


def test_merge_prefers_the_newer_row(tmp_path):
    folder = ImageFolder(tmp_path)
    add(folder, (0, 0), 1)
    folder.merge()
    newer = add(folder, (0, 0), 2)
    assert folder.merge() == {(0, 0): newer}


def test_shards_in_one_folder_leave_each_other_alone(tmp_path):
    first, second = ImageFolder(tmp_path, shard=(0, 2)), ImageFolder(tmp_path, shard=(1, 2))
    add(first, (0, 0), 1)
    add(second, (1, 0), 2)
    assert first.merge().keys() == {(0, 0), (1, 0)}
    assert second.part(0).is_file() and not first.part(0).is_file()
    add(second, (3, 0), 3)
    assert second.merge().keys() == {(0, 0), (1, 0), (3, 0)}


def test_finished_forgets_missing_and_damaged_images(tmp_path):
    folder = ImageFolder(tmp_path)
    keys = [(i, 0) for i in range(5)]
    for key in keys[:4]:
        add(folder, key, 10 * key[0])
    (tmp_path / folder.file_of((1, 0))).unlink()
    (tmp_path / folder.file_of((2, 0))).write_bytes(b"not what was written")
    assert folder.finished([(0, 0), (1, 0), (2, 0), (4, 0)]) == {(0, 0)}
    assert [row["index"] for row in read_rows(tmp_path / "manifest.jsonl")] == [0, 3]


def test_check_names_what_changed(tmp_path):
    folder, settings = ImageFolder(tmp_path / "out"), {"seed": 0, "sampling": {"height": 8}}
    check_claim(folder.path, settings, resume=False)
    folder.claim({"settings": settings})
    folder.claim({"settings": {"seed": 5}})
    check_claim(folder.path, settings, resume=True)
    with pytest.raises(UserError, match="add --resume"):
        check_claim(folder.path, settings, resume=False)
    with pytest.raises(UserError, match=r"seed was 0, now 1; height was 8, now 16$"):
        check_claim(folder.path, {"seed": 1, "sampling": {"height": 16}}, resume=True)
    (folder.path / "run.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        check_claim(folder.path, settings, resume=True)


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is not a run of vqdm"):
            check_claim(path, {}, resume=True)
    with pytest.raises(UserError, match="cannot be written"):
        ImageFolder(tmp_path / "file" / "below").claim({})


def test_geneval_metadata_is_the_row(tmp_path):
    row = {"prompt": "a red star", "tag": "colors", "include": [{"class": "star", "count": 1}]}
    ImageFolder(tmp_path, "geneval").write_prompt_files({3: row})
    assert json.loads((tmp_path / "00003" / "metadata.jsonl").read_text()) == row


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_grid_holds_each_image_in_its_place(count):
    images = [sample_image(50 * k) for k in range(count)]
    sheet = np.asarray(grid(images))
    assert sheet.shape == (6 * -(-count // 2), 4 * min(2, count), 3)
    for k, image in enumerate(images):
        y, x = k // 2 * 6, k % 2 * 4
        assert np.array_equal(sheet[y : y + 6, x : x + 4], np.asarray(image))


def test_dpg_grids_go_by_id(tmp_path):
    folder = ImageFolder(tmp_path, "dpg")
    rows = {(i, k): add(folder, (i, k), 9 * k) for i in range(2) for k in range(4)}
    folder.write_grids({0: "midjourney3", 1: "7"}, rows)
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == ["7.png", "midjourney3.png"]
    with Image.open(tmp_path / "grids" / "7.png") as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(grid([sample_image(9 * k) for k in range(4)])))


def test_what_a_layout_cannot_hold():
    check_layout("flat", ["any/name"], 99)
    check_layout("dpg", ["a-b_3"], 4)
    with pytest.raises(UserError, match="holds 4 at most"):
        check_layout("dpg", ["a"], 5)
    for name in ("../a", "a.b", ""):
        with pytest.raises(UserError, match="--layout dpg names files by id"):
            check_layout("dpg", [name], 1)
