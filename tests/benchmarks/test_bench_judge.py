"""The judge of image pairs: votes, intervals, and distances of colours against known values."""

import json
import sys

import bench_judge
import numpy as np
import pytest
import torch
from PIL import Image


def test_known_colours_in_lab():
    """sRGB's red, and white and black."""
    colours = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.float64)
    wanted = torch.tensor([[53.24, 80.09, 67.20], [100, 0, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(bench_judge.lab(colours), wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize(("votes", "count", "low", "high"), [(5, 10, 0.2366, 0.7634), (0, 20, 0.0, 0.1611)])
def test_wilsons_interval(votes, count, low, high):
    assert bench_judge.wilson(votes, count) == pytest.approx((low, high), abs=1e-3)


def image_of(level: int, patch: int = 0) -> Image.Image:
    array = np.full((64, 64, 3), level, np.uint8)
    array[:patch, :patch] = 255 - level
    return Image.fromarray(array)


def test_what_differs_noticeably():
    assert bench_judge.differences(image_of(100), image_of(100), 2) == (0, 0)
    mean, share = bench_judge.differences(image_of(100), image_of(101), 2)
    assert 0.2 < mean < 0.6 and share == 0
    assert bench_judge.differences(image_of(20), image_of(20, patch=16), 2)[1] == pytest.approx(1 / 16)


def test_images_of_full_precision_are_told_from_noise_and_not_from_themselves(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for name in ("full", "same", "noise"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "manifest.jsonl").open("w") as manifest:
            for k in range(8):
                circle = np.full((64, 64, 3), 245, np.uint8)
                yy, xx = np.mgrid[:64, :64] - 32
                circle[yy**2 + xx**2 < (14 + k) ** 2] = (219, 26, 31)
                pixels = rng.integers(0, 256, (64, 64, 3), np.uint8) if name == "noise" else circle
                Image.fromarray(pixels).save(tmp_path / name / f"{k:06d}_00.png")
                entry = {"file": f"{k:06d}_00.png", "index": k, "sample": 0, "seed": k, "sha256": "0" * 64}
                manifest.write(json.dumps(entry | {"prompt": "a large red circle on a white background"}) + "\n")
    folders = [str(tmp_path / name) for name in ("full", "same", "noise")]
    monkeypatch.setattr(sys, "argv", ["bench_judge.py", *folders])
    bench_judge.main()
    same, noise = map(json.loads, capsys.readouterr().out.splitlines())
    assert same["votes_for_full_precision"] == 0.5 and not same["judge_can_tell"]
    assert same["images_noticeably_different"] == 0 and noise["images_noticeably_different"] == 1
    assert noise["votes_for_full_precision"] == 1 and noise["judge_can_tell"] and noise["pairs"] == 8
