"""Epoch after epoch, step after step: training, the looks at held-out points in between, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from vqdm.tracking import JsonLines, Tracker, bar, say
from vqdm.training.checkpoints import Checkpoints
from vqdm.training.points import Point, Points, shuffled, timestep_weights
from vqdm.training.trainer import Diverged, Step, Trainer
from vqdm.training.watching import Errors, Speed, duration, measure

RISEN = 2.0  # a held-out loss this many times the first one ends training


class Course(NamedTuple):
    """What is stepped over.

    Attributes:
        points: epoch → its points; asked for once an epoch, when the student is where the epoch begins.
        steps_an_epoch, total: steps; `total` may end the last epoch early.
        batch: points a step.
        timestep_sampling: as `timestep_weights` has it.
        seed: of the order of points.
    """

    points: Callable[[int], Points]
    steps_an_epoch: int
    total: int
    batch: int
    timestep_sampling: str
    seed: int


@dataclass
class Progress:
    """What is known so far, beside the trainer's tensors; plain JSON.

    Attributes:
        best: step and loss of the least held-out loss.
        first_loss: held-out loss before the first step.
        epoch_loss, error_at: held-out loss, over all and by timestep bin, where the newest epoch began.
        settled: an epoch gained too little for another to follow.
        scaler: state of the gradient scaler.
    """

    best: dict = field(default_factory=dict)
    first_loss: float = 0.0
    epoch_loss: float = 0.0
    error_at: list[float] = field(default_factory=list)
    settled: bool = False
    scaler: dict = field(default_factory=dict)


class Looks(NamedTuple):
    """When training is looked at, and what is done then.

    Attributes:
        eval_step, checkpointing_steps, visualize_step: every so many steps; 0 = never.
        tolerance: an epoch that lowers the held-out loss by a smaller share is the last; 0 = none is.
        pictures: called with the step.
    """

    eval_step: int
    checkpointing_steps: int
    visualize_step: int
    tolerance: float
    pictures: Callable[[int], None]


class Loop:
    """Runs a course.

    Args:
        held_out: points and which of them are looked at.
        log: rows of steps and looks; the first process alone writes.
    """

    def __init__(
        self,
        trainer: Trainer,
        course: Course,
        held_out: tuple[Points, Sequence[Point]],
        looks: Looks,
        checkpoints: Checkpoints,
        log: JsonLines,
        tracker: Tracker,
    ):
        self.trainer, self.course, self.held_out, self.looks = trainer, course, held_out, looks
        self.checkpoints, self.log, self.tracker = checkpoints, log, tracker
        self.main = trainer.lesson.ranks.main
        self.progress = Progress()
        self.speed = Speed(course.total)

    def resume(self, step: int) -> None:
        """Go on from a checkpoint."""
        state = self.checkpoints.load_state(step)
        known = {name: state[name] for name in asdict(self.progress)}
        self.progress = Progress(**known)
        self.trainer.load_state(self.checkpoints.load(step), step, self.progress.scaler)

    def run(self) -> None:
        """Train to the end of the course, or until an epoch gains too little.

        Raises:
            Diverged: the loss is not finite, or the held-out loss has risen; the best parameters are on disk.
        """
        if self.trainer.done == 0:
            errors = self.look()
            self.progress.first_loss = self.progress.epoch_loss = errors.loss
            self.progress.error_at = errors.loss_by_timestep
        with bar(total=self.course.total, what="steps") as ticks:
            ticks.update(self.trainer.done)
            while self.trainer.done < self.course.total and not self.progress.settled:
                self._epoch(self.trainer.done // self.course.steps_an_epoch, ticks)
        if self.progress.settled:
            say("the epoch gained less than --finetune_relative_mse_tolerance: training ends")

    def _epoch(self, epoch: int, ticks) -> None:
        course, points = self.course, self.course.points(epoch)
        weights = timestep_weights(points, course.timestep_sampling, self.progress.error_at)
        order = shuffled(points, weights, f"{course.seed}:order:{epoch}")
        last = min(course.total, (epoch + 1) * course.steps_an_epoch)
        self.speed.restart()
        while self.trainer.done < last:
            start = (self.trainer.done - epoch * course.steps_an_epoch) * course.batch
            step = self.trainer.step(points, order[start : start + course.batch])
            ticks.update()
            self._tell(step)
            self._after(last)

    def _after(self, last: int) -> None:
        """Look, draw and save where it is time."""
        done, looks = self.trainer.done, self.looks
        ends = done == last
        if ends or _due(done, looks.eval_step):
            errors = self.look()
            if ends:
                self._close_epoch(errors)
        if _due(done, looks.visualize_step):
            with self.trainer.average.shown():
                looks.pictures(done)
        if _due(done, looks.checkpointing_steps):
            self.save()
        self.speed.restart()

    def look(self) -> Errors:
        """Measure on held-out points; keep the parameters if they are the best.

        Raises:
            Diverged: the held-out loss has risen far above what it was at first, or is not finite.
        """
        done, progress = self.trainer.done, self.progress
        with self.trainer.average.shown():
            errors = measure(self.trainer.lesson, *self.held_out)
        self._write({"held_out_loss": errors.loss, "held_out_db": errors.db, "db_by_timestep": errors.db_by_timestep})
        say(f"step {done}/{self.course.total}: held-out error {errors.db:.2f} dB, by timestep {_row(errors)}")
        if not progress.best or errors.loss < progress.best["loss"]:
            progress.best = {"step": done, "loss": errors.loss, "db": errors.db}
            if self.main:
                self.checkpoints.save_best(done, self.trainer.shown_tensors())
        if done and not errors.loss < RISEN * progress.first_loss:
            raise Diverged(
                f"the held-out loss is {errors.loss:.3g} at step {done}, it began at {progress.first_loss:.3g}"
            )
        return errors

    def save(self) -> None:
        """Write a checkpoint."""
        self.progress.scaler = self.trainer.scaler.state_dict()
        if self.main:
            self.checkpoints.save(self.trainer.done, self.trainer.state_tensors(), asdict(self.progress))
        self.trainer.lesson.ranks.wait()

    def _close_epoch(self, errors: Errors) -> None:
        """Note where the next epoch begins, and whether there is to be one."""
        progress, tolerance = self.progress, self.looks.tolerance
        progress.settled = tolerance > 0 and errors.loss > (1 - tolerance) * progress.epoch_loss
        progress.epoch_loss, progress.error_at = errors.loss, errors.loss_by_timestep

    def _tell(self, step: Step) -> None:
        speed = self.speed.tick(self.trainer.done, self.course.batch)
        norm = step.gradient_norm if math.isfinite(step.gradient_norm) else None  # where float16 overflowed
        row = {"loss": step.loss, "lr": step.rate, "gradient_norm": norm} | step.codes | speed
        self._write(row)
        if self.trainer.done % 10 == 0:
            say(
                f"step {self.trainer.done}/{self.course.total}: loss {step.loss:.3g}, "
                f"{speed['points_per_second']:.1f} points/s, {duration(speed['seconds_left'])} left"
            )

    def _write(self, row: dict) -> None:
        if self.main:
            self.log.write({"step": self.trainer.done} | row)
            self.tracker.log(_flat(row), step=self.trainer.done)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _flat(row: dict) -> dict:
    """A row with every entry of a list under a name of its own."""
    lists = {name: value for name, value in row.items() if isinstance(value, list)}
    return row | {f"{name}/{k}": one for name, value in lists.items() for k, one in enumerate(value)}


def _row(errors: Errors) -> str:
    return " ".join("-" if one is None else f"{one:.1f}" for one in errors.db_by_timestep)
