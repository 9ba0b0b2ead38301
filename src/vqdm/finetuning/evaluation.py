"""What is seen of a training: errors on points that are never trained on, by timestep; speed; curves."""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vqdm.diffusion.sampling import error_spread
from vqdm.finetuning.points import Point, Points, bin_of
from vqdm.finetuning.step import Lesson
from vqdm.layers.quantized import decoded_once
from vqdm.metrics.fidelity import decibels
from vqdm.storage.files import save_bytes, save_text

BINS = 4  # of timesteps, equally wide
FASTER = 0.9  # how much of the speed so far the newest step leaves


@dataclass(frozen=True)
class Errors:
    """Of a student's outputs against its teacher's: A guidance branches at N points, an output each.

    Attributes:
        squares: squared error of every output; float64 [A, N].
        energy: sum of squares of every teacher output; float64 [A, N].
        values: numbers in every output; float64 [A, N].
        prompts, bins: number of the prompt, and timestep bin, of every point; int64 [N].
    """

    squares: Tensor
    energy: Tensor
    values: Tensor
    prompts: Tensor
    bins: Tensor

    @property
    def loss(self) -> float:
        """Mean squared error."""
        return (self.squares.sum() / self.values.sum()).item()

    @property
    def db(self) -> float:
        """UNet-output error: sum of squared errors over the energy of the teacher outputs."""
        return decibels(self.squares.sum().item(), self.energy.sum().item())

    @property
    def median_db(self) -> float:
        """The error of the median prompt, over all its points: outliers dominate the sum, and the median has none."""
        pairs = zip(_added(self.squares, self.prompts), _added(self.energy, self.prompts), strict=True)
        return statistics.median(decibels(*pair) for pair in pairs)

    @property
    def by_point(self) -> dict[str, float]:
        """How the error, in dB, is spread over single outputs: see `error_spread`."""
        return error_spread(self.squares.flatten().tolist(), self.energy.flatten().tolist())

    @property
    def figures(self) -> dict[str, float]:
        """Error of the sum and of the median prompt, in dB."""
        return {"db": self.db, "median_db": self.median_db}

    @property
    def db_by_timestep(self) -> list[float | None]:
        """The error in each bin, the least noise first; None where no point fell."""
        pairs = zip(_added(self.squares, self.bins, BINS), _added(self.energy, self.bins, BINS), strict=True)
        return [decibels(*pair) if pair[1] else None for pair in pairs]

    @property
    def loss_by_timestep(self) -> list[float]:
        """Mean squared error in each bin, where no point fell over all."""
        pairs = zip(_added(self.squares, self.bins, BINS), _added(self.values, self.bins, BINS), strict=True)
        return [squares / count if count else self.loss for squares, count in pairs]


def _added(table: Tensor, groups: Tensor, count: int | None = None) -> list[float]:
    """Sums of a table [A, N] over branches and the points of each group; `groups` [N] has numbers below `count`."""
    count = groups.max().item() + 1 if count is None else count
    return torch.zeros(count, dtype=table.dtype).index_add_(0, groups, table.sum(0)).tolist()


@torch.no_grad()
def measure(lesson: Lesson, points: Points, chosen: Sequence[Point]) -> Errors:
    """The student's errors at some points; each process measures its share, and all get the same result."""
    branches = next(iter(points.parts[0].conditioning.values())).shape[1]
    table = torch.zeros(3, branches, len(chosen), dtype=torch.float64, device=lesson.ranks.device)
    mine, done = lesson.ranks.shard(range(len(chosen))), 0
    with decoded_once(lesson.student):
        for batch in lesson.micro_batches(points, chosen):
            expected = batch.expected.double()
            rows = (lesson.guess(batch.call).double() - expected).square(), expected.square(), torch.ones_like(expected)
            found = torch.stack([row.flatten(1).sum(1) for row in rows])  # [3, A·B]
            table[:, :, list(mine[done : done + batch.count])] = found.unflatten(1, (branches, -1))
            done += batch.count
    lesson.ranks.all_reduce(table)
    numbers = {key: number for number, key in enumerate(dict.fromkeys((k, n) for k, n, _ in chosen))}
    prompts = torch.tensor([numbers[k, n] for k, n, _ in chosen])
    bins = torch.tensor([bin_of(points.timestep(point), BINS) for point in chosen])
    return Errors(*table.cpu(), prompts, bins)


class Speed:
    """Points a second, the newest steps counting most, and what is left at that speed."""

    def __init__(self, total: int):
        self.total, self.seconds = total, None
        self.began = time.perf_counter()

    def tick(self, step: int, points: int) -> dict[str, float]:
        """After a step of so many points."""
        now = time.perf_counter()
        spent, self.began = now - self.began, now
        self.seconds = spent if self.seconds is None else FASTER * self.seconds + (1 - FASTER) * spent
        rate, left = points / self.seconds, (self.total - step) * self.seconds
        return {"points_per_second": round(rate, 2), "seconds_left": round(left, 1)}

    def restart(self) -> None:
        """Leave out what was done since the last step."""
        self.began = time.perf_counter()


def duration(seconds: float) -> str:
    """As hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def read_log(path: Path, last: int) -> list[dict]:
    """The rows of a training log up to step `last`; later and broken ones are dropped from the file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= last:
            rows.append(row)
    save_text("".join(json.dumps(row) + "\n" for row in rows), path)
    return rows


def loss_plot(rows: list[dict]) -> bytes:
    """A PNG: loss of every step and of held-out points above, errors by timestep in dB below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7))
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [row for row in rows if "loss" in row]
    above.plot([row["step"] for row in steps], [row["loss"] for row in steps], linewidth=0.6, label="batches")
    looks = [row for row in rows if "held_out_loss" in row]
    at = [row["step"] for row in looks]
    above.plot(at, [row["held_out_loss"] for row in looks], marker=".", label="held-out points")
    above.set(yscale="log", ylabel="mean squared error")
    for k in range(BINS):
        label = f"timesteps {k * 1000 // BINS} to {(k + 1) * 1000 // BINS}"
        below.plot(at, [row["db_by_timestep"][k] for row in looks], marker=".", label=label)
    below.plot(at, [row["held_out_db"] for row in looks], marker=".", color="black", label="all")
    below.set(xlabel="step", ylabel="UNet-output error, dB")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def save_loss_plot(rows: list[dict], path: Path) -> None:
    save_bytes(loss_plot(rows), path)
