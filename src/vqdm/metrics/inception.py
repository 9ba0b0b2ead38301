"""The Inception network of the FID, and the four ways in which pictures have been brought to its 299 pixels.

Weights are the port of TensorFlow's inception-2015-12-05 (SHA-256 6726825d…) with 1008 classes. It is torchvision's
network but for the pooling inside its blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import inception_v3
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from vqdm.documents import first_line
from vqdm.errors import UserError

SIDE, WIDTH, CLASSES = 299, 2048, 1008
AVERAGE = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
LARGEST = ("Mixed_7c",)


def empty_inception() -> nn.Module:
    """The network in evaluation mode, without weights: float32 [N, 3, 299, 299] in [-1, 1] → [N, 2048]."""
    net = inception_v3(weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False)
    average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    largest = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    for names, pool in ((AVERAGE, average), (LARGEST, largest)):
        for name in names:
            _repool(net.get_submodule(name), pool)
    return net.eval()


def _repool(block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
    """Let a block's pooling branch see `pool` of the block's input; torchvision averages over the padding too."""
    seen: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, __: pool(seen.pop()))


def load_inception(path: Path, device: torch.device) -> nn.Module:
    """The network with weights, its classifier left out.

    Raises:
        UserError: the file does not hold them.
    """
    with torch.device("meta"):
        net = empty_inception()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    except Exception as error:
        raise UserError(f"--fid_features {path} does not hold Inception's weights: {first_line(error)}") from None
    net.fc = nn.Identity()
    return net.requires_grad_(False).to(device)


# --------------------------------------------------------------------------------------------- pictures to 299 pixels


def clean(image: Image.Image) -> Tensor:
    """Antialiased bicubic in float, each channel by itself, never rounded (Parmar et al., arXiv 2104.11222)."""
    channels = [
        np.asarray(Image.fromarray(channel).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for channel in np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    ]
    return (torch.from_numpy(np.stack(channels)).clamp(0, 255) - 128) / 128


def legacy(image: Image.Image) -> Tensor:
    """TensorFlow 1's bilinear resize: corners not aligned, pixel centres not at halves, no antialiasing."""
    pixels = _channels_first(image)
    columns, right, x = _taps(pixels.shape[2])
    rows, below, y = _taps(pixels.shape[1])
    wide = pixels[:, :, columns] * (1 - x) + pixels[:, :, right] * x  # [3, H, 299]
    y = y[:, None]
    return (wide[:, rows] * (1 - y) + wide[:, below] * y - 128) / 128


def _taps(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of 299 outputs: index to the left, index to the right, and the right one's weight."""
    position = torch.arange(SIDE) * (size / SIDE)
    left = position.floor().long()
    return left, (left + 1).clamp(max=size - 1), position - left


def pytorch(image: Image.Image) -> Tensor:
    """Bilinear at half-pixel centres without antialiasing, as pytorch-fid does."""
    pixels = _channels_first(image)[None] / 255
    return 2 * F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0] - 1


def vqdm(image: Image.Image) -> Tensor:
    """Lanczos to a shorter side of 256, the middle 256×256 of it, then as `pytorch`; sizes as torchvision rounds."""
    return pytorch(center_crop(resize(image, [256], InterpolationMode.LANCZOS), [256]))


def _channels_first(image: Image.Image) -> Tensor:
    """float32 [3, H, W], 0 to 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


PREPARE: dict[str, Callable[[Image.Image], Tensor]] = {
    "clean": clean,
    "legacy": legacy,
    "pytorch": pytorch,
    "vqdm": vqdm,
}
