"""ImageReward from a small random file in the published names, against the two transformers written out plainly."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer

from train_text import known_words, make_tokenizer
from vqdm.errors import UserError
from vqdm.metrics.encoders import REWARD_DEVIATION, REWARD_MEAN, REWARD_TOKENS, load_image_reward
from vqdm.metrics.networks import Unavailable, find_image_reward

CPU = torch.device("cpu")
EYE, READER, SIDE, PATCH, LAYERS = 192, 128, 32, 8, 2
PROMPTS = ["a red circle", "a big striped blue star on a white background"]


def transformer_shapes(words: int) -> dict[str, tuple[int, ...]]:
    """Names of the published file → shapes, small."""
    eye = {"cls_token": (1, 1, EYE), "pos_embed": (1, 1 + (SIDE // PATCH) ** 2, EYE)}
    eye |= {"patch_embed.proj.weight": (EYE, 3, PATCH, PATCH), "patch_embed.proj.bias": (EYE,)}
    eye |= {"norm.weight": (EYE,), "norm.bias": (EYE,)}
    read = {"embeddings.word_embeddings.weight": (words, READER), "embeddings.position_embeddings.weight": (40, READER)}
    read |= {f"embeddings.LayerNorm.{kind}": (READER,) for kind in ("weight", "bias")}
    for k in range(LAYERS):
        pairs = {"attn.qkv": (3 * EYE, EYE), "attn.proj": (EYE, EYE), "mlp.fc1": (256, EYE), "mlp.fc2": (EYE, 256)}
        eye |= linears(f"blocks.{k}.", pairs, ("norm1", "norm2"), EYE)
        pairs = {"intermediate.dense": (256, READER), "output.dense": (READER, 256)}
        for name, width in (("attention", READER), ("crossattention", EYE)):
            pairs |= {f"{name}.self.query": (READER, READER), f"{name}.output.dense": (READER, READER)}
            pairs |= {f"{name}.self.{one}": (READER, width) for one in ("key", "value")}
        norms = ("attention.output.LayerNorm", "crossattention.output.LayerNorm", "output.LayerNorm")
        read |= linears(f"encoder.layer.{k}.", pairs, norms, READER)
    head = linears("", {"0": (16, READER), "2": (8, 16), "4": (1, 8)}, (), 0)
    parts = {"blip.visual_encoder.": eye, "blip.text_encoder.": read, "mlp.layers.": head}
    return {prefix + name: shape for prefix, part in parts.items() for name, shape in part.items()}


def linears(prefix: str, pairs: dict, norms: tuple, width: int) -> dict[str, tuple[int, ...]]:
    out = {f"{prefix}{name}.weight": shape for name, shape in pairs.items()}
    out |= {f"{prefix}{name}.bias": shape[:1] for name, shape in pairs.items()}
    return out | {f"{prefix}{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = make_tokenizer(known_words())
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shapes = transformer_shapes(len(tokenizer))
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    for name, value in state.items():
        if "norm" in name.lower() and name.endswith("weight"):
            value += 1
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, folder / "ImageReward.pt")
    return folder


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def plain_rewards(state: dict, ids: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """The whole model from its tensors: pre-norm image tower, post-norm text tower, linear head."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, allowed=None):
        split = [x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v)]  # [N, heads, L, 64]
        weights = split[0] @ split[1].transpose(2, 3) / math.sqrt(64)
        weights = weights if allowed is None else weights.masked_fill(~allowed[:, None, None], -torch.inf)
        return (weights.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)

    eye = "blip.visual_encoder."
    patches = F.conv2d(
        pixels, state[f"{eye}patch_embed.proj.weight"], state[f"{eye}patch_embed.proj.bias"], stride=PATCH
    )
    x = torch.cat([state[f"{eye}cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + state[f"{eye}pos_embed"]
    for k in range(LAYERS):
        block = f"{eye}blocks.{k}."
        q, key, v = linear(norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, key, v), f"{block}attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")), f"{block}mlp.fc2")
    seen = norm(x, f"{eye}norm", 1e-6)

    text = "blip.text_encoder."
    places = state[f"{text}embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(state[f"{text}embeddings.word_embeddings.weight"][ids] + places, f"{text}embeddings.LayerNorm", 1e-12)
    for k in range(LAYERS):
        layer = f"{text}encoder.layer.{k}."
        for name, source, allowed in (("attention", None, mask.bool()), ("crossattention", seen, None)):
            other = y if source is None else source
            q, key, v = (
                linear(at, f"{layer}{name}.self.{one}") for at, one in ((y, "query"), (other, "key"), (other, "value"))
            )
            mixed = linear(attend(q, key, v, allowed), f"{layer}{name}.output.dense")
            y = norm(y + mixed, f"{layer}{name}.output.LayerNorm", 1e-12)
        wide = F.gelu(linear(y, f"{layer}intermediate.dense"))
        y = norm(y + linear(wide, f"{layer}output.dense"), f"{layer}output.LayerNorm", 1e-12)
    values = y[:, 0]
    for number in (0, 2, 4):
        values = linear(values, f"mlp.layers.{number}")
    return (values[:, 0] - REWARD_MEAN) / REWARD_DEVIATION


def test_it_equals_the_plain_computation(folder, pixels):
    model = load_image_reward(find_image_reward(str(folder), True), CPU)
    state = torch.load(folder / "ImageReward.pt")
    words = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    expected = plain_rewards(state, words.input_ids, words.attention_mask, pixels)
    assert torch.allclose(model.rewards(PROMPTS, pixels), expected, atol=1e-4)
    swapped = plain_rewards(state, words.input_ids, words.attention_mask, pixels.flip(0))
    assert (expected[0] - expected[1]).abs() > 0.01 and (expected - swapped).abs().min() > 0.01


def test_rewards_do_not_depend_on_the_rest_of_the_batch(folder, pixels):
    model = load_image_reward(find_image_reward(str(folder), True), CPU)
    alone = torch.cat([model.rewards([prompt], one[None]) for prompt, one in zip(PROMPTS, pixels, strict=True)])
    (together,) = model.columns(PROMPTS, [pixels])
    assert torch.allclose(together, alone, atol=1e-5)


def test_long_prompts_are_cut_and_counted(folder, pixels):
    model = load_image_reward(find_image_reward(str(folder), True), CPU)
    long = "a big red circle " * 30
    assert model.overlong(long) and not model.overlong(PROMPTS[1])
    assert torch.isfinite(model.rewards([long], pixels[:1])).all() and REWARD_TOKENS == 35


def test_images_are_brought_to_the_middle_square(folder):
    model = load_image_reward(find_image_reward(str(folder), True), CPU)
    pixels = np.full((64, 128, 3), 255, dtype=np.uint8)
    pixels[:, :32] = pixels[:, 96:] = 0
    prepared = model.prepare(Image.fromarray(pixels))
    assert prepared.shape == (3, SIDE, SIDE) and prepared[:, :, 4:-4].min() > 1.9


def test_other_files_are_refused(folder, tmp_path):
    with pytest.raises(Unavailable, match=r"holds no ImageReward\.pt"):
        find_image_reward(str(tmp_path), True)
    state = torch.load(folder / "ImageReward.pt")
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("a\n")
    with pytest.raises(UserError, match="does not hold ImageReward"):
        load_image_reward(find_image_reward(str(tmp_path), True), CPU)
