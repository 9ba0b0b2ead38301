"""Record what layers are quantized with: the teacher's points and images, and Hessians.

Prompts are sampled in batches, each in a file (`storage.run_folder`); Hessians are exact sums (`diffusion.hessians`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vqdm.config import SECOND_EXPERT
from vqdm.devices import BatchSize
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.denoisers import compute_dtype, largest_timestep
from vqdm.diffusion.hessians import DenoiserCall, HessianStore, passes, record_hessians, shared_inputs
from vqdm.diffusion.pipelines import local_fingerprint
from vqdm.diffusion.sampling import (
    EVALUATION_SEED_OFFSET,
    generate_images,
    record_evaluations,
    record_trajectories,
)
from vqdm.diffusion.streams import FIRST, BlockWalk
from vqdm.diffusion.trajectories import Trajectories, batches, by_kind, held_out, join, spread_points
from vqdm.images import BLACK, NAN, PROBLEM, REPLACED
from vqdm.layers.quantized import decoded_once
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.plan import keeps_hessians
from vqdm.storage.files import locked, sweep
from vqdm.storage.run_folder import RunFolder, Tensors, shards, span_name, spans
from vqdm.tracking import log_info, progress_bar

if TYPE_CHECKING:
    from vqdm.quantization.job import Job

PROBLEMS = (None, BLACK, NAN, REPLACED)
OTHER_TIMESTEPS = 256  # for layers that see one vector per sample
FINETUNING_SEED_OFFSET = 4_000_000  # far from the seeds of other points

# ------------------------------------------------------------------------------------------- prompts


def in_batches(job: Job, folder: Path, prompts: list[str], work: Callable[[list[str], int], Tensors]) -> list[Tensors]:
    """Call `work` on batches of prompts and the number of the first; results are files in the run's `folder`."""
    found = spans(job.ranks, folder, 0, len(prompts), job.size.value)
    by_name = {span_name(*span): span for span in found}

    missing = [span for name, span in by_name.items() if not (folder / f"{name}.safetensors").is_file()]

    def make(piece: str) -> Tensors:
        first, count = by_name[piece]
        made = work(prompts[first : first + count], first)
        progress.update(count)
        return made

    own = sum(count for _, count in job.ranks.shard(missing))
    with progress_bar(total=own, description=f"prompts ({folder.name.replace('_', ' ')})") as progress:
        return shards(job.ranks, folder, list(by_name), make)


def packed(found: dict[str, Trajectories]) -> Tensors:
    """Return the tensors of trajectories by component; of two, under the component's name."""
    if len(found) == 1:
        return next(iter(found.values())).to_tensors()
    return {f"{name}/{key}": one for name, part in found.items() for key, one in part.to_tensors().items()}


def unpacked(tensors: Tensors, component: str) -> Trajectories:
    """Return the trajectories of a component out of what `packed` made."""
    start = f"{component}/"
    own = {key.removeprefix(start): one for key, one in tensors.items() if key.startswith(start)}
    return Trajectories.of_tensors(own or tensors)


def teacher_evaluation(job: Job) -> tuple[dict[str, Trajectories], list[Image.Image]]:
    """The full-precision denoisers' points and outputs by component, and images, on the evaluation prompts.

    They are recorded once.
    """
    parts = in_batches(job, job.folder.recorded / "evaluation", job.evaluation, partial(_teacher_batch, job))
    return {name: join([unpacked(part, name) for part in parts]) for name in job.denoisers}, _images(parts)


def _teacher_batch(job: Job, prompts: list[str], first: int) -> Tensors:
    config, seed = job.config, job.config.seed + EVALUATION_SEED_OFFSET + first
    settings = config.sampling.call()
    recorded, images = record_evaluations(job.pipeline, job.denoisers, prompts, seed, settings, job.size)
    return packed(recorded) | _pixels(images)


def student_images(job: Job) -> list[Image.Image]:
    """Generate images of the evaluation prompts with the quantized pipeline."""
    return _images(in_batches(job, job.folder.recorded / "student", job.evaluation, partial(_student_batch, job)))


def _student_batch(job: Job, prompts: list[str], first: int) -> Tensors:
    config, seed = job.config, job.config.seed + EVALUATION_SEED_OFFSET + first
    return _pixels(generate_images(job.pipeline, prompts, seed, config.sampling.call(), job.size))


def _pixels(images: list[Image.Image]) -> Tensors:
    """Return images as tensors: `images` uint8 [B, H, W, 3], and `problems` [B], numbers of `PROBLEMS`."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return {"images": pixels, "problems": torch.tensor([PROBLEMS.index(one.info.get(PROBLEM)) for one in images])}


def _images(parts: list[Tensors]) -> list[Image.Image]:
    images = [Image.fromarray(image.numpy()) for part in parts for image in part["images"]]
    for image, number in zip(images, (number for part in parts for number in part["problems"].tolist()), strict=True):
        image.info |= {PROBLEM: PROBLEMS[number]} if number else {}
    return images


def teacher_trajectories(job: Job) -> Trajectories:
    """Return the full-precision denoiser's points on the calibration prompts; those of all denoisers are recorded once.

    That is before the first of them is quantized.
    """
    return calibration_trajectories(job, job.folder.recorded / "calibration", job.denoisers)


def student_trajectories(job: Job, block: str) -> Trajectories:
    """Sample the calibration prompts with the pipeline in its present state, before a block is quantized."""
    return calibration_trajectories(job, job.folder.work / f"calibration_{block}", (job.component,))


def calibration_trajectories(job: Job, folder: Path, names: tuple[str, ...]) -> Trajectories:
    parts = in_batches(job, folder, job.calibration, partial(_calibration_batch, job, names))
    return join([unpacked(part, job.component) for part in parts])


def _calibration_batch(job: Job, names: tuple[str, ...], prompts: list[str], first: int) -> Tensors:
    config = job.config
    found = record_trajectories(
        job.pipeline,
        names,
        prompts,
        config.seed + first,
        config.sampling.call(),
        job.size,
        config.min_timestep,
        config.max_timestep,
    )
    return packed(found)


def finetuning_trajectories(job: Job) -> list[Trajectories]:
    """Record the full-precision denoiser's points and outputs, for fine-tuning between blocks; one part per batch.

    Those of all denoisers are recorded once.
    """
    prompts, folder = job.calibration[: job.config.intermediate.finetune_nsamples], job.folder.recorded / "finetune"
    parts = in_batches(job, folder, prompts, partial(_finetuning_batch, job))
    return [unpacked(part, job.component) for part in parts]


def _finetuning_batch(job: Job, prompts: list[str], first: int) -> Tensors:
    config, seed = job.config, job.config.seed + FINETUNING_SEED_OFFSET + first
    settings, size, what = config.sampling.call(), job.size, "fine-tuning trajectories"
    return packed(
        record_trajectories(
            job.pipeline, job.denoisers, prompts, seed, settings, size, -math.inf, math.inf, what, outputs=True
        )
    )


# ------------------------------------------------------------------------------------------- Hessians


def teacher_hessians(job: Job) -> HessianStore:
    """Return the full-precision model's Hessians of all layers; those that the cache lacks are recorded."""
    cache, folder = job.config.hessian_cache, hessian_folder(job.config, job.folder, job.component)
    # Another run that shares the cache may be recording what this one needs.
    with locked(folder, "--hessian_cache", wait=True) if cache and job.ranks.main else nullcontext():
        if job.ranks.main:
            sweep(folder, below=False)
        store = HessianStore(folder, hessian_settings(job))
        store.leaders = job.ranks.broadcast(store.leaders)
        missing = [layer for layer in job.layers if layer not in store]
        log_info(f"Hessians in {folder}: {len(job.layers) - len(missing)} of {len(job.layers)} layers are recorded")
        if missing:
            recorder = job.recorder(store)
            for groups, last in recording_passes(job, recorder.groups(missing)):
                recorder.record(groups, last)
            drop_walk(job)
    return store


def hessian_folder(config: QuantizeConfig, folder: RunFolder, component: str) -> Path:
    """Return the folder of a component's full-precision Hessians: in `hessian_cache`, or of a run's part `folder`."""
    if not config.hessian_cache:
        return folder.work / "hessians"
    return Path(config.hessian_cache, *([component] if component == SECOND_EXPERT else ()))


def recording_passes(job: Job, groups: list[list[Layer]]) -> Iterator[tuple[list[list[Layer]], bool]]:
    """Yield the groups of layers that are recorded at once, and whether no others of their block follow.

    Where the denoiser is not on the device whole, each pass is of one block.
    """
    by_block = [list(some) for _, some in groupby(groups, key=lambda group: group[0].block)]
    for some in by_block if job.swapper else [groups]:
        parts = passes(some, job.config.hessian_memory_gb)
        yield from ((part, part is parts[-1]) for part in parts)


class HessianRecorder:
    """Record Hessians of the denoiser in its present state on given points, into a store."""

    def __init__(self, job: Job, store: HessianStore, trajectories: Trajectories):
        points = held_out(spread_points(trajectories, job.config.calibration_nsteps))
        self.job, self.store = job, store
        self.training, self.held_out = (denoiser_calls(job, trajectories, part) for part in points)
        if job.swapper and keeps_hessians(job.config, job.layers):
            self.held_out = []  # of all layers, they would take as much of the disk as the others
        first = denoiser_calls(job, trajectories, points[0][:1])[0]
        self.walk, self.first = walk_of(job, first, self.training, self.held_out), first()
        # A UNet's embeddings of the timestep are not in its default layers, and results of before stay what they were.
        unet = job.component == "unet"
        self.other_timesteps = [] if unet else calls_at_other_timesteps(job, trajectories, points[0])

    def groups(self, layers: list[Layer]) -> list[list[Layer]]:
        """Return `layers` by the input that they share."""
        one_block = len({layer.block for layer in layers}) == 1
        return shared_inputs(self.job.denoiser, layers, self.first, self.walk if one_block else None)

    def record(self, groups: list[list[Layer]], last: bool = False) -> None:
        """Record the Hessians of `groups`, all at once; each is written by one rank.

        `last`: the block of the groups is done, and will not change before the next is recorded.
        """
        job, ranks = self.job, self.job.ranks
        if self.walk:
            self.walk.keep = last
        total = sum(len(ranks.shard(calls)) for calls in (self.training, self.held_out))
        decoding = nullcontext() if job.swapper else decoded_once(job.denoiser)
        with decoding, progress_bar(total=total, description="Hessians") as ticks:
            found = record_hessians(
                job.denoiser,
                groups,
                self.first,
                self.training,
                self.held_out,
                job.config.hessian_samples_per_input,
                ticks.update,
                ranks,
                BatchSize(1, job.size.advice) if self.walk else job.size,
                self.other_timesteps,
                self.walk,
            )
        for group in ranks.shard(groups):
            self.store.write(group, *found.pop(group[0].name))
        ranks.barrier()
        self.store.enter(groups, on_disk=ranks.main)


def walk_of(
    job: Job, first: DenoiserCall, training: list[DenoiserCall], held_out: list[DenoiserCall]
) -> BlockWalk | None:
    """Return this rank's calls as they go from block to block; None where the denoiser is on the device whole.

    Those of the teacher's points go on where they are, while blocks are quantized.
    """
    if job.swapper is None:
        return None
    own = [*job.ranks.shard(training), *job.ranks.shard(held_out)]
    calls = {FIRST: first} | {call.points[0]: call for call in own}
    if job.walk is None or job.config.calibration_latents == "student":
        drop_walk(job)
        folder = job.folder.work / "block_outputs" / str(job.ranks.rank) if job.offload == "disk" else None
        job.walk = BlockWalk(job.swapper, calls, folder)
    job.walk.calls = calls
    return job.walk


def drop_walk(job: Job) -> None:
    """Drop what blocks returned, once no further block is recorded."""
    if job.walk:
        job.walk.restart()
        job.walk = None


def denoiser_calls(job: Job, trajectories: Trajectories, points: list) -> list[DenoiserCall]:
    """Return calls, each on at most `xtx_batch_size` points."""
    calls, device, dtype = trajectories.shape[1], job.denoiser.device, compute_dtype(job.denoiser)
    return [
        DenoiserCall(partial(trajectories.inputs, device=device, dtype=dtype), batch, [n * calls + j for n, j in batch])
        for batch in trajectories.batches(points, 1 if job.swapper else job.config.xtx_batch_size)
    ]


def calls_at_other_timesteps(job: Job, trajectories: Trajectories, points: list) -> list[DenoiserCall]:
    """Return calls on recorded points, in turn, at `OTHER_TIMESTEPS` timesteps spread evenly over all there are."""
    high, first = largest_timestep(job.denoiser, trajectories.largest), math.prod(trajectories.shape)
    size, calls = 1 if job.swapper else job.config.xtx_batch_size, trajectories.shape[1]
    numbers = [n * calls + j for n, j in points]
    device, dtype = job.denoiser.device, compute_dtype(job.denoiser)

    def make(numbers: list[int]) -> dict:
        timesteps = [high * (k + 0.5) / OTHER_TIMESTEPS for k in numbers]
        return trajectories.inputs([points[k % len(points)] for k in numbers], device, dtype, timesteps)

    kind = lambda k: trajectories.kind(points[k % len(points)])  # noqa: E731
    return [
        DenoiserCall(make, batch, [first + k for k in batch], [numbers[k % len(points)] for k in batch])
        for alike in by_kind(range(OTHER_TIMESTEPS), kind)
        for batch in batches(alike, size)
    ]


def hessian_settings(job: Job) -> dict:
    """Return the settings that Hessians depend on."""
    config = job.config
    return {
        "model": job.fingerprint or local_fingerprint(config) or f"{config.model}@{config.revision}",
        "variant": config.variant,
        "dtype": str(compute_dtype(job.denoiser)),
        "unquantized_nbits": config.unquantized_nbits,
        "calibration_prompts_sha256": digest(job.calibration),
        "seed": config.seed,
        "sampling": config.to_dict()["sampling"],
        "calibration_nsteps": config.calibration_nsteps,
        "min_timestep": config.min_timestep,
        "max_timestep": config.max_timestep,
        "hessian_samples_per_input": config.hessian_samples_per_input,
        # What the other expert is while trajectories are sampled.
        **({"denoisers": [*job.denoisers]} if config.unquantized_nbits == 8 and len(job.denoisers) > 1 else {}),
    }


def digest(prompts: list[str]) -> str:
    """Return the SHA-256 of prompts in their order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
