"""Memory, disk and time of a fine-tuning, phase by phase, from shapes alone; and the settings that fit what is free.

Letters: A guidance branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

from vqdm.devices import MatmulRates, Need
from vqdm.diffusion.denoisers import block_names
from vqdm.diffusion.shapes import Shapes, forward_cost, meta_denoiser, training_bytes, under_autocast
from vqdm.documents import parse_json
from vqdm.finetuning.config import FinetuneConfig
from vqdm.finetuning.trainer import TrainedParameters
from vqdm.layers.quantized import quantized_layers

SINGLE = 4  # bytes of a value in float32
ADAM = 2 * SINGLE
CODES = 8  # bytes per weight of a layer's codes while their gradients are computed
RECOMPUTING, DECODING, DECODING_ONCE = 1 / 3, 0.5, 0.05  # of a point's time, or per call; decoding is an estimate
FASTEST = 8  # points per call; more are hardly faster


class Student(NamedTuple):
    """What the plan needs of a student.

    Attributes:
        stored: bytes of all tensors, floating-point ones in float32.
        weights: number of quantized weights; `widest`: of the layer with the most.
        trained: number of values that are trained.
        step: bytes of activations of a call without gradients on one point, all of its branches.
        activations: the same of a call and its backward pass, without (False) and with (True) checkpointing.
        outside, block: bytes outside of the blocks, and of the largest block, as of `stored`.
        block_weights, block_trained: the most quantized weights, and trained values, of a block.
    """

    stored: int
    weights: int
    widest: int
    trained: int
    step: int
    activations: Callable[[bool], int]
    outside: int = 0
    block: int = 0
    block_weights: int = 0
    block_trained: int = 0

    @classmethod
    def of(cls, model: nn.Module, trained: TrainedParameters, dtype: torch.dtype, call: tuple[int, ...]) -> Student:
        """Return the sizes of a student.

        Args:
            dtype: type that it computes in.
            call: as `meta_call` takes it.
        """
        kind, config = type(model), model.to_json_string()
        weights = [layer._rows * layer._columns for layer in quantized_layers(model).values()]
        parts = [model.get_submodule(name) for name in block_names(model)]
        stored = [sum(tensor.nbytes for tensor in part.parameters()) for part in parts]
        inside = [sum(one._rows * one._columns for one in quantized_layers(part).values()) for part in parts]
        learning = [sum(one.numel() for one in part.parameters() if one.requires_grad) for part in parts]
        return cls(
            sum(tensor.nbytes for tensor in model.parameters()),
            sum(weights),
            max(weights, default=0),
            sum(tensor.numel() for tensor in trained),
            forward_cost(under_autocast(meta_denoiser(kind, parse_json(config), dtype)), *call).bytes,
            lambda checkpointing: _activations(kind, config, dtype, call, checkpointing),
            sum(tensor.nbytes for tensor in model.parameters()) - sum(stored),
            max(stored, default=0),
            max(inside, default=0),
            max(learning, default=0),
        )


@lru_cache(maxsize=8)
def _activations(kind: type, config: str, dtype: torch.dtype, call: tuple[int, ...], checkpointing: bool) -> int:
    return training_bytes(under_autocast(meta_denoiser(kind, parse_json(config), dtype)), call, checkpointing)


def plan(config: FinetuneConfig, shapes: Shapes, student: Student, steps: int, rates: MatmulRates) -> list[Need]:
    """Return what every phase needs.

    Args:
        steps: of a trajectory.
    """
    if config.finetune_scope == "blocks":
        return plan_blocks(config, shapes, student, steps, rates)
    teacher, rest, c = shapes.denoiser, shapes.others_in_ram, shapes.itemsize
    texts = shapes.encoded(config.xtx_batch_size)
    sampling = max(texts, shapes.vae + config.xtx_batch_size * shapes.step, shapes.decode)
    student_sampling = max(texts, shapes.vae + config.xtx_batch_size * student.step, shapes.decode)
    decoded = student.stored + c * student.weights
    outputs = shapes.outputs * steps * config.finetune_nsamples  # of an epoch
    stays = outputs > 1e9 * config.target_cache_gb  # the teacher, if its outputs are not kept
    prompts = config.evaluation_nsamples + config.held_out_nsamples
    known = prompts * (steps * (shapes.latents + shapes.outputs) + shapes.conditioning)
    epoch = config.finetune_nsamples * (steps * shapes.latents + shapes.conditioning) + (0 if stays else outputs)
    states = SINGLE * (3 + (config.optimizer.ema_decay > 0)) * student.trained + student.stored
    saved = (config.checkpoints_total_limit + 2) * states if config.checkpointing_steps else 2 * states
    result = shapes.pipeline - teacher + student.stored
    evaluating = max(config.local_batch_size * student.step, student_sampling)
    sampled_by_student = decoded if "student" in config.finetune_method else student.stored
    needs = [
        Need("teacher", teacher + student.stored + sampling, rest + known, known),
        Need("evaluation", decoded + evaluating, rest + teacher + known, known),
        Need("points", teacher + sampled_by_student + sampling, rest + known + epoch, known + 2 * epoch),
        Need(
            "training",
            training(config, shapes, student) + (teacher if stays else 0),
            rest + (0 if stays else teacher) + known + epoch,
            known + 2 * epoch + saved,
        ),
        Need("saving", student.stored, rest + teacher + known + epoch, known + 2 * epoch + saved + result),
    ]
    times = seconds(config, shapes, steps, rates)
    return [replace(need, seconds=times.get(need.phase, 0.0)) for need in needs]


def plan_blocks(config: FinetuneConfig, shapes: Shapes, student: Student, steps: int, rates: MatmulRates) -> list[Need]:
    """Return the same, block by block: on the device are both models' ends and one block of each.

    In RAM is the student, and what of the other weights is not mapped from files.
    """
    c, size = shapes.itemsize, config.xtx_batch_size
    in_ram, ends = shapes.others_in_ram + shapes.denoisers_in_ram + student.stored, shapes.outside + student.outside
    texts = shapes.encoded(size)
    sampling = max(texts, shapes.vae + size * shapes.step, shapes.decode)
    student_sampling = max(texts, shapes.vae + max(size, config.local_batch_size) * student.step, shapes.decode)
    prompts = config.evaluation_nsamples + config.held_out_nsamples
    known = prompts * (steps * (shapes.latents + shapes.outputs) + shapes.conditioning)
    epoch = config.finetune_nsamples * (steps * shapes.latents + shapes.conditioning)
    waiting = 2 * (config.block_points + config.held_out_points) * shapes.waiting  # the next block's replace these
    in_files = waiting if config.block_cache == "disk" else 0
    W, each = student.block_weights, config.decode == "call"
    held = student.block + (ADAM + SINGLE * (config.optimizer.ema_decay > 0)) * student.block_trained
    held += SINGLE * W + student.block if config.code_updates else 0
    held += (
        (2 * c + CODES) * student.widest if each else (SINGLE + (c if c < SINGLE else 0)) * W + CODES * student.widest
    )
    gradients = SINGLE * (student.block_trained + (0 if each and not config.code_updates else W))
    train = held + gradients + config.local_batch_size * student.activations(True)
    train = max(train, shapes.block + shapes.step, student.block + c * W + student.step)
    states = student.block + SINGLE * (3 + (config.optimizer.ema_decay > 0)) * student.block_trained
    checkpoints = (config.checkpoints_total_limit + 2) * states
    files = known + epoch + student.stored  # what is trained of the blocks, and more
    saved = shapes.pipeline - shapes.denoiser + student.stored
    needs = [
        Need("teacher", ends + shapes.block + sampling, in_ram + known, known),
        Need("evaluation", ends + student.block + c * W + student_sampling, in_ram + known, known),
        Need("points", ends + shapes.block + sampling, in_ram + known + epoch, known + epoch),
        Need("training", ends + train, in_ram + known + epoch + waiting - in_files, files + in_files + checkpoints),
        Need("saving", ends, in_ram + known + epoch, files + saved),
    ]
    times, call = seconds(config, shapes, steps, rates), shapes.call_seconds(rates)
    evaluations = 1 + config.block_steps // (config.eval_step or config.block_steps)
    trained = config.block_steps * config.finetune_batch_size * 3 * slowness(config)
    passes = trained + evaluations * config.held_out_points + 2 * (config.block_points + config.held_out_points)
    times |= {"points": steps * config.finetune_nsamples * call, "training": passes * call}
    return [replace(need, seconds=times.get(need.phase, 0.0)) for need in needs]


def training(config: FinetuneConfig, shapes: Shapes, student: Student) -> int:
    """Return the bytes that steps and evaluations on held-out points take on the device, without the teacher."""
    c, W, in_each_call = shapes.itemsize, student.weights, config.decode == "call"
    held = student.stored + (ADAM + SINGLE * (config.optimizer.ema_decay > 0)) * student.trained
    held += SINGLE * W + student.stored if config.code_updates else 0  # drifts, and the codes of the start
    if in_each_call:
        held += (2 * c + CODES) * student.widest
    else:  # in float32; autocast keeps them in its type too, from the forward to the backward pass
        held += (SINGLE + (c if c < SINGLE else 0)) * W + CODES * student.widest
    gradients = SINGLE * (student.trained + (0 if in_each_call and not config.code_updates else W))
    activations = config.local_batch_size * student.activations(config.use_checkpointing)
    if config.finetune_batch_size > config.local_batch_size:
        steps = gradients + activations  # of the first calls, and of the next one
    else:
        steps = max(gradients, activations)  # these end as those begin
    return held + max(steps, c * W + config.local_batch_size * student.step)


def seconds(config: FinetuneConfig, shapes: Shapes, steps: int, rates: MatmulRates) -> dict[str, float]:
    """Estimate the seconds of each phase, at measured rates; reading and writing are left out."""
    call, image = shapes.call_seconds(rates), shapes.decode_seconds(rates)
    epochs = config.finetune_max_epochs
    per_epoch = steps * config.finetune_nsamples
    total = epochs * per_epoch // config.finetune_batch_size
    total = min(total, config.max_steps) if config.max_steps else total
    evaluations = epochs + (total // config.eval_step if config.eval_step else 0)
    known = steps * (config.evaluation_nsamples + config.held_out_nsamples)
    trained = total * config.finetune_batch_size * 3 * slowness(config)  # a backward pass is two calls
    shown = config.evaluation_nsamples * (steps * call + image)
    return {
        "teacher": known * call + config.evaluation_nsamples * image,
        "evaluation": 2 * steps * config.evaluation_nsamples * call + shown,
        "points": min(epochs, -(-total * config.finetune_batch_size // per_epoch)) * per_epoch * call,
        "training": (trained + evaluations * config.held_out_points) * call,
    }


def slowness(config: FinetuneConfig) -> float:
    """Return the time that a step takes, over that without decoding and checkpointing."""
    decoding = DECODING_ONCE if config.decode == "step" else DECODING
    return 1 + RECOMPUTING * config.use_checkpointing + decoding / config.local_batch_size


def choices(config: FinetuneConfig) -> list[FinetuneConfig]:
    """Return the settings with the flags of memory that are left open filled in, the fastest first.

    Block by block comes last.
    """
    if config.finetune_scope == "auto":
        return [one for scope in ("denoiser", "blocks") for one in choices(replace(config, finetune_scope=scope))]
    if config.finetune_scope == "blocks":
        return choices_of_blocks(config)
    found = [
        replace(config, local_batch_size=points, use_checkpointing=checkpointing, decode=decode)
        for points, checkpointing, decode in product(
            _halves(FASTEST) if config.local_batch_size is None else [config.local_batch_size],
            (False, True) if config.use_checkpointing is None else [config.use_checkpointing],
            ("step", "call") if config.decode == "auto" else [config.decode],
        )
    ]
    return sorted(found, key=slowness)


def choices_of_blocks(config: FinetuneConfig) -> list[FinetuneConfig]:
    """Return the same, block by block."""
    found = [
        replace(config, local_batch_size=points, use_checkpointing=False, decode=decode, block_cache=cache)
        for points, decode, cache in product(
            _halves(FASTEST) if config.local_batch_size is None else [config.local_batch_size],
            ("step", "call") if config.decode == "auto" else [config.decode],
            ("ram", "disk") if config.block_cache == "auto" else [config.block_cache],
        )
    ]
    return sorted(found, key=lambda one: (one.block_cache == "disk", slowness(one)))


def smaller(config: FinetuneConfig) -> Iterator[FinetuneConfig]:
    """Yield settings that need less memory than given ones, the fastest first; sampling batches are halved last."""
    for size in _halves(config.xtx_batch_size):
        open_flags = replace(config, local_batch_size=None, use_checkpointing=None, decode="auto", xtx_batch_size=size)
        yield from choices(replace(open_flags, block_cache="auto"))


def flags(config: FinetuneConfig | None) -> str:
    """Return the flags of memory as a command line has them."""
    if config is None:
        return "--local_batch_size or --xtx_batch_size"
    if config.finetune_scope == "blocks":
        return (
            f"--finetune_scope blocks --block_cache {config.block_cache} --local_batch_size {config.local_batch_size} "
            f"--decode {config.decode} --xtx_batch_size {config.xtx_batch_size}"
        )
    checkpointing = "" if config.use_checkpointing else "no-"
    return (
        f"--local_batch_size {config.local_batch_size} --{checkpointing}use_checkpointing --decode {config.decode} "
        f"--xtx_batch_size {config.xtx_batch_size}"
    )


def _halves(size: int) -> list[int]:
    """Return a size and its halves down to 1."""
    return [size // 2**k for k in range(size.bit_length())]
