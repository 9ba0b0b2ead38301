"""Encoders from random models on disk, compared with the libraries' own use of them."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import inception_v3
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
from vqdm.metrics.encoders import INCEPTION_SIDE, RESIZES, load_encoder, load_inception, unit
from vqdm.metrics.networks import Network, find_encoder, find_open_clip, find_pickscore

SHAPES = "assets/shapes-clip"
CPU = torch.device("cpu")
SIDES = (INCEPTION_SIDE, INCEPTION_SIDE)
LONG = "a big red circle " * 30


def sample_image(width: int = 40, height: int = 32) -> Image.Image:
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
        pixels = prepare(sample_image())[None]
        expected = model.eval().encode_image(pixels), model.encode_text(tokens)
        assert torch.equal(encoder.images(encoder.prepare(sample_image())[None]), expected[0])
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
        image = encoder.images(encoder.prepare(sample_image())[None])
        vision = model.vision_model(pixel_values=encoder.prepare(sample_image())[None]).pooler_output
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


def test_dinov2_gives_the_normed_class_token(dino_folder):
    encoder = load_encoder(find_encoder(str(dino_folder), True), CPU)
    with torch.no_grad():
        pixels = encoder.prepare(sample_image())[None]
        expected = Dinov2Model.from_pretrained(dino_folder)(pixels).last_hidden_state[:, 0]
        assert torch.allclose(encoder.images(pixels), expected, atol=1e-6)
    assert encoder.texts is None


def test_damaged_weights_are_one_line(tmp_path, clip_folder):
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be loaded as transformers"):
        load_encoder(Network("transformers", "x", str(tmp_path), "0", {"model_type": "clip"}), CPU)


# --------------------------------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights whose features differ from image to image."""
    torch.manual_seed(0)
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(net.state_dict(), path)
    return path


def smooth_image(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_features_and_legacy_resize_are_those_of_torch_fidelity(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    ours = load_inception(weights, torch.device("cpu"))
    images = [smooth_image(64, 64), smooth_image(400, 330)]
    for image in images:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = theirs(pixels)[0]
            features = ours(RESIZES["legacy"](image)[None])
        assert features.shape == (1, 2048) and expected.std() > 0.1
        assert torch.allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_pytorch_mode_is_the_plain_interpolation():
    image = smooth_image(512, 512)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    expected = 2 * F.interpolate(pixels, size=SIDES, mode="bilinear", align_corners=False)[0] - 1
    assert torch.equal(RESIZES["pytorch"](image), expected)


def test_clean_mode_keeps_fractions_and_stays_in_range():
    image = smooth_image(512, 384)
    out = RESIZES["clean"](image)
    levels = out * 128 + 128
    rounded = torch.from_numpy(np.array(image.resize(SIDES, Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert out.shape == (3, INCEPTION_SIDE, INCEPTION_SIDE) and out.dtype == torch.float32
    assert (levels - rounded).abs().max() < 2 and (levels != levels.round()).float().mean() > 0.9
    assert levels.min() >= 0 and levels.max() <= 255


def test_vqdm_mode_takes_the_middle():
    image = Image.new("RGB", (1024, 512), "black")
    image.paste((255, 255, 255), (256, 0, 768, 512))
    assert (RESIZES["vqdm"](image)[:, :, 8:-8] > 0.99).all()


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (640, 480), (300, 257), (64, 90)])
def test_vqdm_mode_rounds_sizes_as_the_paper_s_code(size):
    """It is torchvision's Resize and CenterCrop; most images of COCO are not square."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    width, height = (256 if side == min(size) else int(256 * side / min(size)) for side in size)
    left, top = (round((side - 256) / 2) for side in (width, height))
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    expected = RESIZES["pytorch"](resized.crop((left, top, left + 256, top + 256)))
    assert torch.equal(RESIZES["vqdm"](image), expected)


def test_modes_differ():
    image = smooth_image(640, 640)
    outs = [prepare(image) for prepare in RESIZES.values()]
    assert all((a - b).abs().max() > 1e-3 for k, a in enumerate(outs) for b in outs[:k])


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        load_inception(tmp_path / "x.pth", torch.device("cpu"))


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_inception_is_not_unpickled(tmp_path):
    torch.save({"a": Payload(tmp_path / "mark")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        load_inception(tmp_path / "x.pth", torch.device("cpu"))
    assert not (tmp_path / "mark").exists()
