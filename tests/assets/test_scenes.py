"""The scenes: captions say everything, splits are disjoint and stable, the renderer paints what is asked."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from scenes import (
    COLOURS,
    PLACES,
    RELATIONS,
    SPLITS,
    Scene,
    Thing,
    caption,
    render,
    sample_scene,
    sample_split,
    split_of,
)

RED_CIRCLE = Thing("circle", "red", "plain", "large")
BLUE_CIRCLE = Thing("circle", "blue", "plain", "large")


def some_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


def painted(*scenes: Scene, seed: int = 0) -> torch.Tensor:
    return render(list(scenes), torch.Generator().manual_seed(seed))


def test_sampled_scenes_are_reproducible_and_told_apart():
    assert some_scenes(50) == some_scenes(50)
    for scene in some_scenes(500):
        assert len({(thing.shape, thing.colour) for thing in scene.things}) == len(scene.things)


def test_canonical_names_the_left_or_upper_thing_first():
    scene = Scene((RED_CIRCLE, BLUE_CIRCLE), "below", "white", False)
    assert scene.canonical() == Scene((BLUE_CIRCLE, RED_CIRCLE), "above", "white", False)
    assert scene.canonical().canonical() == scene.canonical()


def test_split_does_not_depend_on_which_thing_is_named_first():
    for scene in some_scenes(300):
        assert split_of(scene) == split_of(scene.canonical())


def test_split_shares():
    counts = Counter(split_of(scene) for scene in some_scenes(5000))
    assert set(counts) == set(SPLITS)
    for split in SPLITS[1:]:
        assert 0.03 < counts[split] / 5000 < 0.05


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("things", [1, 2])
def test_sample_split_gives_distinct_scenes_of_the_split(split, things):
    scenes = sample_split(split, 40, seed=3, things=things)
    assert scenes == sample_split(split, 40, seed=3, things=things)
    assert len({scene.canonical() for scene in scenes}) == 40
    assert {split_of(scene) for scene in scenes} == {split}
    assert {len(scene.things) for scene in scenes} == {things}


def test_caption_names_every_shape_colour_and_the_background():
    for scene in some_scenes(200):
        words = caption(scene, random.Random(0)).split()
        for thing in scene.things:
            assert {thing.shape, thing.colour} <= set(words)
        assert scene.background in words
        assert ("gradient" in words) == scene.gradient


def test_render_shape_range_and_determinism():
    scenes = some_scenes(16)
    images = painted(*scenes)
    assert images.shape == (16, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, painted(*scenes))
    assert not torch.equal(images, painted(*scenes, seed=1))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_has_its_colour_at_its_place(place, colour):
    scene = Scene((Thing("square", colour, "plain", "large"),), place, "black", False)
    x, y = (round((1 + offset) * 32) for offset in PLACES[place])
    seen = painted(scene)[0, :, y - 4 : y + 4, x - 4 : x + 4].mean((1, 2))
    assert torch.allclose(seen, torch.tensor(COLOURS[colour]), atol=0.06)


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_first_thing_stands_in_its_relation_to_the_second(relation):
    image = painted(Scene((RED_CIRCLE, BLUE_CIRCLE), relation, "black", False))[0]
    ticks = torch.linspace(-1, 1, 64)
    red, blue = image[0] / image[0].sum(), image[2] / image[2].sum()  # [64, 64] each, as weights
    across = ((red - blue).sum(0) * ticks).sum().sign()
    down = ((red - blue).sum(1) * ticks).sum().sign()
    wanted = RELATIONS[relation]
    assert (across if wanted[0] else down) == sum(wanted)


@pytest.mark.parametrize(
    "change", [{"fill": "striped"}, {"fill": "dotted"}, {"size": "small"}, {"shape": "star"}, {"colour": "cyan"}]
)
def test_every_attribute_shows(change):
    plain = Scene((RED_CIRCLE,), "center", "white", False)
    other = replace(plain, things=(replace(RED_CIRCLE, **change),))
    assert (painted(plain) - painted(other)).abs().mean() > 0.005


def test_a_gradient_leans_from_top_to_bottom():
    flat, leaning = painted(*(Scene((RED_CIRCLE,), "center", "white", gradient) for gradient in (False, True)))
    assert flat[:, 0].mean() - flat[:, -1].mean() == pytest.approx(0, abs=0.01)
    assert leaning[:, 0].mean() - leaning[:, -1].mean() > 0.25
