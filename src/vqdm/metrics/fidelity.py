"""How far the quantized model's pictures are from the full-precision model's, at equal prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vqdm.documents import first_line
from vqdm.errors import UserError
from vqdm.tracking import log

PAIR_SCORES = ("mse", "mae", "psnr_db", "lpips")
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"
SMALLEST_FOR_LPIPS = {"alex": 31, "vgg": 16}  # pixels of the shorter side that leave each layer of the backbone one


def to_tensor(images: list[Image.Image]) -> Tensor:
    """float32 [N, 3, H, W] in [0, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])  # [N, H, W, 3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def pair_scores(reference: Tensor, images: Tensor) -> dict[str, float | None]:
    """Mean squared error, mean absolute error and PSNR (dB) of pixels in [0, 1]; LPIPS where its weights are at hand.

    PSNR is the mean over pictures of 10·log₁₀(1 / MSE), a picture's MSE taken as at least 1e-10.
    """
    squared = squared_errors(reference, images)
    return {
        "mse": squared.mean().item(),
        "mae": (reference - images).abs().mean().item(),
        "psnr_db": psnr(squared).mean().item(),
        "lpips": lpips(reference, images),
    }


def squared_errors(reference: Tensor, images: Tensor) -> Tensor:
    """Each picture's mean squared error over channels and pixels: [N, 3, H, W] twice → [N]."""
    return (reference - images).square().flatten(1).mean(1)


def psnr(squared: Tensor) -> Tensor:
    """10·log₁₀(1 / MSE) in dB for pixels in [0, 1]; equal pictures have 100 dB rather than infinitely many."""
    return -10 * squared.clamp(min=1e-10).log10()


def ssim(reference: Tensor, images: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of each pair: float32 [N, 3, H, W] in [0, 1], twice → [N].

    Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03, on RGB, mirrored at the borders.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")


def load_lpips(net: str, backbone: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (arXiv 1801.03924) with its backbone from a file: [N, 3, H, W] in [0, 1], twice → [N].

    Args:
        net: alex or vgg; the heads ship with torchmetrics.

    Raises:
        UserError: the file is not that backbone.
    """
    # The public class can only download the backbone; the module beneath it takes one.
    from torchmetrics.functional.image.lpips import _LPIPS

    model = _LPIPS(net=net, pnet_rand=True)
    try:
        _fill(model.net, torch.load(backbone, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"{backbone} does not hold LPIPS's backbone {net}: {first_line(error)}") from None
    model = model.eval().to(device)
    return lambda first, second: model(first, second, normalize=True).flatten()


def _fill(slices: nn.Module, state: dict[str, Tensor]) -> None:
    """Load torchvision's `features.3.weight` into the slice that holds layer 3."""
    for part in slices.children():
        for index, layer in part.named_children():
            prefix = f"features.{index}."
            layer.load_state_dict({key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)})


def lpips(reference: Tensor, images: Tensor) -> float | None:
    """Mean LPIPS (AlexNet, arXiv 1801.03924), or None where the backbone is not on this machine, or is damaged.

    None as well for pictures that are too small for it.
    """
    backbone = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE
    if min(images.shape[2:]) < SMALLEST_FOR_LPIPS["alex"] or not backbone.is_file():
        return None
    try:
        distance = load_lpips("alex", backbone, torch.device("cpu"))
    except UserError as error:
        log.warning("warning: LPIPS is left out: %s", error)
        return None
    pairs = zip(reference.split(8), images.split(8), strict=True)
    return torch.cat([distance(first, second) for first, second in pairs]).mean().item()


def decibels(error: float, signal: float) -> float:
    """10·log₁₀(error / signal)."""
    return 10 * math.log10(max(error, 1e-30) / max(signal, 1e-30))
