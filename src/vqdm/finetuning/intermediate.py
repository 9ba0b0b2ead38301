"""Fine-tuning between blocks: what is quantized so far is trained before the next block is calibrated.

Codebooks of the layers' own, scales, biases, norms and plain layers move in the blocks that are done. Codes stay, and
so do codebooks that layers share, because the codes of later blocks are searched for with them. Later blocks that are
calibrated on the student see the change; Hessians that were stored of the full-precision model still serve, as they
depend on nothing that is trained. A fine-tuning that raises the held-out error is undone.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from vqdm.diffusion.blocks import block_of
from vqdm.diffusion.sampling import unet_dtype
from vqdm.diffusion.trajectories import Trajectories
from vqdm.errors import UserError
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.distill_points import recorded
from vqdm.finetuning.evaluation import Errors, measure
from vqdm.finetuning.loop import is_better
from vqdm.finetuning.optimizer import learning_rate
from vqdm.finetuning.parameters import Trained, as_stored, stored_types, trainable, write_back
from vqdm.finetuning.points import Point, Points, split
from vqdm.finetuning.sources import Chunk, divided, sampled
from vqdm.finetuning.step import Lesson
from vqdm.finetuning.trainer import Diverged, Trainer
from vqdm.layers.shared_codebooks import SHARED_CODEBOOKS
from vqdm.quantization.config import IntermediateConfig, QuantizeConfig
from vqdm.quantization.quantization_job import Job
from vqdm.storage.files import save_checked
from vqdm.storage.run_folder import read_shard
from vqdm.tracking import log_info, progress_bar

SEED_OFFSET = 4_000_000  # far from the seeds of other points


def turns(count: int, blocks: int) -> list[int]:
    """After which blocks, counted from 1, `count` fine-tunings spread evenly take place; none after the last.

    Raises:
        UserError: there are not as many places between blocks.
    """
    if count >= max(1, blocks):
        raise UserError(
            f"--num_intermediate_finetunes is {count}; between {blocks} blocks allowed are 0 to {blocks - 1}"
        )
    return [round(k * blocks / (count + 1)) for k in range(1, count + 1)]


def check_between(config: QuantizeConfig, blocks: int) -> None:
    """Raise UserError, before anything slow starts, where fine-tuning between so many blocks cannot be done."""
    turns(config.intermediate.num_intermediate_finetunes, blocks)
    optimizer_config(config.intermediate)


def teacher_points(job: Job) -> Points:
    """Trajectories of calibration prompts with the outputs of the UNet as it is now; recorded once."""
    config, prompts = job.config, job.calibration[: job.config.intermediate.finetune_nsamples]

    def record(chunk: Chunk) -> Trajectories:
        some = prompts[chunk.first : chunk.first + chunk.count]
        seed = config.seed + SEED_OFFSET + chunk.first
        return sampled(job.pipeline, job.unet, some, seed, config.sampling.call(), True)

    parts = divided(["teacher"], 0, len(prompts))
    return recorded(job.folder.work / "finetune", parts, config.xtx_batch_size, record, job.ranks)


def finetune_between(job: Job, index: int, points: Points) -> None:
    """Train what the first `index` blocks hold, or take over what an interrupted run made of it."""
    path = job.folder.work / "finetuned" / f"after-{index:02d}.safetensors"
    types = stored_types(job.unet)
    if job.ranks.broadcast(path.is_file()):
        place(job.unet, read_shard(path))
        return
    done = {block for block, _ in job.blocks[:index]}
    dtype, config = unet_dtype(job.unet), optimizer_config(job.config.intermediate)
    trained = trainable(job.unet, config, lambda name: block_of(name) in done and not name.startswith(SHARED_CODEBOOKS))
    settings = job.config.intermediate
    lesson = Lesson(job.unet, None, dtype, settings.local_batch_size, job.ranks)
    with job.clock("fine-tuning"):
        learned, held_out = split(points)
        steps = steps_of(learned, settings, f"{job.config.seed}:{index}")
        train(lesson, trained, config, points, steps, held_out, types)
    write_back(job.unet, types)
    if job.ranks.main:
        save_checked(trained.tensors, path)
    job.ranks.barrier()


def train(
    lesson: Lesson,
    trained: Trained,
    config: OptimizerConfig,
    points: Points,
    steps: list[list[Point]],
    held_out: list[Point],
    types: dict[str, torch.dtype],
) -> None:
    """Take the steps, report what they gained on held-out points, and undo them where they gained nothing."""
    before = measure(lesson, points, held_out)
    start = {name: tensor.detach().clone() for name, tensor in trained.tensors.items()}
    trainer = Trainer(lesson, trained, config, len(steps))
    trainer.learning_rate = learning_rate(config, before)
    try:
        for chosen in progress_bar(steps, description="fine-tuning"):
            trainer.step(points, chosen)
        with as_stored(trained, types):
            after = measure(lesson, points, held_out)
        kept, found = is_better(after, before.figures, before.figures), f"{figures_of(after)} after"
    except Diverged as error:
        kept, found = False, f"then {error}"
    if not kept:
        for name, tensor in trained.tensors.items():
            tensor.data.copy_(start[name])
    log_info(
        f"fine-tuned in {len(steps)} steps at learning rate {trainer.learning_rate:g}: held-out error "
        f"{figures_of(before)} before, {found}{'' if kept else '; undone: nothing gained'}"
    )


def figures_of(errors: Errors) -> str:
    return f"{errors.db:.2f} dB (median {errors.median_db:.2f} dB)"


def steps_of(learned: list[Point], settings: IntermediateConfig, seed: str) -> list[list[Point]]:
    """The points of each step: every point at most once an epoch, what does not fill a batch left out."""
    size = min(settings.finetune_batch_size, len(learned))
    count = len(learned) // size
    orders = [
        random.Random(f"{seed}:{epoch}").sample(learned, len(learned)) for epoch in range(settings.finetune_max_epochs)
    ]
    return [order[k * size : (k + 1) * size] for order in orders for k in range(count)]


def optimizer_config(settings: IntermediateConfig) -> OptimizerConfig:
    names = ("finetune_lr", "finetune_adam_beta1", "finetune_adam_beta2")
    return OptimizerConfig(**{name: getattr(settings, name) for name in names})


def place(unet: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put trained values in the place of parameters, in their types."""
    held = dict(unet.named_parameters())
    for name, value in tensors.items():
        held[name].data.copy_(value)
