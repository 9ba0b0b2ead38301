"""What is seen of a training: errors on points that are never trained on, by timestep; speed; curves."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vqdm.layers.quantized import decoded_once
from vqdm.scores.fidelity import decibels
from vqdm.storage.atomic import save_bytes, save_text
from vqdm.training.points import Point, Points, bin_of
from vqdm.training.step import Lesson

BINS = 4  # of timesteps, equally wide
FASTER = 0.9  # how much of the speed so far the newest step leaves


@dataclass(frozen=True)
class Errors:
    """Of a student's outputs against its teacher's, by timestep bin.

    Attributes:
        squares: squared errors, added up; float64 [BINS].
        energy: squares of what the teacher says, added up; float64 [BINS].
        values: how many there are; float64 [BINS].
    """

    squares: Tensor
    energy: Tensor
    values: Tensor

    @property
    def loss(self) -> float:
        """Mean squared error."""
        return (self.squares.sum() / self.values.sum()).item()

    @property
    def db(self) -> float:
        """UNet-output error: squared error over the energy of what the teacher says."""
        return decibels(self.squares.sum().item(), self.energy.sum().item())

    @property
    def db_by_timestep(self) -> list[float | None]:
        """The same in each bin, the least noise first; None where no point fell."""
        return [
            decibels(*pair) if pair[1] else None
            for pair in zip(self.squares.tolist(), self.energy.tolist(), strict=True)
        ]

    @property
    def loss_by_timestep(self) -> list[float]:
        """Mean squared error in each bin, where no point fell over all."""
        held = (self.squares / self.values).tolist()
        return [self.loss if count == 0 else one for one, count in zip(held, self.values.tolist(), strict=True)]


@torch.no_grad()
def measure(lesson: Lesson, points: Points, chosen: Sequence[Point]) -> Errors:
    """The student's errors on some points; each process measures its share, and all get the same result."""
    table = torch.zeros(3, BINS, dtype=torch.float64, device=lesson.ranks.device)
    with decoded_once(lesson.student):
        for batch in lesson.micro_batches(points, chosen):
            expected = batch.expected.double()
            bins = [bin_of(t, BINS) for t in batch.call["timestep"].tolist()]
            rows = (lesson.guess(batch.call).double() - expected).square(), expected.square(), torch.ones_like(expected)
            found = torch.stack([row.flatten(1).sum(1) for row in rows])  # [3, A·B]
            table.index_add_(1, torch.tensor(bins, device=table.device), found)
    lesson.ranks.add_up(table)
    return Errors(*table.cpu())


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
