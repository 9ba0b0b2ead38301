"""Epoch after epoch, step after step: training, evaluation on held-out points in between, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch

from vqdm.finetuning.checkpoints import Checkpoints
from vqdm.finetuning.config import AUTO
from vqdm.finetuning.evaluation import Errors, Speed, duration, measure
from vqdm.finetuning.optimizer import learning_rate
from vqdm.finetuning.parameters import as_stored
from vqdm.finetuning.points import Point, Points, shuffled, timestep_weights
from vqdm.finetuning.trainer import Diverged, Step, Trainer
from vqdm.tracking import JsonLines, Tracker, log_info, progress_bar

RISEN = 2.0  # a held-out loss this many times the first one ends training
REDUCTION = 3.0  # of the learning rate, where it has done harm
LEAST_GAIN = 0.01  # dB: a smaller one is not distinguished from none
ROUNDING = 0.005  # dB


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
        learning_rate: that training began with.
        first, best: step, loss, `db` and `median_db` on held-out points, before the first step and of the step to keep.
        idle: evaluations since `best` was found.
        reductions, began: how often the learning rate was reduced, and the step at which it last was.
        epoch_loss, error_at: held-out loss, over all and by timestep bin, where the newest epoch began.
        ended: why training ends before its last step; empty while it does not.
        scaler: state of the gradient scaler.
    """

    learning_rate: float = 0.0
    first: dict = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    idle: int = 0
    reductions: int = 0
    began: int = 0
    epoch_loss: float = 0.0
    error_at: list[float] = field(default_factory=list)
    ended: str = ""
    scaler: dict = field(default_factory=dict)


class Monitor(NamedTuple):
    """When training is evaluated, saved and stopped.

    Attributes:
        eval_step, checkpointing_steps, visualize_step: every so many steps; 0 = never.
        keep_best: the best step is the result; steps at a learning rate "auto" that gain nothing are undone.
        patience: training ends after so many evaluations without a better one than before; 0 = it does not.
        tolerance: an epoch that lowers the held-out loss by a smaller share is the last; 0 = none is.
        types: of parameters as they are stored, by name: evaluated is what would be read back.
        images: called with the step.
    """

    eval_step: int
    checkpointing_steps: int
    visualize_step: int
    keep_best: bool
    patience: int
    tolerance: float
    types: dict[str, torch.dtype]
    images: Callable[[int], None]


def is_better(errors: Errors, best: dict, first: dict) -> bool:
    """Whether a student is to be kept rather than the best so far.

    The mean of its two figures in dB, the error of the sum and that of the median prompt, must be lower by `LEAST_GAIN`
    than the best one's, and neither figure above that of step 0. A few prompts dominate the sum: training can lower it
    while most prompts get worse, and the other way round.
    """
    found, worst = errors.figures, {name: first[name] + ROUNDING for name in ("db", "median_db")}
    gain = sum(best[name] - value for name, value in found.items()) / len(found)
    return gain >= LEAST_GAIN and all(value <= worst[name] for name, value in found.items())


class Loop:
    """Runs a course.

    Args:
        held_out: points and which of them are evaluated on.
        log: rows of steps and evaluations; the first process alone writes.
    """

    def __init__(
        self,
        trainer: Trainer,
        course: Course,
        held_out: tuple[Points, Sequence[Point]],
        monitor: Monitor,
        checkpoints: Checkpoints,
        log: JsonLines,
        tracker: Tracker,
    ):
        self.trainer, self.course, self.held_out, self.monitor = trainer, course, held_out, monitor
        self.checkpoints, self.log, self.tracker = checkpoints, log, tracker
        self.main = trainer.lesson.ranks.main
        self.progress = Progress()
        self.speed = Speed(course.total)

    def resume(self, step: int) -> None:
        """Continue from a checkpoint."""
        state = self.checkpoints.load_state(step)
        known = {name: state[name] for name in asdict(self.progress)}
        self.progress = Progress(**known)
        self.trainer.learning_rate = self.learning_rate
        self.trainer.began = self.progress.began
        self.trainer.load_state(self.checkpoints.load(step), step, self.progress.scaler)

    def run(self) -> None:
        """Train to the end of the course, or until too little is gained.

        Raises:
            Diverged: the loss is not finite, or the held-out loss has risen; the best parameters are on disk.
        """
        if self.trainer.done == 0:
            errors = self.evaluate()
            self._close_epoch(errors)
            self._begin_at(learning_rate(self.trainer.config, errors))
        with progress_bar(total=self.course.total, description="steps") as ticks:
            ticks.update(self.trainer.done)
            while self.trainer.done < self.course.total and not self.progress.ended:
                self._epoch(self.trainer.done // self.course.steps_an_epoch, ticks)
        if self.progress.ended:
            log_info(f"training ends at step {self.trainer.done}: {self.progress.ended}")

    def _begin_at(self, rate: float) -> None:
        self.progress.learning_rate = self.trainer.learning_rate = rate
        chosen = self.trainer.config.finetune_lr == AUTO
        why = f"chosen by the held-out error (median {self.progress.first['median_db']:.2f} dB)"
        log_info(f"learning rate {rate:g}, {why if chosen else 'as --finetune_lr says'}")

    def _epoch(self, epoch: int, ticks) -> None:
        course, points = self.course, self.course.points(epoch)
        weights = timestep_weights(points, course.timestep_sampling, self.progress.error_at)
        order = shuffled(points, weights, f"{course.seed}:order:{epoch}")
        last = min(course.total, (epoch + 1) * course.steps_an_epoch)
        self.speed.restart()
        while self.trainer.done < last and not self.progress.ended:
            start = (self.trainer.done - epoch * course.steps_an_epoch) * course.batch
            step = self.trainer.step(points, order[start : start + course.batch])
            ticks.update()
            self._tell(step)
            self._after(last)

    def _after(self, last: int) -> None:
        """Evaluate, generate images and save where it is time."""
        done, monitor = self.trainer.done, self.monitor
        ends = done == last
        if ends or _due(done, monitor.eval_step):
            errors = self.evaluate()
            if ends:
                self._close_epoch(errors)
        if _due(done, monitor.visualize_step):
            with self.trainer.average.shown():
                monitor.images(done)
        if _due(done, monitor.checkpointing_steps):
            self.save()
        self.speed.restart()

    def evaluate(self) -> Errors:
        """Measure on held-out points, with the values that would be stored; save them if they are the best.

        Raises:
            Diverged: as `_gained_nothing`.
        """
        done, progress, types = self.trainer.done, self.progress, self.monitor.types
        with self.trainer.average.shown(), as_stored(self.trainer.trained, types):
            errors = measure(self.trainer.lesson, *self.held_out)
        figures = {"held_out_db": errors.db, "held_out_median_db": errors.median_db}
        self._write({"held_out_loss": errors.loss} | figures | {"db_by_timestep": errors.db_by_timestep})
        log_info(
            f"step {done}/{self.course.total}: held-out error {errors.db:.2f} dB, median {errors.median_db:.2f} dB, "
            f"by timestep {_row(errors)}"
        )
        found = {"step": done, "loss": errors.loss} | errors.figures
        progress.first = progress.first or found
        progress.idle += 1
        if not progress.best or is_better(errors, progress.best, progress.first):
            progress.best, progress.idle = found, 0
            if self.main:
                self.checkpoints.save_best(done, self.trainer.shown_tensors())
        else:
            self._gained_nothing(errors)
        return errors

    @property
    def learning_rate(self) -> float:
        """What steps have now, before warmup and schedule."""
        return self.progress.learning_rate / REDUCTION**self.progress.reductions

    def _gained_nothing(self, errors: Errors) -> None:
        """End training, or go back to the best step where the learning rate is for this program to choose.

        Raises:
            Diverged: the held-out loss has risen far above what it was at first, or is not finite, at a learning rate
                that the user chose.
        """
        progress, monitor, done = self.progress, self.monitor, self.trainer.done
        chosen = self.trainer.config.finetune_lr == AUTO and monitor.keep_best
        if not (chosen or errors.loss < RISEN * progress.first["loss"]):
            raise Diverged(
                f"the held-out loss is {errors.loss:.3g} at step {done}, it began at {progress.first['loss']:.3g}"
            )
        if 0 < monitor.patience <= progress.idle:
            progress.ended = f"{progress.idle} evaluations gained nothing over step {progress.best['step']}"
        elif chosen and done < self.course.total:
            self._reduce()

    def _reduce(self) -> None:
        """Go back to the best step, and on from it with a smaller learning rate."""
        progress = self.progress
        progress.reductions, progress.began = progress.reductions + 1, self.trainer.done
        self.trainer.lesson.ranks.barrier()  # the first process has written the best
        self.trainer.restart(self.checkpoints.load_best(progress.best["step"]))
        self.trainer.learning_rate = self.learning_rate
        log_info(f"no gain: back to step {progress.best['step']}, learning rate {self.learning_rate:.2g}")

    def save(self) -> None:
        """Write a checkpoint."""
        self.progress.scaler = self.trainer.scaler.state_dict()
        if self.main:
            self.checkpoints.save(self.trainer.done, self.trainer.state_tensors(), asdict(self.progress))
        self.trainer.lesson.ranks.barrier()

    def _close_epoch(self, errors: Errors) -> None:
        """Note where the next epoch begins, and whether there is to be one."""
        progress, tolerance = self.progress, self.monitor.tolerance
        if tolerance > 0 and self.trainer.done and errors.loss > (1 - tolerance) * progress.epoch_loss:
            progress.ended = "the epoch gained less than --finetune_relative_mse_tolerance"
        progress.epoch_loss, progress.error_at = errors.loss, errors.loss_by_timestep

    def _tell(self, step: Step) -> None:
        speed = self.speed.tick(self.trainer.done, self.course.batch)
        norm = step.gradient_norm if math.isfinite(step.gradient_norm) else None  # where float16 overflowed
        row = {"loss": step.loss, "lr": step.rate, "gradient_norm": norm} | step.codes | speed
        self._write(row)
        if self.trainer.done % 10 == 0:
            log_info(
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
