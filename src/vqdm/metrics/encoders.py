"""Networks that give a feature vector for an image, some for a text too; float32, TF32 off, no gradients."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2.functional import center_crop, resize

from vqdm.documents import first_line
from vqdm.errors import UserError
from vqdm.metrics.networks import Network

INCEPTION_SIDE = 299


@dataclass(frozen=True)
class Encoder:
    """A network as the scores use it.

    Attributes:
        prepare: an RGB image → float32 [3, H, W], on the CPU.
        images: [N, 3, H, W] on the device → features [N, d].
        preprocess: how `prepare` works, in words that statistics files carry.
        texts: prompts → features [N, d]; None for a network of images only.
        overlong: whether a prompt is cut at the longest text of the network.
        scale: exp(logit_scale) of a CLIP model.
    """

    prepare: Callable[[Image.Image], Tensor]
    images: Callable[[Tensor], Tensor]
    preprocess: str
    texts: Callable[[list[str]], Tensor] | None = None
    overlong: Callable[[str], bool] | None = None
    scale: float = 100.0


@contextmanager
def exact() -> Iterator[None]:
    """Disable gradients, and TF32 in convolutions and matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def load_encoder(network: Network, device: torch.device) -> Encoder:
    """Load a network onto a device.

    Raises:
        UserError: its files do not hold what they should.
    """
    loaders = {"inception": _inception, "open_clip": _open_clip, "transformers": _transformers}
    try:
        return loaders[network.kind](network, device)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise
        raise UserError(f"{network.source} cannot be loaded as {network.kind}: {first_line(error)}") from None


def unit(features: Tensor) -> Tensor:
    """Normalize rows [N, d] to length one, float32."""
    return F.normalize(features.float(), dim=-1)


# --------------------------------------------------------------------------------------------- open_clip


def _open_clip(network: Network, device: torch.device) -> Encoder:
    import open_clip

    logging.disable(logging.INFO)  # open_clip logs every step of loading to the root logger
    try:
        model, _, prepare = open_clip.create_model_and_transforms(
            network.source, pretrained=network.options["pretrained"], weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(network.source)
    finally:
        logging.disable(logging.NOTSET)
    model = model.eval().requires_grad_(False).to(device)
    return Encoder(
        prepare=prepare,
        images=model.encode_image,
        preprocess=f"open_clip {model.visual.image_size}",
        texts=lambda prompts: model.encode_text(tokenizer(prompts).to(device)),
        overlong=lambda prompt: _open_clip_length(tokenizer, prompt) > model.context_length,
        scale=model.logit_scale.exp().item(),
    )


def _open_clip_length(tokenizer, prompt: str) -> int:
    """Count the tokens of an uncut prompt, start and end included."""
    if hasattr(tokenizer, "tokenizer"):
        ids = tokenizer.tokenizer(tokenizer.clean_fn(prompt), truncation=False, padding=False).input_ids
        return len(ids)
    return len(tokenizer.encode(prompt)) + 2


# --------------------------------------------------------------------------------------------- transformers


def _transformers(network: Network, device: torch.device) -> Encoder:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model

    kind = {"clip": CLIPModel, "dinov2": Dinov2Model}[network.options["model_type"]]
    model = kind.from_pretrained(network.source, dtype=torch.float32, local_files_only=True)
    model = model.eval().requires_grad_(False).to(device)
    files = network.options.get("processor", network.source)
    processor = AutoImageProcessor.from_pretrained(files, backend="pil", local_files_only=True)
    size = dict(getattr(processor, "crop_size", None) or processor.size)
    preprocess = f"transformers processor {size.get('height') or size['shortest_edge']}"

    def prepare(image: Image.Image) -> Tensor:
        return torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"][0])

    if kind is Dinov2Model:
        return Encoder(prepare, lambda pixels: model(pixels).pooler_output, preprocess)
    tokenizer = AutoTokenizer.from_pretrained(files, local_files_only=True)
    longest = model.config.text_config.max_position_embeddings
    # The tokenizer keeps the end-of-text token, from which CLIP reads its result, when it cuts.
    tokens = partial(tokenizer, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return Encoder(
        prepare=prepare,
        images=lambda pixels: _pooled(model.get_image_features(pixel_values=pixels)),
        preprocess=preprocess,
        texts=lambda prompts: _pooled(model.get_text_features(**tokens(prompts).to(device))),
        overlong=lambda prompt: len(tokenizer(prompt).input_ids) > longest,
        scale=model.logit_scale.exp().item(),
    )


def _pooled(output) -> Tensor:
    """Unwrap the features, which transformers wraps from 5.0 on."""
    return getattr(output, "pooler_output", output)


# --------------------------------------------------------------------------------------------- Inception


def _inception(network: Network, device: torch.device) -> Encoder:
    mode = network.options["mode"]
    return Encoder(RESIZES[mode], load_inception(Path(network.source), device), mode)


def load_inception(path: Path, device: torch.device) -> nn.Module:
    """Load torch-fidelity's Inception without its resize: float32 [N, 3, 299, 299] in [-1, 1] → [N, 2048].

    Weights are the port of TensorFlow's inception-2015-12-05 (SHA-256 6726825d…).

    Raises:
        UserError: the file does not hold them.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:
        raise UserError(f"--fid_features {path} does not hold Inception's weights: {first_line(error)}") from None
    # Its forward() resizes as TensorFlow 1 does. Its layers are called in their order, all but the classifier.
    return nn.Sequential(*list(net.children())[:-1], nn.Flatten()).eval().to(device)


def clean(image: Image.Image) -> Tensor:
    """Resize by antialiased bicubic in float, per channel, never rounded (Parmar et al., arXiv 2104.11222)."""
    channels = [
        np.asarray(Image.fromarray(channel).resize((INCEPTION_SIDE, INCEPTION_SIDE), Image.Resampling.BICUBIC))
        for channel in np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    ]
    return (torch.from_numpy(np.stack(channels)).clamp(0, 255) - 128) / 128


def legacy(image: Image.Image) -> Tensor:
    """Resize as TensorFlow 1 does: bilinear, corners not aligned, pixel centres not at halves, no antialiasing."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    side = (INCEPTION_SIDE, INCEPTION_SIDE)
    return (interpolate_bilinear_2d_like_tensorflow1x(_levels(image), side, align_corners=False)[0] - 128) / 128


def pytorch(image: Image.Image) -> Tensor:
    """Resize by bilinear at half-pixel centres without antialiasing, as pytorch-fid does."""
    side = (INCEPTION_SIDE, INCEPTION_SIDE)
    return 2 * F.interpolate(_levels(image) / 255, size=side, mode="bilinear", align_corners=False)[0] - 1


def vqdm(image: Image.Image) -> Tensor:
    """Resize by Lanczos to a shorter side of 256, crop the middle 256×256, then as `pytorch`."""
    return pytorch(center_crop(resize(image, [256], InterpolationMode.LANCZOS), [256]))


def _levels(image: Image.Image) -> Tensor:
    """Return float32 [1, 3, H, W], 0 to 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None]


# Mode of --fid_mode → how an RGB image becomes float32 [3, 299, 299] in [-1, 1].
RESIZES: dict[str, Callable[[Image.Image], Tensor]] = {
    "clean": clean,
    "legacy": legacy,
    "pytorch": pytorch,
    "vqdm": vqdm,
}


# ---------------------------------------------------------------------------------------------------------- ImageReward
#
# Xu et al., arXiv 2304.05977: BLIP reads image and prompt together, a small head gives a number.
#
# The published file has BLIP's own names; its tensors go into transformers' BLIP, which computes the same. Sizes follow
# from the tensors; every attention head has 64 channels. The package `image-reward` is not maintained.
#
# Letters: N images, L tokens, d channels.

REWARD_TOKENS = 35  # that are read of a prompt
HEAD_WIDTH = 64
# Of the rewards that the published model was measured on; a reported reward is in units of this deviation.
REWARD_MEAN, REWARD_DEVIATION = 0.16717362830052426, 1.0333394966054072
CHANNEL_MEAN, CHANNEL_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Part of a name in BLIP's image tower → its name in transformers.
_RENAMED = {
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^cls_token$": "embeddings.class_embedding",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.attn\.": ".self_attn.",
    r"\.norm([12])\.": r".layer_norm\1.",
}


@dataclass(frozen=True)
class RewardModel:
    """ImageReward as the scores use it.

    Attributes:
        prepare: an RGB image → float32 [3, H, W], on the CPU.
        rewards: prompts and images [N, 3, H, W] on the device → [N].
        overlong: whether a prompt is cut off.
    """

    prepare: Callable[[Image.Image], Tensor]
    rewards: Callable[[list[str], Tensor], Tensor]
    overlong: Callable[[str], bool]

    def columns(self, prompts: list[str], pixels: list[Tensor]) -> list[Tensor]:
        """Compute the rewards of each of several sets of images of the prompts: [N] each."""
        return [self.rewards(prompts, one) for one in pixels]


def load_image_reward(network: Network, device: torch.device) -> RewardModel:
    """Load the model onto a device.

    Raises:
        UserError: the file does not hold it.
    """
    from transformers import AutoTokenizer

    try:
        state = torch.load(Path(network.source), map_location="cpu", weights_only=True)
        vision = image_tower(_part(state, "blip.visual_encoder.")).to(device)
        text = text_tower(_part(state, "blip.text_encoder.")).to(device)
        head = linear_layers(_part(state, "mlp.layers.")).to(device)
        tokenizer = AutoTokenizer.from_pretrained(network.options["tokenizer"], local_files_only=True)
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"--image_reward_model {network.source} does not hold ImageReward: {reason}") from None

    def rewards(prompts: list[str], pixels: Tensor) -> Tensor:
        words = tokenizer(prompts, padding=True, truncation=True, max_length=REWARD_TOKENS, return_tensors="pt").to(
            device
        )
        patches = vision(pixel_values=pixels).last_hidden_state  # [N, 1 + patches, d]
        states = text(input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=patches)
        return (head(states.last_hidden_state[:, 0])[:, 0] - REWARD_MEAN) / REWARD_DEVIATION

    side = vision.config.image_size
    return RewardModel(_preparation(side), rewards, lambda prompt: len(tokenizer(prompt).input_ids) > REWARD_TOKENS)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the float32 tensors under a prefix, without it. Raises KeyError if there are none."""
    found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        raise KeyError(f"no tensor is called {prefix}*")
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def image_tower(state: dict[str, Tensor]) -> nn.Module:
    """Build BLIP's vision transformer from its tensors."""
    from transformers import BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel

    patches, width = state["pos_embed"].shape[1] - 1, state["pos_embed"].shape[2]
    patch = state["patch_embed.proj.weight"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_count(state, "blocks"),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return _filled(BlipVisionModel(config), {_renamed(name): value for name, value in state.items()})


def text_tower(state: dict[str, Tensor]) -> nn.Module:
    """Build BLIP's text transformer, with attention to the image in every layer, from its tensors."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_count(state, "encoder.layer"),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
        pad_token_id=0,
    )
    return _filled(BlipTextModel(config, add_pooling_layer=False), state)


def linear_layers(state: dict[str, Tensor]) -> nn.Module:
    """Build the head: linear layers in a row; the dropout between them does nothing after training."""
    numbers = sorted({int(name.partition(".")[0]) for name in state})
    layers = []
    for number in numbers:
        weight, bias = state[f"{number}.weight"], state[f"{number}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layers.append(_filled(layer, {"weight": weight, "bias": bias}))
    return nn.Sequential(*layers)


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """Count the layers under a prefix."""
    return len({found[1] for name in state if (found := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})


def _renamed(name: str) -> str:
    for pattern, ours in _RENAMED.items():
        name = re.sub(pattern, ours, name)
    return name


def _filled(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load all tensors of a module from the state, which may hold more. Raises RuntimeError for missing ones."""
    wanted = module.state_dict().keys()
    module.load_state_dict({name: value for name, value in state.items() if name in wanted})
    return module.eval().requires_grad_(False)


def _preparation(side: int) -> Callable[[Image.Image], Tensor]:
    return transforms.Compose(
        [
            transforms.Resize(side, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.PILToTensor(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(CHANNEL_MEAN, CHANNEL_DEVIATION),
        ]
    )
