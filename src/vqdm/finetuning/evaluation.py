"""Evaluation of a student: its errors on held-out points, overall and by timestep; throughput; log and curves."""

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
from vqdm.fidelity import decibels
from vqdm.finetuning.data import Point, Points, bin_of
from vqdm.finetuning.trainer import DistillationLoss
from vqdm.layers.quantized import decoded_once
from vqdm.storage.files import save_bytes, save_text

BINS = 4  # of timesteps, equally wide
DECAY = 0.9  # of the moving average of seconds per step


@dataclass(frozen=True)
class Errors:
    """Errors of a student's outputs: A guidance branches at N points, one output each.

    Attributes:
        squares: squared error of each output; float64 [A, N].
        energy: sum of squares of each teacher output; float64 [A, N].
        values: number of values of each output; float64 [A, N].
        prompts, bins: number of the prompt, and timestep bin, of each point; int64 [N].
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
        """Output error in dB: sum of squared errors over the energy of the teacher outputs."""
        return decibels(self.squares.sum().item(), self.energy.sum().item())

    @property
    def median_db(self) -> float:
        """Error in dB of the median prompt, over all its points. Outliers may dominate the sum, but not the median."""
        pairs = zip(_sums(self.squares, self.prompts), _sums(self.energy, self.prompts), strict=True)
        return statistics.median(decibels(*pair) for pair in pairs)

    @property
    def by_point(self) -> dict[str, float]:
        """Spread of the error in dB over single outputs; see `error_spread`."""
        return error_spread(self.squares.flatten().tolist(), self.energy.flatten().tolist())

    @property
    def figures(self) -> dict[str, float]:
        """Error of the sum and of the median prompt, in dB."""
        return {"db": self.db, "median_db": self.median_db}

    @property
    def db_by_timestep(self) -> list[float | None]:
        """Error in dB per bin, least noise first; None for a bin without points."""
        pairs = zip(_sums(self.squares, self.bins, BINS), _sums(self.energy, self.bins, BINS), strict=True)
        return [decibels(*pair) if pair[1] else None for pair in pairs]

    @property
    def loss_by_timestep(self) -> list[float]:
        """Mean squared error per bin; that of all points for a bin without points."""
        pairs = zip(_sums(self.squares, self.bins, BINS), _sums(self.values, self.bins, BINS), strict=True)
        return [squares / count if count else self.loss for squares, count in pairs]


def _sums(table: Tensor, groups: Tensor, count: int | None = None) -> list[float]:
    """Sum a table [A, N] over branches and over the points of each group; `groups` [N] has numbers below `count`."""
    count = groups.max().item() + 1 if count is None else count
    return torch.zeros(count, dtype=table.dtype).index_add_(0, groups, table.sum(0)).tolist()


@torch.no_grad()
def evaluate(loss_fn: DistillationLoss, points: Points, chosen: Sequence[Point]) -> Errors:
    """Compute the student's errors at the points `chosen`, sharded over the processes; all get the same result."""
    branches = max(points.parts[k].branches((n, j)) for k, n, j in chosen)
    table = torch.zeros(3, branches, len(chosen), dtype=torch.float64, device=loss_fn.ranks.device)
    mine = loss_fn.ranks.shard(range(len(chosen)))
    with decoded_once(loss_fn.student):
        for batch, places in loss_fn.micro_batches(points, chosen):
            teacher = batch.teacher_output.double()
            error = loss_fn.student_output(batch.call).double() - teacher
            rows = error.square(), teacher.square(), torch.ones_like(teacher)
            found = torch.stack([row.flatten(1).sum(1) for row in rows])  # [3, A·B]
            found = found.unflatten(1, (-1, batch.count))  # [3, A, B]
            table[:, : found.shape[1], [mine[place] for place in places]] = found
    loss_fn.ranks.all_reduce(table)
    numbers = {key: number for number, key in enumerate(dict.fromkeys((k, n) for k, n, _ in chosen))}
    prompts = torch.tensor([numbers[k, n] for k, n, _ in chosen])
    bins = torch.tensor([bin_of(points.timestep(point), BINS) for point in chosen])
    return Errors(*table.cpu(), prompts, bins)


class Throughput:
    """Points per second, as a moving average over steps, and the time left."""

    def __init__(self, total: int):
        self.total, self.seconds = total, None
        self.began = time.perf_counter()

    def tick(self, step: int, points: int) -> dict[str, float]:
        """Return the throughput after step number `step`, of `points` points."""
        now = time.perf_counter()
        spent, self.began = now - self.began, now
        self.seconds = spent if self.seconds is None else DECAY * self.seconds + (1 - DECAY) * spent
        left = (self.total - step) * self.seconds
        return {"points_per_second": round(points / self.seconds, 2), "seconds_left": round(left, 1)}

    def restart(self) -> None:
        """Leave out the time since the last step."""
        self.began = time.perf_counter()


def duration(seconds: float) -> str:
    """Format seconds as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def read_log(path: Path, last: int) -> list[dict]:
    """Read the rows of a training log up to step `last`; later and damaged rows are deleted from the file."""
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


def save_loss_plot(rows: list[dict], path: Path) -> None:
    """Plot a training log to a PNG: loss of batches and held-out points above, held-out errors in dB below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7))
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [row for row in rows if "loss" in row]
    above.plot([row["step"] for row in steps], [row["loss"] for row in steps], linewidth=0.6, label="batches")
    evaluations = [row for row in rows if "held_out_loss" in row]
    at = [row["step"] for row in evaluations]
    above.plot(at, [row["held_out_loss"] for row in evaluations], marker=".", label="held-out points")
    above.set(yscale="log", ylabel="mean squared error")
    for k in range(BINS):
        label = f"timesteps {k * 1000 // BINS} to {(k + 1) * 1000 // BINS}"
        below.plot(at, [row["held_out_db_by_timestep"][k] for row in evaluations], marker=".", label=label)
    below.plot(at, [row["held_out_db"] for row in evaluations], marker=".", color="black", label="all")
    below.set(xlabel="step", ylabel="output error, dB")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    save_bytes(buffer.getvalue(), path)
