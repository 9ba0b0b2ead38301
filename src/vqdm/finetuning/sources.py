"""Where points come from: trajectories of the teacher, of the student, or pictures with noise.

They are recorded in chunks of prompts; a chunk is the same whichever process records it.

Letters: N prompts, S steps, A guidance branches, B points in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from torch import nn

from vqdm.diffusion.pipelines import sample
from vqdm.diffusion.sampling import unet_dtype
from vqdm.diffusion.trajectories import Trajectories, TrajectoryRecorder, batches
from vqdm.errors import RunError
from vqdm.finetuning.real_images import Captioned, noised_pictures
from vqdm.finetuning.step import computing
from vqdm.layers.quantized import decoded_once


@dataclass(frozen=True)
class Chunk:
    """Items `first` to `first + count` of the endless row of prompts (or pictures), for one way of making points."""

    source: str
    first: int
    count: int


def divided(sources: Sequence[str], first: int, count: int) -> list[Chunk]:
    """`count` items from `first` on, the same number for every source as far as they divide, whatever a batch holds."""
    ends = [first + count * k // len(sources) for k in range(len(sources) + 1)]
    parts = zip(sources, ends, ends[1:], strict=False)
    return [Chunk(source, start, end - start) for source, start, end in parts if end > start]


@dataclass(frozen=True)
class Studio:
    """What recording needs.

    Attributes:
        pipeline: with the teacher as its UNet.
        student: the UNet in training.
        settings: keyword arguments of the pipeline call.
        seed: of item 0; every item of a row has its own.
        keep_outputs: whether what the teacher says is kept with the points.
        prompts, pictures: what items are there from a place on in the endless rows, given the first and the count.
    """

    pipeline: DiffusionPipeline
    student: nn.Module
    settings: dict
    seed: int
    keep_outputs: bool
    prompts: Callable[[int, int], list[str]]
    pictures: Callable[[int, int], list[Captioned]] | None = None

    def record(self, chunk: Chunk) -> Trajectories:
        """The points of a chunk.

        Raises:
            RunError: the samples hold NaN.
        """
        seed = self.seed + chunk.first
        if chunk.source == "real":
            pictures = self.pictures(chunk.first, chunk.count)
            part = noised_pictures(self.pipeline, pictures, seed, self.settings)
        else:
            unet = self.student if chunk.source == "student" else self.pipeline.unet
            outputs = self.keep_outputs and chunk.source == "teacher"
            part = sampled(self.pipeline, unet, self.prompts(chunk.first, chunk.count), seed, self.settings, outputs)
        if not part.latents.isfinite().all():
            raise RunError(f"points by {chunk.source} hold NaN or infinity; use another --dtype (float32 or bfloat16)")
        return part if part.outputs is not None or not self.keep_outputs else self._answered(part, chunk.count)

    def _answered(self, part: Trajectories, size: int) -> Trajectories:
        return replace(part, outputs=answers(self.pipeline.unet, part, size))


def sampled(
    pipeline: DiffusionPipeline, unet: nn.Module, prompts: list[str], seed: int, settings: dict, outputs: bool
) -> Trajectories:
    """UNet inputs, and outputs if wanted, of sampling with `unet` in the pipeline; the k-th prompt uses `seed + k`."""
    with using(pipeline, unet), TrajectoryRecorder(unet, len(prompts), outputs) as recorder:
        sample(pipeline, prompts, seed, 0, settings | {"output_type": "latent"})
    return recorder.trajectories()


@contextmanager
def using(pipeline: DiffusionPipeline, unet: nn.Module) -> Iterator[None]:
    """Inside, the pipeline samples with another UNet, its weights decoded once.

    It computes in the type of the UNet that it replaces, by autocast. Text encoders and VAE are not under autocast:
    VAEs that choose float32, because they overflow in 16 bit, would lose it.
    """
    own, forward = pipeline.unet, unet.forward
    device, dtype = pipeline.device, unet_dtype(own)

    def in_own_type(*args, **kwargs):
        with computing(device, dtype):
            return forward(*args, **kwargs)

    if unet is not own:
        unet.forward, pipeline.unet = in_own_type, unet
    try:
        with torch.no_grad(), decoded_once(unet):
            yield
    finally:
        if unet is not own:
            del unet.forward
            pipeline.unet = own


@torch.no_grad()
def answers(teacher: nn.Module, part: Trajectories, size: int) -> torch.Tensor:
    """What the teacher says at all points: [N, S, A, C, h, w], on the CPU, in the type of the latents."""
    said = []
    for points in batches(part.points(), size):
        output = teacher(**part.inputs(points, teacher.device, teacher.dtype)).sample  # [A·B, C, h, w]
        said.append(output.unflatten(0, (-1, len(points))).transpose(0, 1).to("cpu", part.latents.dtype))
    return torch.cat(said).unflatten(0, part.latents.shape[:2])  # [N·S, A, ...] → [N, S, A, ...]
