"""The training loop: epochs of steps, evaluations on held-out points, checkpoints, early stopping."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqdm.errors import RunError
from vqdm.finetuning.config import AUTO
from vqdm.finetuning.data import Point, Points, shuffled, timestep_weights
from vqdm.finetuning.evaluation import Errors, Throughput, duration, evaluate
from vqdm.finetuning.trainer import Diverged, StepResult, Trainer, choose_learning_rate, rounded_to
from vqdm.storage.files import CorruptFileError, load_checked, load_checked_json, save_checked, save_checked_json
from vqdm.tracking import JsonLines, Tracker, log_info, progress_bar

# ---------------------------------------------------------------------------------------------------------- checkpoints
#
# `checkpoint-<step>` folders, and the best parameters so far. A checkpoint has `parameters`, `optimizer`, `average`,
# `code_updates` and `random` as safetensors (no file for an empty one) and `state.json` with the counters. The order of
# points follows from the seed: the step is the place in the data.
#
# accelerate's `save_state` is not used: it writes pickles, not atomically, and not the codes and their drift.

Tensors = dict[str, dict[str, Tensor]]
CPU = torch.device("cpu")


class Checkpoints:
    """The checkpoints and the best parameters in a folder.

    Args:
        limit: number of checkpoints kept.
        device: of the training; the state of its random generator is saved beside the CPU's.
    """

    def __init__(self, folder: Path, limit: int, device: torch.device = CPU):
        self.folder, self.limit, self.device = folder, limit, device

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending."""
        names = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in self.folder.glob("checkpoint-*")]
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def best_path(self, step: int) -> Path:
        return self.folder / "best" / f"step-{step}.safetensors"

    def save(self, step: int, tensors: Tensors, state: dict) -> None:
        """Write a checkpoint atomically, then delete the oldest, and best parameters that no checkpoint refers to."""
        beside = self.folder / "checkpoint-partial"
        shutil.rmtree(beside, ignore_errors=True)
        for name, part in (tensors | {"random": random_state(self.device)}).items():
            if part:
                save_checked(part, beside / f"{name}.safetensors")
        save_checked_json(state | {"step": step}, beside / "state.json")
        shutil.rmtree(self.path(step), ignore_errors=True)
        beside.replace(self.path(step))
        self._prune()

    def _prune(self) -> None:
        for step in self.steps()[: -self.limit]:
            shutil.rmtree(self.path(step))
        named = {self.load_state(step)["best"]["step"] for step in self.steps()}
        for file in (self.folder / "best").glob("step-*.safetensors"):
            if file not in map(self.best_path, named):
                file.unlink()

    def load_state(self, step: int) -> dict:
        """Return the JSON of a checkpoint. Raises RunError if it is missing or damaged."""
        return _intact(self.path(step) / "state.json", load_checked_json)

    def load(self, step: int) -> Tensors:
        """Return the tensors of a checkpoint, by file, and restore the random generators.

        Raises:
            RunError: a file is missing or damaged.
        """
        names = ("parameters", "optimizer", "average", "code_updates", "random")
        files = {name: self.path(step) / f"{name}.safetensors" for name in names}
        tensors = {name: _intact(file, load_checked)[0] if file.is_file() else {} for name, file in files.items()}
        set_random_state(tensors.pop("random"), self.device)
        return tensors

    def save_best(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write the best parameters, of step `step`, atomically."""
        save_checked(tensors, self.best_path(step))

    def load_best(self, step: int) -> dict[str, Tensor]:
        """Return the best parameters, of step `step`. Raises RunError if they are missing or damaged."""
        return _intact(self.best_path(step), load_checked)[0]

    def clear(self) -> None:
        """Delete all checkpoints and the best parameters."""
        for path in (*map(self.path, self.steps()), self.folder / "best", self.folder / "checkpoint-partial"):
            shutil.rmtree(path, ignore_errors=True)


def _intact(file: Path, read: Callable[[Path], Any]) -> Any:
    """Return `read(file)`. Raises RunError if the file is missing or damaged."""
    try:
        return read(file)
    except (OSError, CorruptFileError) as error:
        raise RunError(f"{file} is missing or damaged ({error}); delete {file.parent} and --resume") from None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators of the CPU and of `device`, by device type."""
    held = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        held["cuda"] = torch.cuda.get_rng_state(device)
    return held


def set_random_state(held: dict[str, Tensor], device: torch.device) -> None:
    """Restore `random_state`."""
    if "cpu" in held:
        torch.set_rng_state(held["cpu"])
    if "cuda" in held and device.type == "cuda":
        torch.cuda.set_rng_state(held["cuda"], device)


DIVERGED = 2.0  # a held-out loss this many times the first one ends training
REDUCTION = 3.0  # divides the learning rate after an evaluation without a gain
LEAST_GAIN = 0.01  # dB: a smaller gain counts as none
ROUNDING = 0.005  # dB
STEPS_PER_LINE, SECONDS_PER_LINE = 10, 30.0  # of the log, whichever comes first


class TrainingSchedule(NamedTuple):
    """The steps of a training.

    Attributes:
        points: epoch → its points; called once per epoch, with the student in its state at the epoch's start.
        steps_per_epoch, total_steps: `total_steps` may end the last epoch early.
        batch_size: points per step.
        timestep_sampling: as in `timestep_weights`.
        seed: of the order of points.
    """

    points: Callable[[int], Points]
    steps_per_epoch: int
    total_steps: int
    batch_size: int
    timestep_sampling: str
    seed: int


class EvaluationSchedule(NamedTuple):
    """When the student is evaluated and saved, and when training stops.

    Attributes:
        eval_step, checkpointing_steps, visualize_step: every N steps; 0 = never.
        keep_best: the result is the best step; with a learning rate of "auto" steps without a gain are undone.
        patience: evaluations without a new best step after which training stops; 0 = never.
        tolerance: training stops after an epoch that lowers the held-out loss by a smaller share; 0 = never.
        stored_types: name → type of parameters on disk: evaluated are the values that will be read back.
        save_images: called with the number of the step.
    """

    eval_step: int
    checkpointing_steps: int
    visualize_step: int
    keep_best: bool
    patience: int
    tolerance: float
    stored_types: dict[str, torch.dtype]
    save_images: Callable[[int], None]


@dataclass
class Progress:
    """The state of a training beside the trainer's tensors; plain JSON.

    Attributes:
        learning_rate: at the first step.
        first, best: step, loss, `db` and `median_db` on held-out points, of step 0 and of the best step.
        evaluations_since_best: evaluations since `best` was found.
        reductions, reduced_at: number of reductions of the learning rate, and the step of the last one.
        epoch_loss, loss_by_timestep: held-out loss, of all points and per timestep bin, at the epoch's start.
        stop_reason: why training stops before its last step; empty while it goes on.
        scaler: state of the gradient scaler.
    """

    learning_rate: float = 0.0
    first: dict = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    evaluations_since_best: int = 0
    reductions: int = 0
    reduced_at: int = 0
    epoch_loss: float = 0.0
    loss_by_timestep: list[float] = field(default_factory=list)
    stop_reason: str = ""
    scaler: dict = field(default_factory=dict)


def is_better(errors: Errors, best: dict, first: dict) -> bool:
    """Return whether errors beat those of the best step so far, `best`; `first` are those of step 0.

    The mean of the two figures in dB, of the sum and of the median prompt, must be lower than the best step's by
    `LEAST_GAIN`, and neither figure may be above that of step 0. A few prompts dominate the sum: training can lower it
    while most prompts get worse, and the other way round.
    """
    found, limits = errors.figures, {name: first[name] + ROUNDING for name in ("db", "median_db")}
    gain = sum(best[name] - value for name, value in found.items()) / len(found)
    return gain >= LEAST_GAIN and all(value <= limits[name] for name, value in found.items())


class Loop:
    """Runs a training.

    Args:
        held_out: points, and the selection of them that is evaluated on.
        log: rows of steps and evaluations; written by the first process.

    Attributes:
        first_step: what the tracker's steps begin at.
    """

    first_step = 0

    def __init__(
        self,
        trainer: Trainer,
        schedule: TrainingSchedule,
        held_out: tuple[Points, Sequence[Point]],
        evaluations: EvaluationSchedule,
        checkpoints: Checkpoints,
        log: JsonLines,
        tracker: Tracker,
    ):
        self.trainer, self.schedule, self.held_out, self.evaluations = trainer, schedule, held_out, evaluations
        self.checkpoints, self.log, self.tracker = checkpoints, log, tracker
        self.ranks = trainer.loss_fn.ranks
        self.progress = Progress()
        self.throughput, self.last_line = Throughput(schedule.total_steps), time.perf_counter()

    def resume(self, step: int) -> None:
        """Restore the checkpoint of a step. Raises RunError if it is damaged."""
        state = self.checkpoints.load_state(step)
        self.progress = Progress(**{name: state[name] for name in asdict(self.progress)})
        self.trainer.learning_rate = self.learning_rate
        self.trainer.warmup_start = self.progress.reduced_at
        self.trainer.load_state(self.checkpoints.load(step), step, self.progress.scaler)

    def run(self) -> None:
        """Train to the last step, or until an evaluation stops the training.

        Raises:
            Diverged: the loss is not finite, or the held-out loss has risen; the best parameters are on disk.
        """
        trainer, schedule = self.trainer, self.schedule
        if trainer.steps_done == 0:
            self._start()
        with progress_bar(total=schedule.total_steps, description="training steps") as bar:
            bar.update(trainer.steps_done)
            while trainer.steps_done < schedule.total_steps and not self.progress.stop_reason:
                epoch = trainer.steps_done // schedule.steps_per_epoch
                points = schedule.points(epoch)
                weights = timestep_weights(points, schedule.timestep_sampling, self.progress.loss_by_timestep)
                order = shuffled(points, weights, f"{schedule.seed}:order:{epoch}")
                end = min(schedule.total_steps, (epoch + 1) * schedule.steps_per_epoch)
                self.throughput.restart()
                while trainer.steps_done < end and not self.progress.stop_reason:
                    start = (trainer.steps_done - epoch * schedule.steps_per_epoch) * schedule.batch_size
                    self._log_step(trainer.step(points, order[start : start + schedule.batch_size]))
                    bar.update()
                    self._after_step(end)
        if self.progress.stop_reason:
            log_info(f"training stops at step {trainer.steps_done}: {self.progress.stop_reason}")

    def run_to_result(self) -> tuple[int, Diverged | None]:
        """Train, and put what is kept into the student; return its step, and why training diverged."""
        divergence = None
        try:
            self.run()
        except Diverged as error:
            divergence = error
        self.ranks.barrier()  # the first process has written the best parameters
        if divergence is None and not self.evaluations.keep_best:
            self.trainer.average.swap()
            return self.trainer.steps_done, None
        best = self.progress.best
        self.trainer.load_result(self.checkpoints.load_best(best["step"]))
        log_info(f"keeping {self.kept()}")
        return best["step"], divergence

    def kept(self) -> str:
        """Return the best step and its errors, in words."""
        best = self.progress.best
        figures = f"{best['db']:.2f} dB, median {best['median_db']:.2f} dB"
        return f"step {best['step']}, the best by held-out error ({figures})"

    def _start(self) -> None:
        """Evaluate step 0, and choose the learning rate."""
        errors, config = self.evaluate(), self.trainer.config
        self._end_epoch(errors)
        self.progress.learning_rate = self.trainer.learning_rate = choose_learning_rate(config, errors.median_db)
        source = "from --finetune_lr"
        if config.finetune_lr == AUTO:
            source = f"chosen by the held-out error (median {errors.median_db:.2f} dB)"
        log_info(f"learning rate {self.trainer.learning_rate:g}, {source}")

    def _after_step(self, epoch_end: int) -> None:
        """Evaluate, save images and save a checkpoint, each if it is due."""
        done, due = self.trainer.steps_done, self.evaluations
        if done == epoch_end or _is_due(done, due.eval_step):
            errors = self.evaluate()
            if done == epoch_end:
                self._end_epoch(errors)
        if _is_due(done, due.visualize_step):
            with self.trainer.average.applied():
                due.save_images(done)
        if _is_due(done, due.checkpointing_steps):
            self.save_checkpoint()
        self.throughput.restart()

    def evaluate(self) -> Errors:
        """Evaluate on held-out points, with the values that would be stored, and save them if they are the best.

        Raises:
            Diverged: as `_handle_no_gain`.
        """
        done, progress = self.trainer.steps_done, self.progress
        with self.trainer.average.applied(), rounded_to(self.evaluations.stored_types, self.trainer.trained):
            errors = evaluate(self.trainer.loss_fn, *self.held_out)
        figures = {"held_out_db": errors.db, "held_out_median_db": errors.median_db}
        self._write({"held_out_loss": errors.loss} | figures | {"held_out_db_by_timestep": errors.db_by_timestep})
        by_timestep = " ".join("-" if db is None else f"{db:.1f}" for db in errors.db_by_timestep)
        log_info(
            f"step {done}/{self.schedule.total_steps}: held-out error {errors.db:.2f} dB, "
            f"median {errors.median_db:.2f} dB, by timestep (least noise first) {by_timestep}"
        )
        found = {"step": done, "loss": errors.loss} | errors.figures
        progress.first = progress.first or found
        progress.evaluations_since_best += 1
        if not progress.best or is_better(errors, progress.best, progress.first):
            progress.best, progress.evaluations_since_best = found, 0
            if self.ranks.main:
                self.checkpoints.save_best(done, self.trainer.result_tensors())
        else:
            self._handle_no_gain(errors)
        return errors

    @property
    def learning_rate(self) -> float:
        """The present learning rate, without warmup and schedule."""
        return self.progress.learning_rate / REDUCTION**self.progress.reductions

    def _handle_no_gain(self, errors: Errors) -> None:
        """Stop training, or, if the learning rate is "auto", go back to the best step and reduce the learning rate.

        Raises:
            Diverged: the held-out loss is not finite or far above the first one, at the user's own learning rate.
        """
        progress, done = self.progress, self.trainer.steps_done
        automatic = self.trainer.config.finetune_lr == AUTO and self.evaluations.keep_best
        if not (automatic or errors.loss < DIVERGED * progress.first["loss"]):
            raise Diverged(
                f"the held-out loss is {errors.loss:.3g} at step {done}; it was {progress.first['loss']:.3g} at step 0"
            )
        if 0 < self.evaluations.patience <= progress.evaluations_since_best:
            count, best = progress.evaluations_since_best, progress.best["step"]
            progress.stop_reason = f"{count} evaluations without a gain over step {best}"
        elif automatic and done < self.schedule.total_steps:
            progress.reductions, progress.reduced_at = progress.reductions + 1, done
            self.ranks.barrier()  # the first process has written the best parameters
            self.trainer.restart(self.checkpoints.load_best(progress.best["step"]))
            self.trainer.learning_rate = self.learning_rate
            log_info(f"no gain: back to step {progress.best['step']}, learning rate {self.learning_rate:.2g}")

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the present step."""
        self.progress.scaler = self.trainer.scaler.state_dict()
        if self.ranks.main:
            self.checkpoints.save(self.trainer.steps_done, self.trainer.state_tensors(), asdict(self.progress))
        self.ranks.barrier()

    def _end_epoch(self, errors: Errors) -> None:
        """Note the errors at which the next epoch starts; stop training if the epoch gained too little."""
        progress, tolerance = self.progress, self.evaluations.tolerance
        if tolerance > 0 and self.trainer.steps_done and errors.loss > (1 - tolerance) * progress.epoch_loss:
            progress.stop_reason = "the epoch gained less than --finetune_relative_mse_tolerance"
        progress.epoch_loss, progress.loss_by_timestep = errors.loss, errors.loss_by_timestep

    def _log_step(self, step: StepResult) -> None:
        done, speed = self.trainer.steps_done, self.throughput.tick(self.trainer.steps_done, self.schedule.batch_size)
        norm = step.gradient_norm if math.isfinite(step.gradient_norm) else None  # if float16 overflowed
        self._write(
            {"loss": step.loss, "learning_rate": step.learning_rate, "gradient_norm": norm} | step.codes | speed
        )
        if done % STEPS_PER_LINE == 0 or time.perf_counter() - self.last_line > SECONDS_PER_LINE:
            self.last_line = time.perf_counter()
            log_info(
                f"step {done}/{self.schedule.total_steps}: loss {step.loss:.3g}, "
                f"{speed['points_per_second']:.1f} points/s, {duration(speed['seconds_left'])} left"
            )

    def _write(self, row: dict) -> None:
        """Write a row to the log and the tracker; the tracker gets each entry of a list under its own name."""
        if self.ranks.main:
            self.log.write({"step": self.trainer.steps_done} | row)
            lists = {name: value for name, value in row.items() if isinstance(value, list)}
            flat = {f"{name}/{k}": entry for name, value in lists.items() for k, entry in enumerate(value)}
            self.tracker.log(row | flat, step=self.first_step + self.trainer.steps_done)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
