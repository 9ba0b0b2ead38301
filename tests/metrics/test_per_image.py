"""Tables of scores of single images."""

import torch
from PIL import Image

from vqdm.fidelity import SMALLEST_FOR_LPIPS
from vqdm.metrics.image_sets import ImageLoader, open_images
from vqdm.metrics.per_image import lpips_score, pair_table, pixel_scores
from vqdm.parallel import Ranks


def scores(folder, score) -> dict:
    found = open_images(str(folder), "IMAGES")
    return pair_table(ImageLoader(Ranks(), 2, 1), "pairs", score, found, found, list(found.entries))


def test_small_images_have_no_lpips_and_no_ssim(tmp_path):
    for name, side in (("large", 40), ("small", 30), ("tiny", 10)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    lpips = lpips_score(lambda first, second: torch.full((1,), 0.5), SMALLEST_FOR_LPIPS["alex"])
    assert scores(tmp_path, lpips) == {("large", 0): {"lpips": 0.5}, ("small", 0): {}, ("tiny", 0): {}}
    pixels = scores(tmp_path, pixel_scores)
    assert pixels["tiny", 0].keys() == {"psnr", "mse"} and pixels["small", 0].keys() == {"psnr", "mse", "ssim"}
