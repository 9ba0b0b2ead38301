"""How far images are from reference images of equal prompts and seeds: PSNR, SSIM, LPIPS; and errors in dB.

SSIM and LPIPS are those of torchmetrics, which is loaded with the first call of either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqdm.documents import first_line
from vqdm.errors import UserError
from vqdm.tracking import log

PAIR_SCORES = ("mse", "mae", "psnr_db", "lpips")
LPIPS_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}  # as torchvision calls the backbones
SMALLEST_FOR_LPIPS = {"alex": 31, "vgg": 16}  # pixels of the shorter side that leave each layer of the backbone one
SMALLEST_FOR_SSIM = 11


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Return float32 [N, 3, H, W] in [0, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])  # [N, H, W, 3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def pair_scores(reference: Tensor, images: Tensor) -> dict[str, float | None]:
    """Compute mean squared error, mean absolute error, PSNR (dB) and LPIPS of images [N, 3, H, W] in [0, 1].

    PSNR is the mean over images of 10·log₁₀(1 / MSE), the MSE of an image taken as at least 1e-10. LPIPS (AlexNet) is
    None if its backbone is not on this machine or is damaged, or if the images are too small for it.
    """
    squared = squared_errors(reference, images)
    return {
        "mse": squared.mean().item(),
        "mae": (reference - images).abs().mean().item(),
        "psnr_db": psnr(squared).mean().item(),
        "lpips": lpips(reference, images),
    }


def squared_errors(reference: Tensor, images: Tensor) -> Tensor:
    """Compute the mean squared error of each image over channels and pixels: [N, 3, H, W] twice → [N]."""
    return (reference - images).square().flatten(1).mean(1)


def psnr(squared: Tensor) -> Tensor:
    """Compute 10·log₁₀(1 / MSE) in dB for pixels in [0, 1]; equal images have 100 dB rather than infinitely many."""
    return -10 * squared.clamp(min=1e-10).log10()


def ssim(reference: Tensor, images: Tensor) -> Tensor:
    """Compute the structural similarity (Wang et al., 2004) of each pair: [N, 3, H, W] in [0, 1], twice → [N].

    Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03, on RGB, mirrored at the borders.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none").reshape(-1)


def load_lpips(net: str, backbone: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Load LPIPS (arXiv 1801.03924) with its backbone from a file: [N, 3, H, W] in [0, 1], twice → [N].

    Args:
        net: alex or vgg; the heads ship with torchmetrics.

    Raises:
        UserError: the file does not hold that backbone.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    folder_of_hub = torch.hub.get_dir()
    try:
        torch.load(backbone, map_location="cpu", weights_only=True)  # torchvision would unpickle anything
        with TemporaryDirectory() as folder:
            # torchmetrics takes the backbone from the folder of torch.hub only.
            (Path(folder) / "checkpoints").mkdir()
            (Path(folder) / "checkpoints" / LPIPS_FILES[net]).symlink_to(backbone.resolve())
            torch.hub.set_dir(folder)
            metric = LearnedPerceptualImagePatchSimilarity(net, reduction="none", normalize=True)
    except Exception as error:
        raise UserError(f"{backbone} does not hold LPIPS's backbone {net}: {first_line(error)}") from None
    finally:
        torch.hub.set_dir(folder_of_hub)
    metric = metric.to(device)

    def distances(first: Tensor, second: Tensor) -> Tensor:
        values = metric(first, second).reshape(-1)
        metric.reset()  # it would keep every value for a mean over all calls
        return values

    return distances


def lpips(reference: Tensor, images: Tensor) -> float | None:
    """Compute the mean LPIPS (AlexNet) with the backbone in the folder of torch.hub, or return None without it."""
    backbone = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_FILES["alex"]
    if min(images.shape[2:]) < SMALLEST_FOR_LPIPS["alex"] or not backbone.is_file():
        return None
    try:
        distance = load_lpips("alex", backbone, torch.device("cpu"))
    except (UserError, ImportError) as error:  # torchmetrics comes with the extra for metrics
        log.warning("warning: LPIPS is left out: %s", error)
        return None
    pairs = zip(reference.split(8), images.split(8), strict=True)
    return torch.cat([distance(first, second) for first, second in pairs]).mean().item()


def decibels(error: float, signal: float) -> float:
    """Compute 10·log₁₀(error / signal)."""
    return 10 * math.log10(max(error, 1e-30) / max(signal, 1e-30))
