"""ImageReward (Xu et al., arXiv 2304.05977): BLIP reads image and prompt together, a small head gives a number.

The published file has BLIP's own names; its tensors go into transformers' BLIP, which computes the same. Sizes follow
from the tensors; every attention head has 64 channels. The package `image-reward` is not maintained.

Letters: N images, L tokens, d channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from vqdm.documents import first_line
from vqdm.errors import UserError
from vqdm.metrics.networks import Network

LONGEST, HEAD_WIDTH = 35, 64
# Of the rewards that the published model was measured on; a reported reward is in units of this deviation.
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
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
        words = tokenizer(prompts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt").to(device)
        patches = vision(pixel_values=pixels).last_hidden_state  # [N, 1 + patches, d]
        states = text(input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=patches)
        return (head(states.last_hidden_state[:, 0])[:, 0] - MEAN) / DEVIATION

    side = vision.config.image_size
    return RewardModel(_preparation(side), rewards, lambda prompt: len(tokenizer(prompt).input_ids) > LONGEST)


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
