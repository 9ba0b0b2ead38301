"""The shipped judge: small, in fp16, right on images it never saw, and not to be talked into a wrong verdict."""

import torch
from judge import judge
from safetensors.torch import load_file

from scenes import Scene, Thing, sample_split
from train_judge import accuracy, degrade
from train_text import labels_of
from train_vae import render_many

HEART = Thing("heart", "red", "plain", "large")
CROSS = Thing("cross", "blue", "striped", "small")


def images_of(scenes: list[Scene], seed: int = 31) -> torch.Tensor:
    return render_many(scenes, seed=seed).float() / 255


def test_weights_are_fp16_and_small():
    assert judge.WEIGHTS.stat().st_size < 1.5e6
    floats = [tensor for tensor in load_file(judge.WEIGHTS).values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float16}


def test_names_and_fields_agree():
    assert len(judge.NAMES) == len(labels_of(Scene((HEART,), "center", "white", False)))


def test_accuracy_on_unseen_renders():
    scenes = sample_split("test", 256, seed=30)
    shares = accuracy(judge, judge.load(), images_of(scenes), scenes)
    for place in ("first", "second"):
        assert shares[f"{place}_shape"] >= 0.98
        assert shares[f"{place}_colour"] >= 0.98
    assert shares["layout"] >= 0.98


def test_accuracy_on_degraded_renders():
    scenes = sample_split("test", 256, seed=30)
    worse = degrade(images_of(scenes), torch.Generator().manual_seed(0))
    shares = accuracy(judge, judge.load(), worse, scenes)
    assert min(shares[name] for name in judge.PAIR) >= 0.95


def test_right_pictures_are_called_right():
    singles, pairs = (sample_split("test", 128, seed=30, things=things) for things in (1, 2))
    assert judge.single_right(images_of(singles), singles).float().mean() >= 0.97
    assert judge.pair_right(images_of(pairs), pairs).float().mean() >= 0.95


def test_wrong_pictures_are_called_wrong():
    asked = Scene((HEART, CROSS), "left of", "white", False)
    swapped = Scene((CROSS, HEART), "left of", "white", False)
    stacked = Scene((HEART, CROSS), "above", "white", False)
    lonely = Scene((HEART,), "left", "white", False)
    assert judge.pair_right(images_of([asked, swapped, stacked, lonely]), [asked] * 4).tolist() == [True] + [False] * 3


def test_a_second_thing_is_wrong_where_one_was_asked_for():
    asked, crowded = Scene((HEART,), "left", "white", False), Scene((HEART, CROSS), "left of", "white", False)
    assert judge.single_right(images_of([asked, crowded]), [asked] * 2).tolist() == [True, False]


def test_either_way_to_name_a_pair_is_judged_alike():
    scene = Scene((CROSS, HEART), "below", "black", True)
    assert judge.pair_right(images_of([scene]), [scene.canonical()]).tolist() == [True]
