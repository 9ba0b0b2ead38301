"""Passes over pictures: decoded ahead by threads, a share on each process, one network in memory at a time.

Letters: N pictures, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vqdm.errors import RunError
from vqdm.metrics.encoders import Encoder, unit
from vqdm.metrics.fidelity import psnr, squared_errors, ssim, to_tensor
from vqdm.metrics.frechet import Moments, Statistics
from vqdm.metrics.image_sets import Key, PictureSet
from vqdm.metrics.results import Table
from vqdm.parallel import Ranks
from vqdm.tracking import progress_bar

SMALLEST_FOR_SSIM = 11
# Prompts, and as many pictures [N, 3, H, W] of each of one or two sets → values [N] for each set.
TextScore = Callable[[list[str], list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Work:
    """How passes run.

    Attributes:
        batch: pictures that a network sees at once.
        threads: that decode and prepare pictures meanwhile.
    """

    ranks: Ranks
    batch: int
    threads: int

    def prepared(self, keys: Sequence, prepare: Callable[[Any], Any], what: str) -> Iterator[tuple[list, list]]:
        """This rank's keys by batches, with what `prepare` makes of them; the next batch is under way meanwhile."""
        share = list(self.ranks.shard(keys))
        groups = [share[start : start + self.batch] for start in range(0, len(share), self.batch)]
        ticks = progress_bar(total=len(share), description=what) if self.ranks.main else None
        with ThreadPoolExecutor(self.threads) as pool:
            ahead = [pool.submit(prepare, key) for key in groups[0]] if groups else []
            for number, group in enumerate(groups):
                now, later = ahead, groups[number + 1] if number + 1 < len(groups) else []
                ahead = [pool.submit(prepare, key) for key in later]
                yield group, [future.result() for future in now]
                if ticks is not None:
                    ticks.update(len(group))
        if ticks is not None:
            ticks.close()


# --------------------------------------------------------------------------------------------- sets


def fit(work: Work, pictures: PictureSet, keys: Sequence[Key], encoder: Encoder, about: dict, keep: bool) -> Statistics:
    """Mean and covariance of the features of pictures, the same on every rank.

    Args:
        about: tags of the statistics.
        keep: keep the features too; otherwise memory does not grow with their number.

    Raises:
        RunError: fewer than two pictures, or features that are not finite.
    """
    if len(keys) < 2:
        raise RunError(f"{pictures.path} has {len(keys)} pictures; a distance of sets needs 2 at least")
    moments, kept = None, []
    for features in encoded(work, pictures, keys, encoder):
        moments = moments or Moments(features.shape[1])
        moments.add(features)
        if keep:
            kept.append(features.float().cpu())
    whole = _sum(work.ranks.all_gather(moments))
    if not whole.products.isfinite().all():
        raise RunError(f"the features of {pictures.path} are not finite")
    features = _interleaved(work.ranks.all_gather(torch.cat(kept) if kept else None), len(keys)) if keep else None
    return Statistics(whole.mean(), whole.covariance(), whole.count, about, features)


def encoded(work: Work, pictures: PictureSet, keys: Sequence[Key], encoder: Encoder) -> Iterator[Tensor]:
    """Features [N, d] of this rank's share, batch by batch."""

    def prepare(key: Key) -> Tensor:
        return encoder.prepare(pictures.load(pictures.pictures[key]))

    for _, tensors in work.prepared(keys, prepare, pictures.path.name):
        yield encoder.images(torch.stack(tensors).to(work.ranks.device))


def _sum(parts: list[Moments | None]) -> Moments:
    """Sums of all ranks; a rank without pictures has none."""
    found = [part for part in parts if part is not None]
    whole = found[0]
    for part in found[1:]:
        whole = whole + part
    return whole


def _interleaved(parts: list[Tensor | None], count: int) -> Tensor:
    """Rows of all ranks in the order of the pictures, of which each rank had every `world`-th: [count, d]."""
    width = next(part.shape[1] for part in parts if part is not None)
    whole = torch.empty(count, width)
    for rank, part in enumerate(parts):
        if part is not None:
            whole[rank :: len(parts)] = part
    return whole


# --------------------------------------------------------------------------------------------- prompts and pictures


def cosines(encoder: Encoder, scale: float) -> TextScore:
    """scale · cosine of prompt and picture; prompts go through the network once for all their pictures."""

    def score(prompts: list[str], pixels: list[Tensor]) -> list[Tensor]:
        texts = unit(encoder.texts(prompts))  # [N, d]
        return [scale * (unit(encoder.images(one)) * texts).sum(1) for one in pixels]

    return score


def text_table(
    work: Work,
    name: str,
    prepare_one: Callable[[Image.Image], Tensor],
    score: TextScore,
    images: PictureSet,
    reference: PictureSet | None,
) -> Table:
    """The score of prompt and picture as column NAME, of the partner's picture as NAME_reference."""
    sets = {name: images} | ({f"{name}_reference": reference} if reference else {})
    keys = [key for key in images.pictures if all(key in one.pictures for one in sets.values())]

    def prepare(key: Key) -> list[Tensor]:
        return [prepare_one(one.load(one.pictures[key])) for one in sets.values()]

    table = {}
    for group, tensors in work.prepared(keys, prepare, name):
        pixels = [torch.stack(one).to(work.ranks.device) for one in zip(*tensors, strict=True)]
        columns = score([images.pictures[key].prompt for key in group], pixels)  # [N] each
        rows = torch.stack(columns, 1).tolist()
        table |= {key: dict(zip(sets, row, strict=True)) for key, row in zip(group, rows, strict=True)}
    return table


def truncated(overlong: Callable[[str], bool], images: PictureSet) -> int:
    """Prompts that the network cannot read to their end."""
    prompts = {picture.id: picture.prompt for picture in images.pictures.values()}
    return sum(overlong(prompt) for prompt in prompts.values())


# --------------------------------------------------------------------------------------------- pairs


def similarity_table(
    work: Work, name: str, encoder: Encoder, images: PictureSet, reference: PictureSet, keys: Sequence[Key]
) -> Table:
    """Cosine of the two pictures' features."""

    def prepare(key: Key) -> tuple[Tensor, Tensor]:
        return encoder.prepare(images.load(images.pictures[key])), encoder.prepare(
            reference.load(reference.pictures[key])
        )

    table = {}
    for group, tensors in work.prepared(keys, prepare, name):
        ours, theirs = (
            unit(encoder.images(torch.stack(one).to(work.ranks.device))) for one in zip(*tensors, strict=True)
        )
        table |= {key: {name: value} for key, value in zip(group, (ours * theirs).sum(1).tolist(), strict=True)}
    return table


def pixel_table(
    work: Work,
    images: PictureSet,
    reference: PictureSet,
    keys: Sequence[Key],
    lpips: Callable | None,
    smallest: int = 1,
) -> Table:
    """Columns mse, psnr, ssim, or lpips where its network is given; pairs one at a time, since sizes may differ.

    Args:
        smallest: pixels of the shorter side, below which a picture has no lpips.
    """

    def prepare(key: Key) -> tuple[Tensor, Tensor]:
        ours = images.load(images.pictures[key])
        return to_tensor([ours]), to_tensor([resized(reference.load(reference.pictures[key]), ours.size)])

    table = {}
    for group, pairs in work.prepared(keys, prepare, "lpips" if lpips else "pixels"):
        for key, pair in zip(group, pairs, strict=True):
            ours, theirs = (one.to(work.ranks.device) for one in pair)
            table[key] = _lpips_row(lpips, smallest, theirs, ours) if lpips else _pixel_row(theirs, ours)
    return table


def _lpips_row(lpips: Callable, smallest: int, reference: Tensor, image: Tensor) -> dict[str, float]:
    return {"lpips": lpips(reference, image).item()} if min(image.shape[2:]) >= smallest else {}


def _pixel_row(reference: Tensor, image: Tensor) -> dict[str, float]:
    squared = squared_errors(reference, image)
    row = {"psnr": psnr(squared).item(), "mse": squared.item()}
    large_enough = min(image.shape[2:]) >= SMALLEST_FOR_SSIM
    return row | ({"ssim": ssim(reference, image).item()} if large_enough else {})


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A reference of another size is brought to the picture's, bicubic."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
