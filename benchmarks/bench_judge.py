"""Can one tell quantized images from full-precision ones of equal prompts and seeds? A JSON line for each folder.

    OUT=out/quality bash benchmarks/quality.sh out/bits/ours-3 out/bits/ours-2
    python benchmarks/bench_judge.py out/quality/images-full out/quality/images-ours-*

Folders are of generate.py. Two answers:

    the report page's blind vote, by a model in a person's place: of two images, which fits the prompt better? It is
    the one with the larger CLIP score; equal scores are half a vote for each. The judge cannot tell where 1/2 lies in
    Wilson's 95 % interval for the share of votes for full precision, as on the page.

    just noticeable differences: the distance of colours in CIELAB (CIE 1976; 2.3 is a just noticeable difference,
    Mahy et al. 1994) between equal places of both images, each averaged over `--spot` pixels squared. An image is
    called different if more than a hundredth of its places differ noticeably.

Letters: B images, S pixels a side.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vqdm.metrics.encoders import exact, load_encoder, unit
from vqdm.metrics.image_sets import ImageSet, open_images
from vqdm.metrics.networks import find_open_clip

NOTICEABLE = 2.3  # CIELAB
AREA = 0.01  # of an image
WHITE = (0.95047, 1.0, 1.08883)  # D65, as sRGB has it
TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


def wilson(votes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the interval of 95 % for the share of `votes` among `count` (Wilson 1927)."""
    share, width = votes / count, z * z / count
    middle = (share + width / 2) / (1 + width)
    half = z * math.sqrt(share * (1 - share) / count + width / (4 * count)) / (1 + width)
    return middle - half, middle + half


def lab(linear: Tensor) -> Tensor:
    """Linear RGB [..., 3] in [0, 1] to CIELAB (CIE 1976, white D65)."""
    ratios = linear @ torch.tensor(TO_XYZ, dtype=linear.dtype).T / torch.tensor(WHITE, dtype=linear.dtype)
    roots = torch.where(ratios > (6 / 29) ** 3, ratios.clamp(min=1e-9) ** (1 / 3), ratios * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = roots.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def seen(image: Image.Image, spot: int) -> Tensor:
    """CIELAB [S/spot, S/spot, 3] of the light of an image, averaged over spots."""
    levels = torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float64) / 255)  # [S, S, 3], sRGB
    linear = torch.where(levels > 0.04045, ((levels + 0.055) / 1.055) ** 2.4, levels / 12.92)
    return lab(F.avg_pool2d(linear.permute(2, 0, 1), spot).permute(1, 2, 0))  # [3, S, S] → [S/spot, S/spot, 3]


def differences(first: Image.Image, second: Image.Image, spot: int) -> tuple[float, float]:
    """Mean CIELAB distance of two images, and the share of their places that differ noticeably."""
    distance = (seen(first, spot) - seen(second, spot)).norm(dim=-1)  # [S/spot, S/spot]
    return distance.mean().item(), (distance > NOTICEABLE).double().mean().item()


def fits(images: ImageSet, keys: list, encoder) -> Tensor:
    """CLIP scores [B] of images for their prompts."""
    scores = []
    for start in range(0, len(keys), 64):
        entries = [images.entries[key] for key in keys[start : start + 64]]
        pixels = torch.stack([encoder.prepare(images.load(entry)) for entry in entries])
        texts = encoder.texts([entry.prompt for entry in entries])
        scores.append((unit(encoder.images(pixels)) * unit(texts)).sum(-1))
    return torch.cat(scores)


def row(name: str, votes: float, count: int, pairs: list[tuple[float, float]]) -> dict:
    """The row of a folder: `votes` of `count` are for full precision, `pairs` are of `differences`."""
    low, high = wilson(votes, count)
    distances, shares = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return {
        "images": name,
        "pairs": count,
        "votes_for_full_precision": votes / count,
        "interval": [round(low, 4), round(high, 4)],
        "judge_can_tell": not low <= 0.5 <= high,
        "median_lab_distance": distances.median().item(),
        "images_noticeably_different": (shares > AREA).double().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full", metavar="FULL", help="images in full precision")
    parser.add_argument("folders", nargs="+", metavar="IMAGES")
    parser.add_argument("--clip_model", default="assets/shapes-clip")
    parser.add_argument("--clip_pretrained", default="")
    parser.add_argument("--spot", type=int, default=2, help="pixels a side that the eye takes together")
    arguments = parser.parse_args()
    full = open_images(arguments.full, "FULL")
    encoder = load_encoder(find_open_clip(arguments.clip_model, arguments.clip_pretrained, False), torch.device("cpu"))
    with exact():
        for folder in arguments.folders:
            images = open_images(folder, "IMAGES")
            keys = [key for key in full.entries if key in images.entries]
            gap = fits(full, keys, encoder) - fits(images, keys, encoder)
            votes = (gap > 0).sum().item() + (gap == 0).sum().item() / 2
            load = [(full.load(full.entries[key]), images.load(images.entries[key])) for key in keys]
            pairs = [differences(*both, arguments.spot) for both in load]
            print(json.dumps(row(Path(folder).name, votes, len(keys), pairs)), flush=True)


if __name__ == "__main__":
    main()
