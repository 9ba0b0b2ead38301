"""Recorded points of many trajectories, and the order in which training meets them.

Letters: S steps of a trajectory, A guidance branches, B points in a batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from vqdm.diffusion.trajectories import Trajectories, spread_points, unet_call

T = TypeVar("T")


class Point(NamedTuple):
    """A step of one of the trajectories of a part."""

    part: int
    prompt: int
    step: int


class Batch(NamedTuple):
    """B points: what a UNet is called with, and what it should say, [A·B, C, h, w] or None where that is not known."""

    count: int
    call: dict
    expected: Tensor | None


@dataclass(frozen=True)
class Points:
    """Points of several parts, which may come from other models or other pictures, but have the same shapes."""

    parts: list[Trajectories]

    def all(self) -> list[Point]:
        """All points, part by part, prompt by prompt."""
        return [Point(k, n, s) for k, part in enumerate(self.parts) for n, s in part.points()]

    def timestep(self, point: Point) -> float:
        """From 0, no noise, to 1000."""
        return self.parts[point.part].timesteps[point.step].item()

    def batch(self, points: Sequence[Point], device: torch.device, dtype: torch.dtype) -> Batch:
        """B points together."""
        picked = [(self.parts[k], n, s) for k, n, s in points]
        names = self.parts[0].conditioning
        call = unet_call(
            torch.stack([part.latents[n, s] for part, n, s in picked]),
            torch.stack([part.timesteps[s] for part, _, s in picked]),
            {name: torch.stack([part.conditioning[name][n] for part, n, _ in picked]) for name in names},
            device,
            dtype,
        )
        if any(part.outputs is None for part, *_ in picked):
            return Batch(len(points), call, None)
        outputs = torch.stack([part.outputs[n, s] for part, n, s in picked])  # [B, A, C, h, w]
        return Batch(len(points), call, outputs.transpose(0, 1).flatten(0, 1).to(device))


def spread(points: Points, count: int) -> list[Point]:
    """About `count` points, as many of every prompt (at least one), at timesteps that shift from prompt to prompt."""
    sizes = [len(part.latents) for part in points.parts]
    each, firsts = max(1, count // sum(sizes)), accumulate(sizes, initial=0)
    parts = enumerate(zip(points.parts, firsts, strict=False))
    return [Point(k, n, s) for k, (part, first) in parts for n, s in spread_points(part, each, first)]


def split(points: Points) -> tuple[list[Point], list[Point]]:
    """Points to train on, and held-out ones: those of every tenth prompt, of the last where there are fewer.

    Of a single prompt every tenth point, or the last; a single point is both.
    """
    every = points.all()
    keys = [point[:2] for point in every]
    if len(set(keys)) == 1:
        keys = every
    apart = set(list(dict.fromkeys(keys))[9::10] or keys[-1:])
    learned = [point for point, key in zip(every, keys, strict=True) if key not in apart]
    return learned or every, [point for point, key in zip(every, keys, strict=True) if key in apart]


def shuffled(points: Points, weights: Sequence[float] | None, seed: str) -> list[Point]:
    """All points in random order; with `weights`, one a point, as many drawn with replacement in proportion to them."""
    every, draw = points.all(), random.Random(seed)
    if weights is None:
        return draw.sample(every, len(every))
    return draw.choices(every, weights, k=len(every))


def timestep_weights(points: Points, sampling: str, error_at: Sequence[float] = ()) -> list[float] | None:
    """How much more often than others each point is to be met; None for alike.

    beta: t / 1000 as Beta(3, 1), whose density is 3·(t/1000)² (BitsFusion, arXiv 2406.04333).
    error: the student's mean squared error in the bin of `error_at` that t falls into, bins of equal width.
    """
    if sampling == "uniform":
        return None
    timesteps = [points.timestep(point) for point in points.all()]
    if sampling == "beta":
        return [3 * (t / 1000) ** 2 for t in timesteps]
    return [error_at[bin_of(t, len(error_at))] for t in timesteps]


def bin_of(timestep: float, bins: int) -> int:
    """The bin of equal width that a timestep in [0, 1000] falls into."""
    return min(int(timestep * bins / 1000), bins - 1)


def drawn(items: Sequence[T], first: int, count: int, seed: str) -> list[T]:
    """Items `first` to `first + count` of an endless row: all of them shuffled, then shuffled anew, and so on."""
    rounds = range(first // len(items), -(-(first + count) // len(items)))
    row = [item for k in rounds for item in random.Random(f"{seed}:{k}").sample(items, len(items))]
    start = first - rounds.start * len(items)
    return row[start : start + count]
