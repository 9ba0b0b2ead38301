import math

import numpy as np
import pytest

from vqdm.metrics.bootstrap import mean_interval


def test_interval_of_a_normal_mean_is_the_textbook_one():
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = mean_interval(values, [str(k) for k in range(400)])
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_prompts_are_drawn_and_not_pictures():
    """Four equal pictures of a prompt say no more than one of them."""
    values = np.random.default_rng(0).normal(size=50)
    once = mean_interval(values, [str(k) for k in range(50)])
    assert mean_interval(np.repeat(values, 4), [str(k) for k in range(50) for _ in range(4)]) == pytest.approx(once)


def test_uneven_prompts_count_by_pictures():
    low, high = mean_interval([0, 0, 0, 1], ["a", "a", "a", "b"])
    assert (low, high) == (0, 1)


def test_same_seed_same_interval_and_one_prompt_has_none():
    values, prompts = [1.0, 2.0, 4.0], ["a", "b", "c"]
    assert mean_interval(values, prompts, 3) == mean_interval(values, prompts, 3)
    assert mean_interval(values, ["a"] * 3) is None
