import math

import numpy as np
import pytest
import torch
from PIL import Image

from vqdm.fidelity import SMALLEST_FOR_LPIPS
from vqdm.metrics.image_sets import ImageLoader, open_images
from vqdm.metrics.networks import Network
from vqdm.metrics.results import (
    Score,
    global_psnr,
    label_of,
    lpips_score,
    mean_interval,
    mean_score,
    pair_table,
    pixel_scores,
    terminal_table,
    winrate,
)
from vqdm.parallel import Ranks

NETWORK = Network("transformers", "owner/PickScore_v1", "x", "ab")
TABLE = {
    ("a", 0): {"pickscore": 20.0, "pickscore_reference": 21.0, "mse": 0.01},
    ("a", 1): {"pickscore": 22.0, "pickscore_reference": 21.0, "mse": 0.03},
    ("b", 0): {"pickscore": 19.0, "pickscore_reference": 19.0, "mse": 0.02},
}


def test_mean_and_paired_difference():
    score = mean_score("pickscore", TABLE, NETWORK, 0)
    assert (score.value, score.n, score.label) == (pytest.approx(61 / 3), 3, "PickScore[PickScore_v1]")
    assert score.difference == pytest.approx(0) and score.reference == score.value
    assert score.difference_interval[0] <= 0 <= score.difference_interval[1]
    assert score.to_dict()["better"] == "higher"


def test_wins_count_ties_half_and_probabilities_are_softmax():
    score = winrate(TABLE, NETWORK, 0)
    pairs = [(row["pickscore"], row["pickscore_reference"]) for row in TABLE.values()]
    expected = np.mean([math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in pairs])
    assert score.value == 0.5 and score.extra["mean_probability"] == pytest.approx(expected)


def test_global_psnr_is_of_the_mean_error_and_its_interval_is_in_order():
    score = global_psnr(TABLE, 0)
    assert score.value == pytest.approx(-10 * math.log10(0.02))
    assert score.interval[0] <= score.value <= score.interval[1]


def test_labels_name_the_network():
    assert label_of("clip", Network("open_clip", "ViT-H-14/laion2b", "x", "y")) == "CLIP score[ViT-H-14/laion2b]"
    assert label_of("psnr", None) == "PSNR (dB)"


def test_table_shows_intervals_deviations_and_no_empty_column():
    scores = [Score("psnr", "PSNR (dB)", 30.125, 8, (29, 31)), Score("kid", "KID[clean]", 1.5, 8, extra={"std": 0.25})]
    lines = terminal_table(scores).splitlines()
    assert lines[0].split("  ")[0] == "metric" and "full precision" not in lines[0]
    assert "30.12" in lines[2] and "[29.00, 31.00]" in lines[2] and "↑" in lines[2]
    assert "1.500" in lines[3] and "± 0.250" in lines[3] and "↓" in lines[3]
    assert len({len(line) for line in lines}) == 1


# --------------------------------------------------------------------------------------------- intervals


def test_interval_of_a_normal_mean_is_the_textbook_one():
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = mean_interval(values, [str(k) for k in range(400)])
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_prompts_are_resampled_and_not_images():
    """Four equal images of a prompt say no more than one of them."""
    values = np.random.default_rng(0).normal(size=50)
    once = mean_interval(values, [str(k) for k in range(50)])
    assert mean_interval(np.repeat(values, 4), [str(k) for k in range(50) for _ in range(4)]) == pytest.approx(once)


def test_uneven_prompts_count_by_images():
    low, high = mean_interval([0, 0, 0, 1], ["a", "a", "a", "b"])
    assert (low, high) == (0, 1)


def test_same_seed_same_interval_and_one_prompt_has_none():
    values, prompts = [1.0, 2.0, 4.0], ["a", "b", "c"]
    assert mean_interval(values, prompts, 3) == mean_interval(values, prompts, 3)
    assert mean_interval(values, ["a"] * 3) is None


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
