"""Gradients of a batch of points, in micro-batches over any number of processes, as of one big batch.

Letters: A guidance branches, B points in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqdm.diffusion.trajectories import batches
from vqdm.finetuning.points import Batch, Point, Points
from vqdm.parallel import Ranks

BUCKET_VALUES = 2**24  # that processes add up at once


def computing(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to `dtype`; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@dataclass(frozen=True)
class Lesson:
    """Who learns from whom, and how much at once.

    Attributes:
        teacher: asked where points come without what it says; None where all have it.
        dtype: that UNets compute in.
        local: points of a micro-batch.
    """

    student: nn.Module
    teacher: nn.Module | None
    dtype: torch.dtype
    local: int
    ranks: Ranks

    def micro_batches(self, points: Points, chosen: Sequence[Point]) -> Iterator[Batch]:
        """This process's share of `chosen`, every one with what the teacher says."""
        for some in batches(self.ranks.shard(chosen), self.local):
            batch = points.batch(some, self.ranks.device, torch.float32)
            yield batch if batch.expected is not None else batch._replace(expected=self.answer(batch.call))

    @torch.no_grad()
    def answer(self, call: dict) -> Tensor:
        """What the teacher says, [A·B, C, h, w]."""
        return self.teacher(**_cast(call, self.teacher.dtype)).sample

    def guess(self, call: dict) -> Tensor:
        """What the student says, [A·B, C, h, w], in float32."""
        with computing(self.ranks.device, self.dtype):
            return self.student(**call).sample.float()

    def backward(self, points: Points, chosen: Sequence[Point], scale: float = 1.0) -> float:
        """Add to `.grad`, `scale` times, this process's part of the gradient of the loss over `chosen`.

        Returns this process's part of the loss. The parts of all processes add up to the mean squared error over all
        values of all points, and its gradient, also where shares differ in size.
        """
        loss = 0.0
        for batch in self.micro_batches(points, chosen):
            values = batch.expected.numel() // batch.count  # of a point
            part = (self.guess(batch.call) - batch.expected.float()).square().sum() / (len(chosen) * values)
            (part * scale).backward()
            loss += part.item()
        return loss


def _cast(call: dict, dtype: torch.dtype) -> dict:
    """The same arguments in another type; timesteps, labels and masks stay as they are."""
    return {
        name: _cast(value, dtype)
        if isinstance(value, dict)
        else value
        if name == "timestep" or not value.is_floating_point()
        else value.to(dtype)
        for name, value in call.items()
    }


def add_up(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Replace tensors by their sums over all processes, in place; all processes get the same bytes."""
    for bucket in buckets(tensors if ranks.world > 1 else [], BUCKET_VALUES):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        ranks.all_reduce(flat)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(total.view_as(tensor))


def buckets(tensors: Sequence[Tensor], values: int) -> Iterator[list[Tensor]]:
    """Consecutive tensors that have no more than so many values together, or are alone."""
    held: list[Tensor] = []
    for tensor in tensors:
        if held and sum(one.numel() for one in held) + tensor.numel() > values:
            yield held
            held = []
        held.append(tensor)
    if held:
        yield held


def add_up_number(value: float, ranks: Ranks) -> float:
    """A number's sum over all processes."""
    total = torch.tensor([value], dtype=torch.float64, device=ranks.device)
    ranks.all_reduce(total)
    return total.item()
