"""Fine-tune a denoiser block by block: each block towards the teacher's output of that block, then the next one.

As in EfficientQAT's Block-AP (arXiv 2407.11062, §3.2) and AutoRound (arXiv 2309.05516), all floating-point tensors of a
block are trained. A block of the student gets what the trained blocks before it return; its target is what the block of
the teacher returns in the teacher's own call, so that it also makes up for errors of the blocks before it. Shared
codebooks stay, because earlier blocks decode with them.

One block of each model is on the device at a time, and the teacher's others stay in their files, which are mapped. What
blocks return waits in RAM or on the disk, in the teacher's type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vqdm.diffusion.denoisers import denoiser_of
from vqdm.diffusion.streams import FIRST, BlockSwapper, BlockWalk
from vqdm.diffusion.trajectories import batches, by_kind
from vqdm.errors import UserError
from vqdm.finetuning.code_updates import CodeUpdates
from vqdm.finetuning.config import FinetuneConfig
from vqdm.finetuning.data import Batch, Point, Points, autocast, spread
from vqdm.finetuning.evaluation import read_log
from vqdm.finetuning.loop import Checkpoints, EvaluationSchedule, Loop, TrainingSchedule
from vqdm.finetuning.trainer import DistillationLoss, Trainer, trainable, write_back
from vqdm.layers.quantized import quantized_layers
from vqdm.storage.files import save_checked, save_json
from vqdm.storage.run_folder import read_shard
from vqdm.tracking import JsonLines, log_info

if TYPE_CHECKING:
    from vqdm.finetuning.job import FinetuneJob


@dataclass(frozen=True)
class BlockLoss(DistillationLoss):
    """Mean squared error between what a block of the student and of the teacher return, over all their values.

    Attributes:
        student: the block.
        walk, targets: of the student, at the block, and of the teacher, beyond it.
        place: number of the block.
        numbers: of each point in the walks.
    """

    walk: BlockWalk
    targets: BlockWalk
    place: int
    numbers: dict[Point, int]

    def micro_batches(self, points: Points, chosen: Sequence[Point]) -> Iterator[tuple[Batch, list[int]]]:
        """Yield batches as `DistillationLoss` does; `teacher_output` is what the teacher's block returned: [A·B, V]."""
        own = self.ranks.shard(chosen)
        for alike in points.alike(range(len(own)), own):
            for some in by_kind(alike, lambda place: self.targets.outputs.kind(self.numbers[own[place]])):
                for places in batches(some, self.micro_batch_size):
                    together = [own[place] for place in places]
                    keys = [self.numbers[point] for point in together]
                    call = points.batch(together, self.ranks.device, torch.float32).call
                    target = joined(self.targets.outputs.together(keys, self.place))
                    yield Batch(len(places), {"keys": keys, "call": call}, target), places

    def student_output(self, call: dict) -> Tensor:
        """Return what the student's block returns, float32 [A·B, V]."""
        with autocast(self.ranks.device, self.dtype):
            return joined(self.walk.output(call["keys"], self.place, call["call"]))


def joined(returned) -> Tensor:
    """Return all floating-point tensors [A·B, ...] that a block returned as one: float32 [A·B, V]."""
    tensors = [one for one in tree_leaves(returned) if isinstance(one, Tensor) and one.is_floating_point()]
    return torch.cat([one.flatten(1).float() for one in tensors], 1)


# ------------------------------------------------------------------------------------------- points


def check_points(config: FinetuneConfig, calls: int) -> None:
    """Raise UserError if `block_points` are too few for one batch; `calls` are those of a trajectory."""
    count = config.finetune_nsamples * min(calls, max(1, config.block_points // config.finetune_nsamples))
    if count < config.finetune_batch_size:
        raise UserError(
            f"--finetune_batch_size is {config.finetune_batch_size}, but --block_points {config.block_points} of "
            f"--finetune_nsamples {config.finetune_nsamples} trajectories are {count} points"
        )


def chosen_points(config: FinetuneConfig, training: Points, held_out: Points) -> tuple[Points, list[Point]]:
    """Return the training points of the blocks, in one object with the held-out ones, which are returned beside it."""
    chosen, first = spread(training, config.block_points), len(training.parts)
    judged = [Point(first + k, n, j) for k, n, j in spread(held_out, config.held_out_points)]
    return Points([*training.parts, *held_out.parts], chosen), judged


# ------------------------------------------------------------------------------------------- blocks in turn


@contextmanager
def blocks_in_turn(models: Sequence[nn.Module], device: torch.device) -> Iterator[list[BlockSwapper]]:
    """Inside, one block of each model at a time is on the device. Raises UserError as `BlockSwapper`."""
    with ExitStack() as stack:
        swappers = []
        for model in models:
            swappers.append(BlockSwapper(model, device))
            stack.callback(swappers[-1].close)
        yield swappers


class Walks:
    """The calls of teacher and student on all points, as they go from block to block.

    Raises:
        UserError: as `BlockWalk`.
    """

    def __init__(self, job: FinetuneJob, points: Points, every: Sequence[Point]):
        self.job, self.numbers = job, {point: number for number, point in enumerate(every)}
        own = denoiser_of(job.pipeline).dtype
        types = {"teacher": (own, None), "student": (torch.float32, own)}  # of a call, and as it waits
        for (name, (dtype, kept)), swapper in zip(types.items(), job.swappers, strict=True):
            calls = {number: partial(self._call, points, point, dtype) for point, number in self.numbers.items()}
            folder = job.folder.work / "block_outputs" / str(job.ranks.rank) / name
            calls = {FIRST: calls[0]} | calls
            with self._computing(name):
                walk = BlockWalk(swapper, calls, folder if job.config.block_cache == "disk" else None, kept)
            setattr(self, name, walk)

    def _call(self, points: Points, point: Point, dtype: torch.dtype) -> dict:
        return points.batch([point], self.job.ranks.device, dtype).call

    def _computing(self, name: str):
        dtype = denoiser_of(self.job.pipeline).dtype if name == "student" else torch.float32
        return autocast(self.job.ranks.device, dtype)

    def reach(self, place: int) -> None:
        """Bring the student's calls to a block, and the teacher's beyond it."""
        for name, to in (("teacher", place + 1), ("student", place)):
            with self._computing(name), torch.no_grad():
                getattr(self, name).reach(to)
        for swapper in self.job.swappers:
            swapper.leave()

    def close(self) -> None:
        """Drop what blocks returned."""
        self.teacher.restart()
        self.student.restart()


def finetune_blocks(job: FinetuneJob, held_out: Points) -> list[dict]:
    """Train the student's blocks in turn, and return a row for each; those that an interrupted run finished are loaded.

    Row: `block`, errors on held-out points in dB, before and after, as `held_out_db` and `held_out_median_db`,
    `step_kept`, `steps`, `learning_rate`, `groups` and `groups_changed` of codes, and `diverged`.
    """
    with job.clock("points"):
        training = job.recorder.epoch(0, keep_outputs=False)
    points, judged = chosen_points(job.config, training, held_out)
    with job.clock("training"):
        walks, rows = Walks(job, points, [*points.all(), *judged]), []
        for place, name in enumerate(walks.student.names):
            file = job.folder.work / "blocks" / name / "result.safetensors"
            if not job.ranks.broadcast(file.is_file()):
                walks.reach(place)
                with job.swappers[1].holding(name) as block:
                    train_block(job, walks, block, place, points, judged)
                job.ranks.barrier()
            rows.append(load_block(job, name))
        walks.close()
    return rows


def load_block(job: FinetuneJob, name: str) -> dict:
    """Load a block that was trained into the student, and return its row."""
    folder = job.folder.work / "blocks" / name
    job.swappers[1].leave()  # a block that is on the device would come back as it was
    held = dict(job.student.get_submodule(name).named_parameters())
    for key, value in read_shard(folder / "result.safetensors").items():
        held[key].data.copy_(value)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def train_block(
    job: FinetuneJob, walks: Walks, block: nn.Module, place: int, points: Points, judged: list[Point]
) -> None:
    """Train a block on the device, and save what is kept of it, as it will be stored, with its row."""
    config, name = job.config, walks.student.names[place]
    folder = job.folder.work / "blocks" / name
    types = {key.removeprefix(f"{name}."): one for key, one in job.types.items() if key.startswith(f"{name}.")}
    trained = trainable(block, config.optimizer)
    updates = CodeUpdates(block, config.code_updates) if config.code_updates and quantized_layers(block) else None
    dtype = denoiser_of(job.pipeline).dtype
    about = (walks.student, walks.teacher, place, walks.numbers)
    loss_fn = BlockLoss(block, None, dtype, config.local_batch_size, job.ranks, *about)
    steps = config.block_steps if trained.tensors or updates else 0
    trainer = Trainer(loss_fn, trained, config.optimizer, steps, config.decode, updates)
    loop = block_loop(job, trainer, points, judged, types, Checkpoints(folder, config.checkpoints_total_limit))
    loop.first_step = place * config.block_steps
    log_info(f"block {place + 1}/{len(walks.student.names)} {name}")
    step_kept, divergence = loop.run_to_result()
    if divergence:
        log_info(f"block {name}: {divergence}; try a lower --finetune_lr")
    write_back(block, types, torch.float32)  # later blocks get what the stored values return
    groups, changed = updates.changed_groups() if updates else (0, 0)
    if updates:
        updates.close()
    first, last = loop.progress.first, loop.progress.best
    row = {
        "block": name,
        "held_out_db_before": first["db"],
        "held_out_db": last["db"],
        "held_out_median_db_before": first["median_db"],
        "held_out_median_db": last["median_db"],
        "step_kept": step_kept,
        "steps": trainer.steps_done,
        "learning_rate": loop.progress.learning_rate,
        "groups": groups,
        "groups_changed": changed,
        "diverged": str(divergence or ""),
    }
    if job.ranks.main:
        save_json(row, folder / "result.json")
        save_checked(trainer.state_tensors()["parameters"], folder / "result.safetensors")
        loop.checkpoints.clear()


def block_loop(
    job: FinetuneJob, trainer: Trainer, points: Points, judged: list[Point], types: dict, checkpoints: Checkpoints
) -> Loop:
    """Build the training loop of a block, and restore its newest checkpoint if there is one."""
    config, log = job.config, checkpoints.folder / "training.jsonl"
    per_epoch = len(points.all()) // config.finetune_batch_size
    about = (config.finetune_batch_size, config.timestep_sampling, config.seed)
    schedule = TrainingSchedule(lambda _: points, per_epoch, trainer.total_steps, *about)
    evaluations = EvaluationSchedule(
        config.eval_step,
        config.checkpointing_steps,
        0,
        config.finetune_keep_best,
        config.early_stopping_patience,
        config.finetune_relative_mse_tolerance,
        types,
        lambda _: None,
    )
    checkpoints.device, saved = job.ranks.device, checkpoints.steps()
    if job.ranks.main:
        read_log(log, saved[-1] if saved else -1)
    loop = Loop(trainer, schedule, (points, judged), evaluations, checkpoints, JsonLines(log), job.tracker)
    if saved:
        loop.resume(saved[-1])
        log_info(f"resuming after step {saved[-1]} of {trainer.total_steps}")
    return loop


def joined_logs(job: FinetuneJob, rows: list[dict]) -> list[dict]:
    """Return the rows of all blocks' training logs, each with the name of its block."""
    logs = ((row["block"], job.folder.work / "blocks" / row["block"] / "training.jsonl") for row in rows)
    return [{"block": name} | json.loads(line) for name, file in logs for line in file.read_text().splitlines()]
