"""Scores of single images: of image and prompt, and of image and reference image.

Letters: N images, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from vqdm.fidelity import SMALLEST_FOR_SSIM, psnr, squared_errors, ssim, to_tensor
from vqdm.metrics.encoders import Encoder, unit
from vqdm.metrics.image_sets import ImageLoader, ImageSet, Key, resized
from vqdm.metrics.results import ScoreTable

# Prompts, and as many images [N, 3, H, W] of each of one or two sets → values [N] for each set.
TextScore = Callable[[list[str], list[Tensor]], list[Tensor]]


def cosines(encoder: Encoder, scale: float) -> TextScore:
    """Return the score scale · cosine of prompt and image; the text network runs once for both sets."""

    def score(prompts: list[str], pixels: list[Tensor]) -> list[Tensor]:
        texts = unit(encoder.texts(prompts))  # [N, d]
        return [scale * (unit(encoder.images(one)) * texts).sum(1) for one in pixels]

    return score


def text_table(
    loader: ImageLoader,
    name: str,
    prepare_image: Callable[[Image.Image], Tensor],
    score: TextScore,
    images: ImageSet,
    reference: ImageSet | None,
) -> ScoreTable:
    """Score prompt and image as column NAME, and the reference image as NAME_reference."""
    sets = {name: images} | ({f"{name}_reference": reference} if reference else {})
    keys = [key for key in images.entries if all(key in one.entries for one in sets.values())]

    def prepare(key: Key) -> list[Tensor]:
        return [prepare_image(one.load(one.entries[key])) for one in sets.values()]

    table = {}
    for group, tensors in loader.batches(keys, prepare, name):
        pixels = [torch.stack(one).to(loader.ranks.device) for one in zip(*tensors, strict=True)]
        columns = score([images.entries[key].prompt for key in group], pixels)  # [N] each
        rows = torch.stack(columns, 1).tolist()
        table |= {key: dict(zip(sets, row, strict=True)) for key, row in zip(group, rows, strict=True)}
    return table


def truncated(overlong: Callable[[str], bool], images: ImageSet) -> int:
    """Count the prompts that are longer than the network reads."""
    prompts = {entry.id: entry.prompt for entry in images.entries.values()}
    return sum(overlong(prompt) for prompt in prompts.values())


def pair_table(
    loader: ImageLoader,
    description: str,
    score: Callable[[Tensor, Tensor], dict[str, float]],
    images: ImageSet,
    reference: ImageSet,
    keys: Sequence[Key],
) -> ScoreTable:
    """Score reference and image [1, 3, H, W] of each key, one pair per call, since sizes may differ."""

    def prepare(key: Key) -> tuple[Tensor, Tensor]:
        image = images.load(images.entries[key])
        return to_tensor([resized(reference.load(reference.entries[key]), image.size)]), to_tensor([image])

    table = {}
    for group, pairs in loader.batches(keys, prepare, description):
        for key, pair in zip(group, pairs, strict=True):
            table[key] = score(*(one.to(loader.ranks.device) for one in pair))
    return table


def pixel_scores(reference: Tensor, image: Tensor) -> dict[str, float]:
    """Compute psnr and mse of a pair [1, 3, H, W], and ssim unless the image is too small for its window."""
    squared = squared_errors(reference, image)
    row = {"psnr": psnr(squared).item(), "mse": squared.item()}
    large_enough = min(image.shape[2:]) >= SMALLEST_FOR_SSIM
    return row | ({"ssim": ssim(reference, image).item()} if large_enough else {})


def lpips_score(distance: Callable[[Tensor, Tensor], Tensor], smallest: int) -> Callable:
    """Return the score lpips, empty for images with a shorter side of fewer than `smallest` pixels."""

    def score(reference: Tensor, image: Tensor) -> dict[str, float]:
        return {"lpips": distance(reference, image).item()} if min(image.shape[2:]) >= smallest else {}

    return score
