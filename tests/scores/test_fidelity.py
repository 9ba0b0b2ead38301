import math

import numpy as np
import pytest
import torch
from PIL import Image

from vqdm.scores.fidelity import decibels, lpips, pair_scores, to_tensor


def test_pair_scores_equal_numpy():
    rng = np.random.default_rng(0)
    first, second = rng.random((3, 3, 4, 5), dtype=np.float32), rng.random((3, 3, 4, 5), dtype=np.float32)
    scores = pair_scores(torch.from_numpy(first), torch.from_numpy(second))
    squared = ((first - second) ** 2).reshape(3, -1).mean(1)
    assert scores["mse"] == pytest.approx(squared.mean(), rel=1e-5)
    assert scores["mae"] == pytest.approx(np.abs(first - second).mean(), rel=1e-5)
    assert scores["psnr_db"] == pytest.approx(np.mean([10 * math.log10(1 / one) for one in squared]), rel=1e-5)


def test_equal_pictures_have_a_finite_psnr():
    images = torch.rand(2, 3, 4, 4)
    assert pair_scores(images, images)["psnr_db"] == pytest.approx(100.0)


def test_to_tensor_keeps_pixels():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    tensor = to_tensor([Image.fromarray(pixels)])
    assert tensor.shape == (1, 3, 2, 3)
    assert torch.equal((tensor[0] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(pixels))


def test_lpips_is_left_out_where_its_weights_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert lpips(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)) is None


def test_decibels():
    assert decibels(1, 100) == pytest.approx(-20)
    assert decibels(0, 1) < -250
