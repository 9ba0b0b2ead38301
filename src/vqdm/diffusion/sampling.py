"""Sample whole lists of prompts, and compare a student's denoiser and images with its teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from vqdm.config import SamplingConfig
from vqdm.devices import BatchSize, as_batch_size
from vqdm.diffusion.denoisers import compute_dtype, denoiser_name, noise_range, output_of
from vqdm.diffusion.pipelines import image_size, latent_values, networks, sample, sampling_device
from vqdm.diffusion.trajectories import CallRecorder, Trajectories, join
from vqdm.errors import RunError, UserError
from vqdm.fidelity import PAIR_SCORES, decibels, pair_scores, to_tensor
from vqdm.images import comparable, problems_of, warn_of_problems
from vqdm.parallel import Ranks
from vqdm.tracking import progress_bar

Result = TypeVar("Result")

# Images for evaluation use seeds far from those of calibration.
EVALUATION_SEED_OFFSET = 1_000_000
NOT_FINITE = "the denoiser gave NaN or infinity while sampling; use another --dtype (float32 or bfloat16)"
LARGEST_REPLAY_ERROR = 1e-2  # of the output's energy; rounding in 16 bit is far below


def sampled(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seed: int,
    settings: dict,
    size: int | BatchSize,
    what: str,
    work: Callable[[list[str], Callable[[], list[Image.Image]]], Result],
) -> list[Result]:
    """Return `work(prompts, function that samples them)` of every batch; several under a progress bar."""
    size = as_batch_size(size)
    several = len(prompts) > size.value

    def sample_batch(indices: range) -> Result:
        chunk = [prompts[i] for i in indices]
        return work(chunk, lambda: sample(pipeline, chunk, seed, indices[0], settings))

    found = []
    with progress_bar(total=len(prompts), description=what) if several else nullcontext() as progress:
        for indices, part in size.batches(sample_batch, range(len(prompts))):
            found.append(part)
            if several:
                progress.update(len(indices))
    return found


def recorded_calls(
    pipeline: DiffusionPipeline, names: Sequence[str], prompts: int, outputs: bool, generate: Callable[[], Result]
) -> tuple[dict[str, Trajectories], Result]:
    """Sample a batch of prompts by `generate`; return each named denoiser's own calls by name, and what it returns."""
    with ExitStack() as hooks:
        recorders = [CallRecorder(getattr(pipeline, name), prompts, outputs) for name in names]
        for recorder in recorders:
            hooks.enter_context(recorder)
        made = generate()
    return {name: recorder.trajectories() for name, recorder in zip(names, recorders, strict=True)}, made


def joined(parts: Sequence[dict[str, Trajectories]]) -> dict[str, Trajectories]:
    """Concatenate the trajectories of each denoiser over prompts, as `trajectories.join`."""
    return {name: join([part[name] for part in parts]) for name in parts[0]}


def record_trajectories(
    pipeline: DiffusionPipeline,
    names: Sequence[str],
    prompts: list[str],
    seed: int,
    settings: dict,
    size: int | BatchSize,
    low: float,
    high: float,
    what: str = "calibration trajectories",
    outputs: bool = False,
) -> dict[str, Trajectories]:
    """Record the named denoisers' inputs, and `outputs` on request, of sampling every prompt, by name.

    Only calls at timesteps in [low, high] are kept.

    Raises:
        RunError: the samples hold NaN.
    """

    def record(chunk: list[str], generate: Callable) -> dict[str, Trajectories]:
        found, _ = recorded_calls(pipeline, names, len(chunk), outputs, generate)
        found = {name: part.between(low, high) for name, part in found.items()}
        if not all(part.is_finite() for part in found.values()):
            raise RunError(NOT_FINITE)
        return found

    return joined(sampled(pipeline, prompts, seed, settings | {"output_type": "latent"}, size, what, record))


def set_timesteps(scheduler, steps: int) -> None:
    """Give a scheduler its timesteps; one that shifts them by the size of the image, those of a middling size."""
    dynamic = scheduler.config.get("use_dynamic_shifting")
    limits = scheduler.config.get("base_shift", 0.5), scheduler.config.get("max_shift", 1.15)
    scheduler.set_timesteps(steps, **({"mu": sum(limits) / 2} if dynamic else {}))


def check_timestep_range(scheduler, steps: int | None, low: float, high: float) -> None:
    """Raise UserError unless some of the scheduler's timesteps (50 where `steps` is None) lie in [low, high]."""
    set_timesteps(scheduler, steps or 50)
    if not ((scheduler.timesteps >= low) & (scheduler.timesteps <= high)).any():
        raise UserError(f"no step of the scheduler lies between --min_timestep {low} and --max_timestep {high}")


def called_steps(
    pipeline: DiffusionPipeline, name: str, steps: int | None, low: float = 0.0, high: float = math.inf
) -> int:
    """Return at how many of its steps (50 where `steps` is None) in [low, high] a pipeline calls a denoiser."""
    set_timesteps(pipeline.scheduler, steps or 50)
    (first, before), times = noise_range(pipeline, name), pipeline.scheduler.timesteps
    return int(((times >= max(first, low)) & (times <= high) & (times < before)).sum())


def check_steps(pipeline: DiffusionPipeline, names: Sequence[str], steps: int | None, low: float, high: float) -> None:
    """Raise UserError where one of the named experts is called at no step in [low, high]."""
    for name in names:
        if not called_steps(pipeline, name, steps, low, high):
            first, before = noise_range(pipeline, name)
            limits = f"from {first:g} on" if math.isinf(before) else f"below {before:g}"
            raise UserError(
                f"{name} is called at timesteps {limits}, and none of {steps or 50} steps to calibrate on is there; "
                "give more --num_inference_steps, other --min_timestep or --max_timestep, or --components without it"
            )


def record_evaluations(
    pipeline: DiffusionPipeline,
    names: Sequence[str],
    prompts: list[str],
    seed: int,
    settings: dict,
    size: int | BatchSize,
) -> tuple[dict[str, Trajectories], list[Image.Image]]:
    """Record the named teachers' inputs and outputs, by name, and their images.

    Raises:
        RunError: a denoiser gives NaN or infinity: nothing can be compared with it.
    """
    size = as_batch_size(size)

    def record(chunk: list[str], generate: Callable) -> tuple[dict[str, Trajectories], list[Image.Image]]:
        found, images = recorded_calls(pipeline, names, len(chunk), True, generate)
        if not all(part.is_finite() for part in found.values()):
            raise RunError(NOT_FINITE)
        return found, images

    found = sampled(pipeline, prompts, seed, settings, size, "teacher images", record)
    parts, images = zip(*found, strict=True)
    for name, denoiser in ((name, getattr(pipeline, name)) for name in names):
        if denoiser.device == sampling_device(pipeline):  # the other expert waits on the CPU
            check_replay(denoiser, parts[0][name], size)
    return joined(parts), [image for some in images for image in some]


def record_evaluation(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seed: int,
    settings: dict,
    size: int | BatchSize,
    name: str | None = None,
) -> tuple[Trajectories, list[Image.Image]]:
    """Record one denoiser's inputs and outputs as `record_evaluations`: that which is named, or the first."""
    name = name or denoiser_name(pipeline)
    found, images = record_evaluations(pipeline, [name], prompts, seed, settings, size)
    return found[name], images


def check_replay(denoiser: torch.nn.Module, recorded: Trajectories, size: BatchSize) -> None:
    """Call the denoiser again as it was last called on a recorded batch.

    Raises UserError where its output is not the recorded one: something else changed it, such as other attention while
    the pipeline samples.
    """
    prompts, calls = recorded.shape
    work = partial(_errors_and_energies, denoiser, recorded)
    alike = recorded.batches([(n, calls - 1) for n in range(prompts)], prompts)
    pairs = [pair for points in alike for _, some in size.batches(work, points) for pair in some]
    error, energy = (sum(values) for values in zip(*pairs, strict=True))
    if error > LARGEST_REPLAY_ERROR * energy:
        raise UserError(
            f"MODEL's denoiser gives another output ({decibels(error, energy):.1f} dB) when called again as recorded: "
            "the pipeline changes it while it samples, which is unsupported"
        )


def generate_images(
    pipeline: DiffusionPipeline, prompts: list[str], seed: int, settings: dict, size: int | BatchSize
) -> list[Image.Image]:
    """Generate an image for every prompt."""
    parts = sampled(pipeline, prompts, seed, settings, size, "student images", lambda _, generate: generate())
    return [image for part in parts for image in part]


def compare_images(
    teacher: list[Image.Image], student: list[Image.Image], prompts: list[str], name: str
) -> dict[str, float | dict | None]:
    """Return the `pair_scores` of the pairs that can be compared, None without any; their `count`; problems of all.

    Warns of images with problems, of the full-precision model and of the `name`d one.
    """
    problems = {}
    for source, images in (("full-precision", teacher), (name, student)):
        warn_of_problems(images, prompts, f"the {source} model")
        problems[source.replace("-", "_")] = problems_of(images)
    pairs = [pair for pair in zip(teacher, student, strict=True) if comparable(*pair)]
    scores = pair_scores(*map(to_tensor, zip(*pairs, strict=True))) if pairs else dict.fromkeys(PAIR_SCORES)
    return scores | {"count": len(pairs), "problems": problems}


def output_error(
    denoiser: torch.nn.Module, trajectories: Trajectories, size: int | BatchSize, ranks: Ranks | None = None
) -> float:
    """Return the squared error of a denoiser's outputs on recorded points over the recorded energy, in dB."""
    errors, energies = point_errors(denoiser, trajectories, size, ranks)
    return decibels(sum(errors), sum(energies))


def point_errors(
    denoiser: torch.nn.Module, trajectories: Trajectories, size: int | BatchSize, ranks: Ranks | None = None
) -> tuple[list[float], list[float]]:
    """Return the squared error of every output at every point, and the energy of the recorded output.

    Batches are spread over the ranks; the order is that of the points, of one kind after another, for any number of
    them.
    """
    size, ranks = as_batch_size(size), ranks or Ranks()
    # All ranks divide the points in the same way, also where one has halved its batches.
    every = list(trajectories.batches(trajectories.points(), ranks.broadcast(size.value)))
    with progress_bar(total=len(ranks.shard(every)), description="output errors") as progress:

        def sums(batch: list[tuple[int, int]]) -> list[tuple[float, float]]:
            progress.update()
            found = size.batches(partial(_errors_and_energies, denoiser, trajectories), batch)
            return [pair for _, some in found for pair in some]

        return tuple(map(list, zip(*(pair for part in ranks.map(every, sums) for pair in part), strict=True)))


@torch.no_grad()
def _errors_and_energies(
    denoiser: torch.nn.Module, trajectories: Trajectories, batch: list
) -> list[tuple[float, float]]:
    expected = trajectories.expected(batch, denoiser.device).double()
    call = trajectories.inputs(batch, denoiser.device, compute_dtype(denoiser))
    student = output_of(denoiser(**call)).double()
    sums = ((student - expected).square().flatten(1).sum(1), expected.square().flatten(1).sum(1))
    return list(zip(*(one.tolist() for one in sums), strict=True))


def error_spread(errors: list[float], energies: list[float]) -> dict[str, float]:
    """Return how the error, in dB, is spread over single outputs: few ill-conditioned points may dominate the sum.

    The median of `point_errors`, the 95th percentile, and the worst.
    """
    each = torch.tensor([decibels(*pair) for pair in zip(errors, energies, strict=True)], dtype=torch.float64)
    return {"median": each.median().item(), "95%": each.quantile(0.95).item(), "worst": each.max().item()}


def predicted_bytes(pipeline: DiffusionPipeline, sampling: SamplingConfig, calibration: int, evaluation: int) -> int:
    """Predict the disk space in bytes that a run on so many prompts needs: recorded points, and the pipeline twice.

    Raises:
        UserError: neither settings nor model give the image size.
    """
    parts = networks(pipeline).values()
    pipeline_bytes = sum(tensor.element_size() * tensor.numel() for part in parts for tensor in part.parameters())
    return 2 * pipeline_bytes + point_bytes(pipeline, sampling, calibration, evaluation)


def point_bytes(pipeline: DiffusionPipeline, sampling: SamplingConfig, calibration: int, evaluation: int) -> int:
    """Predict the bytes of recorded points. Raises UserError as `predicted_bytes`."""
    latents = 4 * latent_values(pipeline, *image_size(pipeline, sampling.height, sampling.width))
    return latents * (sampling.num_inference_steps or 50) * (calibration + 3 * evaluation)
