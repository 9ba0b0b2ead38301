"""How far the quantized model's pictures are from the full-precision model's, at equal prompts and seeds."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"


def to_tensor(images: list[Image.Image]) -> Tensor:
    """float32 [N, 3, H, W] in [0, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])  # [N, H, W, 3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def pair_scores(reference: Tensor, images: Tensor) -> dict[str, float | None]:
    """Mean squared error, mean absolute error and PSNR (dB) of pixels in [0, 1]; LPIPS where its weights are at hand.

    PSNR is the mean over pictures of 10·log₁₀(1 / MSE), a picture's MSE taken as at least 1e-10.
    """
    squared = (reference - images).square().flatten(1).mean(1)  # [N]
    return {
        "mse": squared.mean().item(),
        "mae": (reference - images).abs().mean().item(),
        "psnr_db": (-10 * squared.clamp(min=1e-10).log10()).mean().item(),
        "lpips": lpips(reference, images),
    }


def lpips(reference: Tensor, images: Tensor) -> float | None:
    """LPIPS (AlexNet, arXiv 1801.03924) by torchmetrics, or None where the backbone is not on this machine."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE).exists():
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    for pair in zip(reference.split(8), images.split(8), strict=True):
        metric.update(*pair)
    return metric.compute().item()


def decibels(error: float, signal: float) -> float:
    """10·log₁₀(error / signal)."""
    return 10 * math.log10(max(error, 1e-30) / max(signal, 1e-30))
