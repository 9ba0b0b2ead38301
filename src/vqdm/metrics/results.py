"""Scores of a run: of single images, and their means with 95 % intervals, printed and stored.

Intervals are by the percentile bootstrap over prompts (Efron, 1979), since images of one prompt are not independent;
scipy's bootstrap resamples single values.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqdm.fidelity import SMALLEST_FOR_SSIM, psnr, squared_errors, ssim, to_tensor
from vqdm.metrics.catalogue import METRICS, Metric
from vqdm.metrics.encoders import Encoder, unit
from vqdm.metrics.image_sets import ImageEntry, ImageLoader, ImageSet, Key, resized
from vqdm.metrics.networks import Network

SCHEMA = 1
RESAMPLES, LEVEL = 1000, 0.95
Interval = tuple[float, float]
# One row per image: score → value.
ScoreTable = dict[Key, dict[str, float]]


@dataclass(frozen=True)
class Score:
    """One score of a run.

    Attributes:
        name: of the catalogue.
        label: with network and preprocessing, since the name alone is ambiguous.
        value, interval: the score, and its 95 % bootstrap interval over prompts; None if a bootstrap is biased.
        n: images.
        reference: the same score of the full-precision images, if it has one.
        difference, difference_interval: value - reference, paired by prompt.
        extra: further entries of metrics.json.
    """

    name: str
    label: str
    value: float
    n: int
    interval: Interval | None = None
    reference: float | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    network: str | None = None
    extra: dict = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        return METRICS[self.name]

    def to_dict(self) -> dict:
        """Return the entry of metrics.json, with definition and direction."""
        own = {name: value for name, value in vars(self).items() if name not in ("name", "extra")}
        return own | {"better": self.metric.better, "definition": self.metric.definition} | self.extra


# --------------------------------------------------------------------------------------------- from images to scores


def mean_interval(values: Sequence[float], prompts: Sequence[str], seed: int = 0) -> Interval | None:
    """Compute the 95 % interval of the mean over images, resampling prompts with all their images.

    Args:
        values: [N] one per image.
        prompts: [N] the prompt of each image.

    Returns:
        (low, high), or None for fewer than two prompts.
    """
    names, owner = np.unique(np.asarray(prompts), return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.bincount(owner, weights=np.asarray(values, dtype=np.float64))  # [P]
    counts = np.bincount(owner)  # [P]
    chosen = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))  # [R, P]
    means = sums[chosen].sum(1) / counts[chosen].sum(1)  # [R]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def label_of(name: str, network: Network | None) -> str:
    """Return the title of a metric with its network."""
    title = METRICS[name].title
    return f"{title}[{short_name(network)}]" if network else title


def short_name(network: Network) -> str:
    """Return the name without the owner on the hub; open_clip's ARCHITECTURE/TAG stays whole."""
    return network.name.rpartition("/")[2] if network.kind == "transformers" else network.name


def mean_score(name: str, table: ScoreTable, network: Network | None, seed: int, **extra) -> Score:
    """Average a column over images, with its interval, and the paired difference if there is a `NAME_reference`."""
    values, prompts = column(table, name)
    score = {"value": float(np.mean(values)), "interval": mean_interval(values, prompts, seed), "n": len(values)}
    theirs, _ = column(table, f"{name}_reference")
    if theirs:
        gaps = [ours - one for ours, one in zip(values, theirs, strict=True)]
        score |= {"reference": float(np.mean(theirs)), "difference": float(np.mean(gaps))}
        score |= {"difference_interval": mean_interval(gaps, prompts, seed)}
    return Score(name, label_of(name, network), network=network and network.name, **score, extra=extra)


def column(table: ScoreTable, name: str) -> tuple[list[float], list[str]]:
    """Return the values of a column, and the prompt id of each; rows without it are left out."""
    found = [(row[name], key[0]) for key, row in table.items() if name in row]
    return [value for value, _ in found], [prompt for _, prompt in found]


def global_psnr(table: ScoreTable, seed: int) -> Score:
    """Compute the PSNR of the mean error, which equal images cannot inflate."""
    errors, prompts = column(table, "mse")
    interval = mean_interval(errors, prompts, seed)
    ends = interval and (_decibels(interval[1]), _decibels(interval[0]))  # more error is less PSNR
    return Score("psnr_global", label_of("psnr_global", None), _decibels(float(np.mean(errors))), len(errors), ends)


def winrate(table: ScoreTable, network: Network, seed: int) -> Score:
    """Compute how often an image has the higher PickScore of its pair, and the mean probability that it is preferred.

    The probability is softmax over the two scores (Kirstain et al., arXiv 2305.01569).
    """
    ours, prompts = column(table, "pickscore")
    theirs, _ = column(table, "pickscore_reference")
    gaps = np.subtract(ours, theirs)
    wins = (gaps > 0) + 0.5 * (gaps == 0)
    preferred = float(np.mean(1 / (1 + np.exp(-gaps))))
    interval = mean_interval(wins, prompts, seed)
    label = label_of("pickscore_winrate", network)
    extra = {"mean_probability": preferred}
    return Score("pickscore_winrate", label, float(wins.mean()), len(wins), interval, network=network.name, extra=extra)


def _decibels(error: float) -> float:
    return -10 * math.log10(max(error, 1e-10))


def per_image_csv(entries: Sequence[ImageEntry], table: ScoreTable) -> str:
    """Write one line per image: id, sample, file and prompt, then every score."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", "sample", "file", "prompt", *names])
    for entry in entries:
        row = table.get(entry.key, {})
        cells = [row.get(name, "") for name in names]
        writer.writerow([entry.id, entry.sample, entry.file, entry.prompt or "", *cells])
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------- printed


def terminal_table(scores: Sequence[Score]) -> str:
    """Format scores in aligned columns; a column that no score fills is left out."""
    rows = [["metric", "value", "95 % interval", "full precision", "difference", "95 % interval", "N"]]
    for score in scores:
        digits = score.metric.decimals
        cells = [number(score.value, digits), spread_text(score), number(score.reference, digits)]
        cells += [number(score.difference, digits, "+"), interval_text(score.difference_interval, digits, "+")]
        rows.append([f"{score.label} {score.metric.arrow}", *cells, str(score.n)])
    kept = [k for k in range(len(rows[0])) if any(row[k] for row in rows[1:])]
    widths = {k: max(len(row[k]) for row in rows) for k in kept}
    lines = ["  ".join(f"{row[k]:{'<' if k == 0 else '>'}{widths[k]}}" for k in kept).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def number(value: float | None, digits: int, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.{digits}f}"


def spread_text(score: Score) -> str:
    """Format the interval of a value, or ± its standard deviation."""
    digits = score.metric.decimals
    deviation = score.extra.get("std")
    return interval_text(score.interval, digits) if deviation is None else f"± {number(deviation, digits)}"


def interval_text(interval: Sequence[float] | None, digits: int, sign: str = "") -> str:
    return "" if interval is None else "[{}, {}]".format(*(number(end, digits, sign) for end in interval))


# -------------------------------------------------------------------------------------------------------- single images
#
# Scores of image and prompt, and of image and reference image.
#
# Letters: N images, d features.
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
