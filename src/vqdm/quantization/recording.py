"""What is recorded before layers are solved: the teacher's points and pictures, and Hessians.

Prompts are sampled in batches, each in a file (`storage.run_folder`); Hessians are exact sums (`diffusion.hessians`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import UnetCall, passes, record_hessians, shared_inputs
from vqdm.diffusion.sampling import (
    EVALUATION_SEED_OFFSET,
    pictures,
    record_evaluation,
    record_trajectories,
    unet_dtype,
)
from vqdm.diffusion.trajectories import Trajectories, batches, held_out, join, spread_points
from vqdm.images import BLACK, NAN, PROBLEM, REPLACED
from vqdm.layers.quantized import decoded_once
from vqdm.quantization.quantization_job import Job
from vqdm.storage.files import locked, pipeline_fingerprint, sweep
from vqdm.storage.hessian_store import HessianStore
from vqdm.storage.run_folder import Tensors, shards, span_name, spans
from vqdm.tracking import log_info, progress_bar

PROBLEMS = (None, BLACK, NAN, REPLACED)
FINETUNING_SEED_OFFSET = 4_000_000  # far from the seeds of other points

# ------------------------------------------------------------------------------------------- prompts


def in_batches(job: Job, name: str, prompts: list[str], work: Callable[[list[str], int], Tensors]) -> list[Tensors]:
    """`work` of `xtx_batch_size` prompts and the number of their first, for all of them; kept in the run's folder."""
    folder = job.folder.work / name
    found = spans(job.ranks, folder, 0, len(prompts), job.config.xtx_batch_size)
    by_name = {span_name(*span): span for span in found}

    def make(piece: str) -> Tensors:
        first, count = by_name[piece]
        return work(prompts[first : first + count], first)

    return shards(job.ranks, folder, list(by_name), make)


def teacher_evaluation(job: Job) -> tuple[Trajectories, list[Image.Image]]:
    """The full-precision model's points, outputs and pictures on the evaluation prompts; recorded once."""
    parts = in_batches(job, "evaluation", job.evaluation, partial(_teacher_batch, job))
    return join(list(map(Trajectories.of_tensors, parts))), _images(parts)


def _teacher_batch(job: Job, prompts: list[str], first: int) -> Tensors:
    config, seed = job.config, job.config.seed + EVALUATION_SEED_OFFSET + first
    recorded, drawn = record_evaluation(job.pipeline, prompts, seed, config.sampling.call(), config.xtx_batch_size)
    return recorded.to_tensors() | _pixels(drawn)


def student_pictures(job: Job) -> list[Image.Image]:
    """Pictures of the evaluation prompts by the pipeline as it is at the end."""
    return _images(in_batches(job, "student", job.evaluation, partial(_student_batch, job)))


def _student_batch(job: Job, prompts: list[str], first: int) -> Tensors:
    config, seed = job.config, job.config.seed + EVALUATION_SEED_OFFSET + first
    return _pixels(pictures(job.pipeline, prompts, seed, config.sampling.call(), config.xtx_batch_size))


def _pixels(images: list[Image.Image]) -> Tensors:
    """Images as tensors: `pictures` uint8 [B, H, W, 3], and `problems` [B], numbers of `PROBLEMS`."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return {"pictures": pixels, "problems": torch.tensor([PROBLEMS.index(one.info.get(PROBLEM)) for one in images])}


def _images(parts: list[Tensors]) -> list[Image.Image]:
    images = [Image.fromarray(image.numpy()) for part in parts for image in part["pictures"]]
    for image, number in zip(images, (number for part in parts for number in part["problems"].tolist()), strict=True):
        image.info |= {PROBLEM: PROBLEMS[number]} if number else {}
    return images


def teacher_trajectories(job: Job) -> Trajectories:
    """The full-precision model's points on the calibration prompts; recorded once."""
    return calibration_trajectories(job, "calibration")


def calibration_trajectories(job: Job, name: str) -> Trajectories:
    """Points of sampling the calibration prompts with the pipeline as it is now, kept in the folder's `name`."""
    parts = in_batches(job, name, job.calibration, partial(_calibration_batch, job))
    return join(list(map(Trajectories.of_tensors, parts)))


def _calibration_batch(job: Job, prompts: list[str], first: int) -> Tensors:
    config = job.config
    return record_trajectories(
        job.pipeline,
        prompts,
        config.seed + first,
        config.sampling.call(),
        config.xtx_batch_size,
        config.min_timestep,
        config.max_timestep,
    ).to_tensors()


def finetuning_trajectories(job: Job) -> list[Trajectories]:
    """Record the full-precision model's points and outputs, for fine-tuning between blocks; one part per batch."""
    prompts = job.calibration[: job.config.intermediate.finetune_nsamples]
    return list(map(Trajectories.of_tensors, in_batches(job, "finetune", prompts, partial(_finetuning_batch, job))))


def _finetuning_batch(job: Job, prompts: list[str], first: int) -> Tensors:
    config, seed = job.config, job.config.seed + FINETUNING_SEED_OFFSET + first
    settings, size, what = config.sampling.call(), config.xtx_batch_size, "fine-tuning trajectories"
    return record_trajectories(
        job.pipeline, prompts, seed, settings, size, -math.inf, math.inf, what, outputs=True
    ).to_tensors()


# ------------------------------------------------------------------------------------------- Hessians


def teacher_hessians(job: Job) -> HessianStore:
    """The full-precision model's Hessians of all layers; those that the cache lacks are recorded."""
    cache = job.config.hessian_cache
    folder = Path(cache) if cache else job.folder.work / "hessians"
    # Another run that shares the cache may be recording what this one needs.
    with locked(folder, "--hessian_cache", wait=True) if cache and job.ranks.main else nullcontext():
        if job.ranks.main:
            sweep(folder, below=False)
        store = HessianStore(folder, hessian_settings(job))
        store.leaders = job.ranks.broadcast(store.leaders)
        missing = [layer for layer in job.layers if layer not in store]
        log_info(f"Hessians in {folder}: {len(job.layers) - len(missing)} of {len(job.layers)} layers are there")
        if missing:
            recorder = Recorder(job, store, teacher_trajectories(job))
            for groups in passes(recorder.groups(missing), job.config.hessian_memory_gb):
                recorder.record(groups)
    return store


class Recorder:
    """Records Hessians of the UNet as it is now on given points, into a store."""

    def __init__(self, job: Job, store: HessianStore, trajectories: Trajectories):
        points = held_out(spread_points(trajectories, job.config.calibration_nsteps))
        self.job, self.store = job, store
        self.training, self.apart = (unet_calls(job, trajectories, part) for part in points)
        self.first = unet_calls(job, trajectories, points[0][:1])[0]()

    def groups(self, layers: list[Layer]) -> list[list[Layer]]:
        """`layers` by the input that they share."""
        return shared_inputs(self.job.unet, layers, self.first)

    def record(self, groups: list[list[Layer]]) -> None:
        """Add the Hessians of `groups`, all at once; each is written by one rank."""
        job, ranks = self.job, self.job.ranks
        total = sum(len(ranks.shard(calls)) for calls in (self.training, self.apart))
        with decoded_once(job.unet), progress_bar(total=total, description="Hessians") as ticks:
            found = record_hessians(
                job.unet,
                groups,
                self.first,
                self.training,
                self.apart,
                job.config.hessian_samples_per_input,
                ticks.update,
                ranks,
            )
        for group in ranks.shard(groups):
            self.store.write(group, *found.pop(group[0].name))
        ranks.barrier()
        self.store.enter(groups, on_disk=ranks.main)


def unet_calls(job: Job, trajectories: Trajectories, points: list) -> list[UnetCall]:
    """UNet calls, each on at most `xtx_batch_size` points."""
    steps, where = trajectories.latents.shape[1], (job.unet.device, unet_dtype(job.unet))
    return [
        UnetCall(partial(trajectories.inputs, batch, *where), [n * steps + s for n, s in batch])
        for batch in batches(points, job.config.xtx_batch_size)
    ]


def hessian_settings(job: Job) -> dict:
    """What the Hessians depend on."""
    config, folder = job.config, Path(job.config.model)
    return {
        "model": pipeline_fingerprint(folder) if folder.is_dir() else f"{config.model}@{config.revision}",
        "variant": config.variant,
        "dtype": str(unet_dtype(job.unet)),
        "unquantized_nbits": config.unquantized_nbits,
        "calibration_prompts_sha256": digest(job.calibration),
        "seed": config.seed,
        "sampling": config.to_dict()["sampling"],
        "calibration_nsteps": config.calibration_nsteps,
        "min_timestep": config.min_timestep,
        "max_timestep": config.max_timestep,
        "hessian_samples_per_input": config.hessian_samples_per_input,
    }


def digest(prompts: list[str]) -> str:
    """SHA-256 of prompts in their order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
