"""The shipped prompt files: reproducible, free of duplicates, and disjoint in meaning."""

import csv
import random
from itertools import combinations
from pathlib import Path

import pytest

from scenes import caption, sample_scene, split_of
from write_prompts import COUNTS, file_name, prompt_scenes, write

PROMPTS = Path(__file__).parents[2] / "prompts"
SYNONYMS = {
    "little": "small",
    "big": "large",
    "spotted": "dotted",
    "over": "above",
    "under": "below",
    "middle": "center",
    "backdrop": "background",
}


def prompts(split: str) -> list[str]:
    with open(PROMPTS / file_name(split), encoding="utf-8", newline="") as file:
        return [row["prompt"] for row in csv.DictReader(file)]


def meaning(prompt: str) -> str:
    """The prompt in one fixed wording, the left or upper thing first; reads words alone, not the sampler's scenes."""
    words = [SYNONYMS.get(word, word) for word in prompt.split() if word != "plain"]
    text = " ".join(words).removeprefix("a picture of ").removeprefix("a drawing of ")
    text = text.replace(" to the left of ", " left of ").replace(" to the right of ", " right of ")
    body, ending = text.rsplit(" on a ", 1)
    for relation, inverse in (("right of", "left of"), ("below", "above")):
        if f" {relation} " in body:
            first, second = body.split(f" {relation} ")
            body = f"{second} {inverse} {first}"
    return f"{body} on a {ending}"


@pytest.mark.parametrize("split", COUNTS)
def test_a_file_is_what_the_script_writes(split, tmp_path):
    write(split, tmp_path)
    assert (tmp_path / file_name(split)).read_bytes() == (PROMPTS / file_name(split)).read_bytes()


@pytest.mark.parametrize("split", COUNTS)
def test_every_prompt_is_a_scene_of_its_own(split):
    assert len({meaning(prompt) for prompt in prompts(split)}) == len(prompts(split)) == COUNTS[split]


@pytest.mark.parametrize("split", COUNTS)
def test_the_prompts_scenes_belong_to_their_split(split):
    assert {split_of(scene) for scene in prompt_scenes(split)} == {split}


@pytest.mark.parametrize(("one", "other"), combinations(COUNTS, 2))
def test_two_files_share_no_meaning(one, other):
    assert {meaning(prompt) for prompt in prompts(one)}.isdisjoint(meaning(prompt) for prompt in prompts(other))


def test_no_paraphrase_of_a_training_scene_is_a_prompt():
    rng = random.Random(11)
    scenes = [scene for scene in (sample_scene(rng) for _ in range(5000)) if split_of(scene) == "training"]
    trained = {meaning(caption(scene, rng)) for scene in scenes}
    assert trained.isdisjoint(meaning(prompt) for split in COUNTS for prompt in prompts(split))
