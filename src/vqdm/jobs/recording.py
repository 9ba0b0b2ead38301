"""What is recorded once, before layers are solved: the teacher's points, pictures and Hessians."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from PIL import Image

from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import passes, record_hessians, shared_inputs
from vqdm.diffusion.sampling import EVALUATION_SEED_OFFSET, record_evaluation, record_trajectories, unet_dtype
from vqdm.diffusion.trajectories import Trajectories, batches, held_out, spread_points
from vqdm.images import save_png
from vqdm.jobs.job import Job
from vqdm.storage.fingerprint import pipeline_fingerprint
from vqdm.storage.hessians import HessianStore
from vqdm.tracking import bar, say


def teacher_evaluation(job: Job) -> tuple[Trajectories, list[Image.Image]]:
    """The full-precision model's points, outputs and pictures on the evaluation prompts; recorded once."""
    path, pictures_folder = job.folder.work / "evaluation.safetensors", job.folder.work / "teacher"
    if not path.is_file():
        config = job.config
        trajectories, drawn = record_evaluation(
            job.pipeline,
            job.evaluation,
            config.seed + EVALUATION_SEED_OFFSET,
            config.sampling.call(),
            config.xtx_batch_size,
        )
        pictures_folder.mkdir(exist_ok=True)
        for index, picture in enumerate(drawn):
            save_png(picture, pictures_folder / f"{index:06d}.png")
        trajectories.save(path)
    files = sorted(pictures_folder.glob("[0-9]*.png"))
    return Trajectories.load(path), [Image.open(file).convert("RGB") for file in files]


def teacher_trajectories(job: Job) -> Trajectories:
    """The full-precision model's points on the calibration prompts; recorded once."""
    path = job.folder.work / "calibration.safetensors"
    if not path.is_file():
        calibration_trajectories(job).save(path)
    return Trajectories.load(path)


def calibration_trajectories(job: Job) -> Trajectories:
    """Points of sampling the calibration prompts with the pipeline as it is now."""
    config = job.config
    return record_trajectories(
        job.pipeline,
        job.calibration,
        config.seed,
        config.sampling.call(),
        config.xtx_batch_size,
        config.min_timestep,
        config.max_timestep,
    )


def teacher_hessians(job: Job) -> HessianStore:
    """The full-precision model's Hessians of all layers; those that the cache lacks are recorded."""
    folder = Path(job.config.hessian_cache) if job.config.hessian_cache else job.folder.work / "hessians"
    store = HessianStore(folder, hessian_settings(job))
    missing = [layer for layer in job.layers if layer not in store]
    say(f"Hessians in {folder}: {len(job.layers) - len(missing)} of {len(job.layers)} layers are there")
    if missing:
        record_missing(job, store, missing, teacher_trajectories(job))
    return store


def record_missing(job: Job, store: HessianStore, layers: list[Layer], trajectories: Trajectories) -> None:
    """Add the Hessians of `layers` to the store, as many at a time as memory allows."""
    points = held_out(spread_points(trajectories, job.config.calibration_nsteps))
    training, apart = (unet_calls(job, trajectories, part) for part in points)
    groups = shared_inputs(job.unet, layers, unet_calls(job, trajectories, points[0][:1])[0]())
    for some in passes(groups, job.config.hessian_memory_gb):
        with bar(total=len(training) + len(apart), what="Hessians") as ticks:
            found = record_hessians(job.unet, some, training, apart, job.config.hessian_samples_per_input, ticks.update)
        for group in some:
            store.save(group, *found.pop(group[0].name))


def unet_calls(job: Job, trajectories: Trajectories, points: list) -> list[partial]:
    """Functions that make the keyword arguments of a UNet call each, on at most `xtx_batch_size` points."""
    return [
        partial(trajectories.inputs, batch, job.unet.device, unet_dtype(job.unet))
        for batch in batches(points, job.config.xtx_batch_size)
    ]


def hessian_settings(job: Job) -> dict:
    """What the Hessians depend on."""
    config, folder = job.config, Path(job.config.model)
    return {
        "model": pipeline_fingerprint(folder) if folder.is_dir() else f"{config.model}@{config.revision}",
        "variant": config.variant,
        "dtype": str(job.unet.dtype),
        "rest_nbits": config.rest_nbits,
        "calibration_prompts_sha256": digest(job.calibration),
        "seed": config.seed,
        "sampling": config.to_dict()["sampling"],
        "calibration_nsteps": config.calibration_nsteps,
        "min_timestep": config.min_timestep,
        "max_timestep": config.max_timestep,
        "hessian_samples_per_input": config.hessian_samples_per_input,
        "xtx_batch_size": config.xtx_batch_size,
    }


def digest(prompts: list[str]) -> str:
    """SHA-256 of prompts in their order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
