import numpy as np
from PIL import Image

from vqdm.images import pair_sheet, save_png


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


def test_large_pictures_are_not_enlarged():
    sheet = pair_sheet(["x"], [plain("red", 200)], [plain("red", 200)], ("a", "b"))
    assert sheet.width < 2 * 200 + 60


def test_png_appears_whole(tmp_path):
    save_png(plain("red"), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.getpixel((5, 5)) == (255, 0, 0)
