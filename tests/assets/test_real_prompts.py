"""The prompt files for real models: reproducible, without near-duplicates, and in sound English as far as rules go."""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from write_calibration_prompts import COUNT, GRAMMAR, content, plural, prompts, with_article

PROMPTS = Path(__file__).parents[2] / "prompts"


def rows(name: str) -> list[tuple[str, str]]:
    with open(PROMPTS / name, encoding="utf-8", newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def overlaps(first: list[frozenset[str]], second: list[frozenset[str]]) -> np.ndarray:
    """Jaccard index of every pair of word sets: [N, M]."""
    place = {word: k for k, word in enumerate(sorted(frozenset().union(*first, *second)))}
    held = [np.zeros((len(sets), len(place)), dtype=np.float32) for sets in (first, second)]
    for matrix, sets in zip(held, (first, second), strict=True):
        for row, words in zip(matrix, sets, strict=True):
            row[[place[word] for word in words]] = 1
    shared = held[0] @ held[1].T
    return shared / (held[0].sum(1)[:, None] + held[1].sum(1) - shared)


@pytest.fixture(scope="module")
def calibration() -> list[tuple[str, str]]:
    return rows("calibration.csv")


def test_the_generator_writes_the_shipped_file(calibration):
    assert prompts(yaml.safe_load(GRAMMAR.read_text(encoding="utf-8")), COUNT) == calibration


def test_there_are_enough_and_every_category_is_as_large(calibration):
    assert len(calibration) >= 4096
    assert set(Counter(category for _, category in calibration).values()) == {240}


def test_no_prompt_repeats_in_either_file(calibration):
    texts = [prompt.lower() for prompt, _ in [*calibration, *rows("evaluation.csv")]]
    assert len(set(texts)) == len(texts)


def test_whole_prompts_of_a_category_differ(calibration):
    """Finishes may repeat, so whole prompts overlap more than scenes; equal words in another order may not occur."""
    for category in {category for _, category in calibration}:
        words = [frozenset(re.findall(r"\w+", prompt.lower())) for prompt, name in calibration if name == category]
        assert np.triu(overlaps(words, words), 1).max() < 0.95


def test_evaluation_is_128_and_far_from_calibration(calibration):
    evaluation = rows("evaluation.csv")
    known = [content(prompt) for prompt, _ in calibration]
    assert len(evaluation) == 128
    assert overlaps([content(prompt) for prompt, _ in evaluation], known).max() < 0.6


def test_articles_and_doubled_words(calibration):
    faults = re.compile(
        r"(?i)\ba (?=[aeio])(?!one|eu)\w+|\ba u(?!ni|se|ku|to)\w+|\ban (?!hour|honest)[^aeiou\W]\w+"
        r"|\b(?:an? )(?:an?|the)\b|\b(\w+) \1\b|[{}]|  | ,"
    )
    every = [prompt for prompt, _ in [*calibration, *rows("evaluation.csv")]]
    assert [prompt for prompt in every if faults.search(prompt)] == []


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("red fox", "red foxes"),
        ("cherry", "cherries"),
        ("blue jay", "blue jays"),
        ("goose", "geese"),
        ("cat with different-colored eyes", "cats with different-colored eyes"),
        ("clownfish", "clownfish"),
        ("mouse", "mice"),
    ],
)
def test_plurals(one, many):
    assert plural(one) == many


@pytest.mark.parametrize(("word", "said"), [("owl", "an owl"), ("unicorn", "a unicorn"), ("umbrella", "an umbrella")])
def test_articles(word, said):
    assert with_article(word) == said
