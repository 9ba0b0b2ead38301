"""Encoders from random CLIP and DINOv2 models on disk, compared with the libraries' own use of them."""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from train_text import known_words, make_tokenizer
from vqdm.errors import UserError
from vqdm.metrics.encoders import load_encoder, unit
from vqdm.metrics.networks import Missing, Network, find_encoder, find_open_clip, find_pickscore

SHAPES = "assets/shapes-clip"
CPU = torch.device("cpu")
LONG = "a big red circle " * 30


def picture(width: int = 40, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP of transformers with tokenizer and processor, as PickScore comes."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(known_words())
    shared = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shared,
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **shared)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = Dinov2Config(
        image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    folder = tmp_path_factory.mktemp("dino") / "tiny-dino"
    Dinov2Model(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_open_clip_folder_gives_what_open_clip_gives():
    encoder = load_encoder(find_open_clip(SHAPES, "unused", True), CPU)
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{SHAPES}")
    tokens = open_clip.get_tokenizer(f"local-dir:{SHAPES}")(["a red star"])
    with torch.no_grad():
        pixels = prepare(picture())[None]
        expected = model.eval().encode_image(pixels), model.encode_text(tokens)
        assert torch.equal(encoder.images(encoder.prepare(picture())[None]), expected[0])
        assert torch.equal(encoder.texts(["a red star"]), expected[1])
    assert encoder.scale == pytest.approx(model.logit_scale.exp().item())
    assert encoder.overlong(LONG) and not encoder.overlong("a red star")


def test_architecture_with_a_file_of_weights(tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tuned.pt")
    network = find_open_clip("ViT-S-32-alt", str(tmp_path / "tuned.pt"), True)
    assert network.name == "ViT-S-32-alt/tuned" and len(network.sha256) == 64
    encoder = load_encoder(network, CPU)
    with torch.no_grad():
        assert torch.allclose(encoder.texts(["a cat"]), model.eval().encode_text(open_clip.tokenize(["a cat"])))
    assert encoder.overlong("word " * 76) and not encoder.overlong("word " * 75)


def test_transformers_clip_gives_unwrapped_features(clip_folder):
    encoder = load_encoder(find_pickscore(str(clip_folder), True), CPU)
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        image = encoder.images(encoder.prepare(picture())[None])
        vision = model.vision_model(pixel_values=encoder.prepare(picture())[None]).pooler_output
        assert torch.allclose(image, model.visual_projection(vision)) and image.shape == (1, 16)
        texts = encoder.texts(["a red star", LONG, LONG + " star"])
    assert texts.shape == (3, 16) and encoder.scale == pytest.approx(model.logit_scale.exp().item())
    assert encoder.overlong(LONG) and not encoder.overlong("a red star")


def test_prompts_that_differ_within_the_limit_differ_when_cut(clip_folder):
    """Cutting must keep the end-of-text token, from which the text's features are read."""
    encoder = load_encoder(find_pickscore(str(clip_folder), True), CPU)
    with torch.no_grad():
        red, blue = unit(encoder.texts(["a red star " + LONG, "a blue circle " + LONG]))
    assert (red @ blue).item() < 0.9999


def test_frames(clip_folder):
    wide = Image.new("RGB", (64, 32), "black")
    wide.paste((255, 255, 255), (16, 0, 48, 32))
    means = {}
    for frame in ("processor", "square", "squash"):
        encoder = load_encoder(find_encoder(str(clip_folder), True, {"frame": frame}), CPU)
        out = encoder.prepare(wide)
        assert out.shape == (3, 32, 32) and frame in encoder.preprocess
        means[frame] = (out > 0).float().mean().item()
    assert means["square"] == 1 and means["squash"] == pytest.approx(0.5, abs=0.05)


def test_dinov2_gives_the_normed_class_token(dino_folder):
    encoder = load_encoder(find_encoder(str(dino_folder), True), CPU)
    with torch.no_grad():
        pixels = encoder.prepare(picture())[None]
        expected = Dinov2Model.from_pretrained(dino_folder)(pixels).last_hidden_state[:, 0]
        assert torch.allclose(encoder.images(pixels), expected, atol=1e-6)
    assert encoder.texts is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere is not there"),
        ("/no/such/folder", "is not there"),
        ("owner/name", "owner/name is not on this machine"),
        ("assets", "allowed are open_clip, CLIP and DINOv2"),
    ],
)
def test_encoders_that_cannot_be_had(name, message):
    with pytest.raises(Missing, match=message):
        find_encoder(name, True)


def test_open_clip_tags_that_cannot_be_had():
    with pytest.raises(Missing, match="neither a folder nor an architecture"):
        find_open_clip("ViT-Z", "openai", True)
    with pytest.raises(
        Missing, match=r"nothing is neither a file nor a tag of ViT-H-14; allowed are .*laion2b_s32b_b79k"
    ):
        find_open_clip("ViT-H-14", "nothing", True)


def test_damaged_weights_are_one_line(tmp_path, clip_folder):
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be loaded as transformers"):
        load_encoder(Network("transformers", "x", str(tmp_path), "0", {"model_type": "clip"}), CPU)
