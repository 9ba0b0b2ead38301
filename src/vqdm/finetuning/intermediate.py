"""Fine-tuning between the blocks of a quantization: the quantized blocks are trained before the next one is calibrated.

Trained are codebooks of the layers' own, scales, biases, norms and unquantized layers of the quantized blocks. Codes
stay, and so do shared codebooks, because the codes of later blocks are searched with them. Later blocks that are
calibrated on the student see the change; stored Hessians of the full-precision model depend on nothing that is trained.
A fine-tuning that does not lower the held-out error is undone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import nn

from vqdm.diffusion.denoisers import block_of, compute_dtype
from vqdm.diffusion.trajectories import Trajectories
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.data import Point, Points, split_held_out
from vqdm.finetuning.evaluation import Errors, evaluate
from vqdm.finetuning.loop import is_better
from vqdm.finetuning.trainer import (
    DistillationLoss,
    Diverged,
    TrainedParameters,
    Trainer,
    choose_learning_rate,
    rounded_to,
    stored_types,
    trainable,
    write_back,
)
from vqdm.layers.quantized import SHARED_CODEBOOKS
from vqdm.parallel import Ranks
from vqdm.storage.files import save_checked
from vqdm.storage.run_folder import read_shard
from vqdm.tracking import log_info, progress_bar


class IntermediateSettings(Protocol):
    """The settings that are used here, of the configuration of a quantization."""

    finetune_max_epochs: int
    finetune_batch_size: int
    local_batch_size: int
    finetune_lr: float | str
    finetune_adam_beta1: float
    finetune_adam_beta2: float


FinetuneBlocks = Callable[[nn.Module, list[Trajectories], Sequence[str], Ranks, Path], None]


def block_finetuner(settings: IntermediateSettings, seed: int) -> FinetuneBlocks:
    """Return `finetune_blocks` with these settings, for `quantize`. Raises UserError on impossible settings."""
    names = ("finetune_lr", "finetune_adam_beta1", "finetune_adam_beta2")
    optimizer = OptimizerConfig(**{name: getattr(settings, name) for name in names})
    return partial(finetune_blocks, settings=settings, optimizer=optimizer, seed=seed)


def finetune_blocks(
    student: nn.Module,
    trajectories: list[Trajectories],
    blocks: Sequence[str],
    ranks: Ranks,
    file: Path,
    *,
    settings: IntermediateSettings,
    optimizer: OptimizerConfig,
    seed: int,
) -> None:
    """Train the quantized blocks of `student` towards recorded outputs; in place, in the types that parameters have.

    Args:
        student: denoiser with the first blocks quantized.
        trajectories: the full-precision model's, with outputs.
        blocks: names of the quantized blocks.
        ranks: every process must call it.
        file: where the trained parameters are saved; an existing one is loaded instead of training again.

    Raises:
        RunError: `file` is damaged, or a trained value exceeds the range of its type.
    """
    if ranks.broadcast(file.is_file()):
        held = dict(student.named_parameters())
        for name, value in read_shard(file).items():
            held[name].data.copy_(value)
        return
    types, dtype, points = stored_types(student), compute_dtype(student), Points(trajectories)
    trained = trainable(
        student, optimizer, lambda name: block_of(student, name) in blocks and not name.startswith(SHARED_CODEBOOKS)
    )
    loss_fn = DistillationLoss(student, None, dtype, settings.local_batch_size, ranks)
    training, held_out = split_held_out(points)
    steps = batches_of(training, settings, f"{seed}:{len(blocks)}")
    train(loss_fn, trained, optimizer, points, steps, held_out, types)
    write_back(student, types)
    if ranks.main:
        save_checked(trained.tensors, file)
    ranks.barrier()


def batches_of(training: list[Point], settings: IntermediateSettings, seed: str) -> list[list[Point]]:
    """Return the batch of each step: every point at most once per epoch, without an incomplete last batch."""
    size = min(settings.finetune_batch_size, len(training))
    epochs = range(settings.finetune_max_epochs)
    orders = [random.Random(f"{seed}:{epoch}").sample(training, len(training)) for epoch in epochs]
    return [order[k * size : (k + 1) * size] for order in orders for k in range(len(training) // size)]


def train(
    loss_fn: DistillationLoss,
    trained: TrainedParameters,
    optimizer: OptimizerConfig,
    points: Points,
    steps: list[list[Point]],
    held_out: list[Point],
    types: dict,
) -> None:
    """Take one step per batch of `steps`, log the held-out errors, and undo the training if they did not fall.

    Args:
        types: name → type in which a parameter is stored.
    """
    before = evaluate(loss_fn, points, held_out)
    start = {name: tensor.detach().clone() for name, tensor in trained.tensors.items()}
    trainer = Trainer(loss_fn, trained, optimizer, len(steps))
    trainer.learning_rate = choose_learning_rate(optimizer, before.median_db)
    try:
        for batch in progress_bar(steps, description="fine-tuning"):
            trainer.step(points, batch)
        with rounded_to(types, trained):
            after = evaluate(loss_fn, points, held_out)
        gained, result = is_better(after, before.figures, before.figures), f"{_figures(after)} after"
    except Diverged as error:
        gained, result = False, f"then {error}"
    if not gained:
        for name, tensor in trained.tensors.items():
            tensor.data.copy_(start[name])
    log_info(
        f"fine-tuned {len(steps)} steps at learning rate {trainer.learning_rate:g}: held-out error "
        f"{_figures(before)} before, {result}{'' if gained else '; undone: no gain'}"
    )


def _figures(errors: Errors) -> str:
    return f"{errors.db:.2f} dB (median {errors.median_db:.2f} dB)"
