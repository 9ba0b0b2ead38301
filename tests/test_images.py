import numpy as np
import pytest
import torch
from PIL import Image

from vqdm.diffusion.sampling import compared_pictures
from vqdm.images import comparable, generated_image, pair_sheet, problems_of, save_png


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
    scores = compared_pictures([SOUND, NAN, BLACK], [SOUND, NAN, BLACK], prompts, "quantized")
    assert scores["count"] == 1 and scores["psnr_db"] == 100 and scores["mse"] == 0
    assert scores["problems"] == {"full_precision": {"black": 1, "nan": 1}, "quantized": {"black": 1, "nan": 1}}
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1] == (
        "warning: 1 of 3 images of the full-precision model hold NaN or infinity and are black there; "
        "use --dtype bfloat16 or float32, or a MODEL whose VAE is made for float16 (an fp16-fix VAE); "
        "the first is of 'a star'"
    )
    assert "1 of 3 images of the quantized model are black all over" in lines[2] and "'a circle'" in lines[2]
    without = compared_pictures([NAN], [SOUND], prompts[:1], "quantized")
    assert without["count"] == 0 and without["psnr_db"] is None and without["lpips"] is None
