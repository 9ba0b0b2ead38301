"""The shipped CLIP model: loads offline, small, in fp16, and finds the image of a caption it never saw."""

import random
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from scenes import RELATIONS, Scene, Thing, caption, sample_split
from train_clip import EMBED_DIM, near_copy, scene_pairs
from train_vae import render_many

FOLDER = Path(__file__).parents[2] / "assets" / "shapes-clip"
WEIGHTS = FOLDER / "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Model, preprocessing and tokenizer, loaded with the network out of reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("empty_cache")))
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
        return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{FOLDER}")


def features(clip, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized text and image features [N, 256], the images taken through the shipped preprocessing."""
    model, preprocess, tokenizer = clip
    images = render_many(scenes, seed=21).permute(0, 2, 3, 1).numpy()  # [N, 64, 64, 3]
    pixels = torch.stack([preprocess(Image.fromarray(one)) for one in images])
    texts = tokenizer([caption(scene, random.Random(i)) for i, scene in enumerate(scenes)])
    with torch.no_grad():
        return model.encode_text(texts, normalize=True), model.encode_image(pixels, normalize=True)


def test_weights_are_fp16_and_small():
    assert WEIGHTS.stat().st_size < 6e6
    floats = [tensor for tensor in load_file(WEIGHTS).values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in floats)


def test_features_are_256_wide(clip):
    texts, images = features(clip, sample_split("evaluation", 4, seed=20))
    assert texts.shape == images.shape == (4, EMBED_DIM) == (4, 256)


def test_every_caption_fits_the_context(clip):
    model, _, tokenizer = clip
    texts = tokenizer([caption(scene, random.Random(0)) for scene in sample_split("test", 64, seed=20, things=2)])
    assert texts.shape == (64, model.context_length)
    assert (texts[:, -1] == tokenizer.tokenizer.eos_token_id).all()


def test_it_finds_the_picture_of_an_unseen_caption(clip):
    texts, images = features(clip, sample_split("test", 64, seed=20))
    assert ((texts @ images.T).argmax(1) == torch.arange(64)).float().mean() >= 0.9


def test_a_caption_is_nearer_to_its_picture_than_to_that_of_the_opposite_relation(clip):
    things = Thing("heart", "red", "plain", "large"), Thing("cross", "blue", "plain", "small")
    for relation in RELATIONS:
        scenes = [Scene(order, relation, "white", False) for order in (things, things[::-1])]
        texts, images = features(clip, scenes)
        assert ((texts @ images.T).argmax(1) == torch.arange(2)).all()


def test_near_copies_differ_from_their_scene_and_keep_to_the_training_split():
    scenes = scene_pairs(50, random.Random(0))
    for scene, copy in zip(scenes[::2], scenes[1::2], strict=True):
        assert scene.canonical() != copy.canonical()
        assert len({(thing.shape, thing.colour) for thing in copy.things}) == len(scene.things)
    assert near_copy(scenes[0], random.Random(1)) == near_copy(scenes[0], random.Random(1))
