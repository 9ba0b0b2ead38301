"""Recorded points: how they are made and stored, and in which order training uses them.

A point is one step of one sampling trajectory, with all its guidance branches. Trajectories are sampled with the
teacher or the student, or made from real images by adding noise. They are recorded in chunks of prompts, one file per
chunk; the content of a chunk does not depend on the process that records it.

Letters: N prompts, S steps of a trajectory, A guidance branches, B points in a batch.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from vqdm.devices import BatchSize
from vqdm.diffusion.pipelines import sample
from vqdm.diffusion.sampling import EVALUATION_SEED_OFFSET, record_evaluation, unet_dtype
from vqdm.diffusion.trajectories import CallRecorder, Trajectories, batches, join, spread_points, unet_call
from vqdm.errors import RunError
from vqdm.finetuning.config import FinetuneConfig, sources
from vqdm.finetuning.data import Datasets, noised_images
from vqdm.images import save_png
from vqdm.layers.quantized import decoded_once
from vqdm.parallel import Ranks
from vqdm.storage.run_folder import span_name, spans, wait_for_file
from vqdm.tracking import log_info, progress_bar

HELD_OUT_SEED_OFFSET, TRAINING_SEED_OFFSET = 2_000_000, 3_000_000  # far from those of calibration and evaluation


class Point(NamedTuple):
    """A step of one of the trajectories of a part."""

    part: int
    prompt: int
    step: int


class Batch(NamedTuple):
    """B points: keyword arguments of a UNet call, and the teacher's output [A·B, C, h, w], None if not recorded."""

    count: int
    call: dict
    teacher_output: Tensor | None


@dataclass(frozen=True)
class Points:
    """Points of several parts; the parts may come from other models or images, but their tensors have equal shapes."""

    parts: list[Trajectories]

    def all(self) -> list[Point]:
        """Return all points, part by part, prompt by prompt."""
        return [Point(k, n, s) for k, part in enumerate(self.parts) for n, s in part.points()]

    def timestep(self, point: Point) -> float:
        """Return a point's timestep, from 0 (no noise) to 1000."""
        return self.parts[point.part].timesteps[point.step].item()

    def batch(self, points: Sequence[Point], device: torch.device, dtype: torch.dtype) -> Batch:
        """Collate B points on `device`; floating-point inputs are in `dtype`."""
        picked = [(self.parts[k], n, s) for k, n, s in points]
        names = self.parts[0].conditioning
        call = unet_call(
            torch.stack([part.latents[n, s] for part, n, s in picked]),
            torch.stack([part.timesteps[s] for part, _, s in picked]),
            {name: torch.stack([part.conditioning[name][n] for part, n, _ in picked]) for name in names},
            device,
            dtype,
        )
        if any(part.outputs is None for part, *_ in picked):
            return Batch(len(points), call, None)
        outputs = torch.stack([part.outputs[n, s] for part, n, s in picked])  # [B, A, C, h, w]
        return Batch(len(points), call, outputs.transpose(0, 1).flatten(0, 1).to(device))


# ------------------------------------------------------------------------------------------- selection and order


def spread(points: Points, count: int) -> list[Point]:
    """Return about `count` points: equally many per prompt (at least one), at timesteps that shift between prompts."""
    sizes = [len(part.latents) for part in points.parts]
    each, firsts = max(1, count // sum(sizes)), accumulate(sizes, initial=0)
    parts = enumerate(zip(points.parts, firsts, strict=False))
    return [Point(k, n, s) for k, (part, first) in parts for n, s in spread_points(part, each, first)]


def split_held_out(points: Points) -> tuple[list[Point], list[Point]]:
    """Split into training and held-out points: every tenth prompt is held out, or the last if there are fewer than ten.

    Of a single prompt every tenth point is held out, or the last; a single point is in both lists.
    """
    every = points.all()
    keys = [point[:2] for point in every]
    if len(set(keys)) == 1:
        keys = every
    held_out = set(list(dict.fromkeys(keys))[9::10] or keys[-1:])
    training = [point for point, key in zip(every, keys, strict=True) if key not in held_out]
    return training or every, [point for point, key in zip(every, keys, strict=True) if key in held_out]


def shuffled(points: Points, weights: Sequence[float] | None, seed: str) -> list[Point]:
    """Return all points in random order; with `weights`, one per point, as many sampled with replacement."""
    every, generator = points.all(), random.Random(seed)
    if weights is None:
        return generator.sample(every, len(every))
    return generator.choices(every, weights, k=len(every))


def timestep_weights(points: Points, sampling: str, loss_by_timestep: Sequence[float] = ()) -> list[float] | None:
    """Return a sampling weight per point, None for uniform sampling.

    beta: t / 1000 as Beta(3, 1), with density 3·(t/1000)² (BitsFusion, arXiv 2406.04333).
    error: the student's mean squared error in t's bin of `loss_by_timestep`, bins of equal width.
    """
    if sampling == "uniform":
        return None
    timesteps = [points.timestep(point) for point in points.all()]
    if sampling == "beta":
        return [3 * (t / 1000) ** 2 for t in timesteps]
    return [loss_by_timestep[bin_of(t, len(loss_by_timestep))] for t in timesteps]


def bin_of(timestep: float, bins: int) -> int:
    """Return the bin of equal width that a timestep in [0, 1000] falls into."""
    return min(int(timestep * bins / 1000), bins - 1)


# ------------------------------------------------------------------------------------------- recording


@dataclass(frozen=True)
class Chunk:
    """Items `first` to `first + count` of the endless sequence of prompts or images, for one source of trajectories."""

    source: str
    first: int
    count: int

    @property
    def items(self) -> range:
        return range(self.first, self.first + self.count)


def divided(names: Sequence[str], first: int, count: int) -> list[Chunk]:
    """Divide `count` items from `first` on evenly among the sources; the batch size has no influence."""
    ends = [first + count * k // len(names) for k in range(len(names) + 1)]
    parts = zip(names, ends, ends[1:], strict=False)
    return [Chunk(source, start, end - start) for source, start, end in parts if end > start]


def record_points(
    folder: Path, parts: Sequence[Chunk], size: BatchSize, record: Callable[[Chunk], Trajectories], ranks: Ranks
) -> Points:
    """Load the points of all parts, in chunks of at most `size`; each chunk not in `folder` is recorded by one rank.

    A chunk that is out of memory is recorded in halves.

    Raises:
        RunError: recorded latents hold NaN, or a file of another process does not appear or is damaged.
    """
    places = [(part.source, spans(ranks, folder, part.first, part.count, size.value)) for part in parts]
    chunks = [Chunk(source, *span) for source, found in places for span in found]
    files = [folder / f"{span_name(chunk.first, chunk.count)}.safetensors" for chunk in chunks]
    missing = ranks.broadcast([k for k, file in enumerate(files) if not file.is_file()])

    def record_some(source: str, items: range) -> Trajectories:
        return record(Chunk(source, items.start, len(items)))

    for k in progress_bar(ranks.shard(missing), description=f"recording points: {folder.name}"):
        found = join([part for _, part in size.batches(partial(record_some, chunks[k].source), chunks[k].items)])
        if not found.latents.isfinite().all():
            source = chunks[k].source
            raise RunError(f"{source} trajectories hold NaN or infinity; use another --dtype (float32 or bfloat16)")
        found.save(files[k])
    ranks.barrier()
    for file in files:
        wait_for_file(file)
    return Points([Trajectories.load(file) for file in files])


@dataclass(frozen=True)
class TrajectoryRecorder:
    """Records the points of a fine-tuning into the run's working folder, and loads those that are there.

    Attributes:
        pipeline: with the teacher as its UNet.
        student: the UNet in training.
        folder: has a folder for the held-out points, one for the evaluation points, and one per epoch.
    """

    config: FinetuneConfig
    datasets: Datasets
    pipeline: DiffusionPipeline
    student: nn.Module
    folder: Path
    ranks: Ranks
    size: BatchSize

    def held_out(self) -> Points:
        """Return the teacher's trajectories and outputs on the held-out prompts."""
        prompts, seed = self.datasets.held_out, self.config.seed + HELD_OUT_SEED_OFFSET

        def record(chunk: Chunk) -> Trajectories:
            some = prompts[chunk.first : chunk.first + chunk.count]
            return sample_points(self.pipeline, self.pipeline.unet, some, seed + chunk.first, self._settings, True)

        return self._recorded("held_out", divided(["teacher"], 0, len(prompts)), record)

    def evaluation(self) -> Points:
        """Return the teacher's trajectories and outputs on the evaluation prompts; saves its images beside them.

        Raises:
            RunError: as `record_evaluation`.
        """
        prompts, seed = self.datasets.evaluation, self.config.seed + EVALUATION_SEED_OFFSET

        def record(chunk: Chunk) -> Trajectories:
            some = prompts[chunk.first : chunk.first + chunk.count]
            found, images = record_evaluation(self.pipeline, some, seed + chunk.first, self._settings, self.size)
            for k, image in enumerate(images):
                save_png(image, self.folder / "evaluation" / f"{chunk.first + k:06d}.png")
            return found

        return self._recorded("evaluation", divided(["teacher"], 0, len(prompts)), record)

    def teacher_images(self) -> list[Image.Image]:
        """Load the teacher's images of the evaluation prompts, in their order."""
        return [Image.open(file).convert("RGB") for file in sorted((self.folder / "evaluation").glob("*.png"))]

    def epoch(self, epoch: int, keep_outputs: bool) -> Points:
        """Return an epoch's training points; student trajectories are sampled with the student in its present state.

        The teacher leaves the device if all its outputs are recorded with the points.
        """
        first, count = epoch * self.config.finetune_nsamples, self.config.finetune_nsamples
        parts = divided(sources(self.config.finetune_method), first, count)
        teacher = self.pipeline.unet.to(self.ranks.device)
        points = self._recorded(f"epoch-{epoch:04d}", parts, lambda chunk: self._training_chunk(chunk, keep_outputs))
        if all(part.outputs is not None for part in points.parts):  # an interrupted run may have recorded none
            teacher.to("cpu")
        return points

    def _training_chunk(self, chunk: Chunk, keep_outputs: bool) -> Trajectories:
        seed, teacher = self.config.seed + TRAINING_SEED_OFFSET + chunk.first, self.pipeline.unet
        if chunk.source == "real":
            images = self.datasets.training_images(chunk.first, chunk.count)
            part = noised_images(self.pipeline, images, seed, self._settings)
        else:
            unet = self.student if chunk.source == "student" else teacher
            prompts = self.datasets.training_prompts(chunk.first, chunk.count)
            outputs = keep_outputs and unet is teacher
            part = sample_points(self.pipeline, unet, prompts, seed, self._settings, outputs)
        if keep_outputs and part.outputs is None:
            part.outputs = teacher_outputs(teacher, part, chunk.count)
        return part

    def delete_epochs(self, before: int) -> None:
        """Delete the points of all epochs before number `before`."""
        for folder in self.folder.glob("epoch-*") if self.ranks.main else ():
            if int(folder.name.removeprefix("epoch-")) < before:
                shutil.rmtree(folder)

    def keeps_outputs(self, points: Points) -> bool:
        """Return whether the teacher outputs of an epoch of points like these fit --target_cache_gb and the disk."""
        outputs = points.parts[0].outputs  # [N, S, A, C, h, w]
        need = outputs[0].nbytes * self.config.finetune_nsamples
        free = shutil.disk_usage(self.folder).free
        fits = self.ranks.broadcast(need <= 1e9 * self.config.target_cache_gb and 2 * need < free)
        where = "kept on disk" if fits else "computed at every step"
        log_info(f"teacher outputs: {need / 1e9:.2f} GB per epoch, {where}")
        return fits

    @property
    def _settings(self) -> dict:
        return self.config.sampling.call()

    def _recorded(self, name: str, parts: list[Chunk], record: Callable[[Chunk], Trajectories]) -> Points:
        return record_points(self.folder / name, parts, self.size, record, self.ranks)


def sample_points(
    pipeline: DiffusionPipeline, unet: nn.Module, prompts: list[str], seed: int, settings: dict, outputs: bool
) -> Trajectories:
    """Sample with `unet` in the pipeline, and record its inputs and, on request, outputs; prompt k has `seed + k`."""
    with with_unet(pipeline, unet), CallRecorder(unet, len(prompts), outputs) as recorder:
        sample(pipeline, prompts, seed, 0, settings | {"output_type": "latent"})
    return recorder.trajectories()


@contextmanager
def with_unet(pipeline: DiffusionPipeline, unet: nn.Module) -> Iterator[None]:
    """Inside, the pipeline samples with another UNet, with its weights decoded once.

    The UNet computes in the type of the one it replaces, under autocast. Text encoders and VAE are not under autocast,
    because VAEs that choose float32 (they overflow in 16 bit) would lose it.
    """
    own, forward = pipeline.unet, unet.forward
    device, dtype = unet.device, unet_dtype(own)

    def autocast_forward(*args, **kwargs):
        with autocast(device, dtype):
            return forward(*args, **kwargs)

    if unet is not own:
        unet.forward, pipeline.unet = autocast_forward, unet
    try:
        with torch.no_grad(), decoded_once(unet):
            yield
    finally:
        if unet is not own:
            del unet.forward
            pipeline.unet = own


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return torch's autocast to `dtype`; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@torch.no_grad()
def teacher_outputs(teacher: nn.Module, part: Trajectories, size: int) -> Tensor:
    """Return the teacher's outputs at all points, `size` per batch: [N, S, A, C, h, w] on the CPU, typed as latents."""
    found = []
    for points in batches(part.points(), size):
        output = teacher(**part.inputs(points, teacher.device, teacher.dtype)).sample  # [A·B, C, h, w]
        found.append(output.unflatten(0, (-1, len(points))).transpose(0, 1).to("cpu", part.latents.dtype))
    return torch.cat(found).unflatten(0, part.latents.shape[:2])  # [N·S, A, ...] → [N, S, A, ...]
