"""Sampling whole prompt lists, and what a student's UNet says on a teacher's recorded points."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from vqdm.config import SamplingConfig
from vqdm.diffusion.pipelines import picture_size, sample
from vqdm.diffusion.trajectories import Recorder, Trajectories, batches, join
from vqdm.errors import RunError, UserError
from vqdm.fidelity import PAIR_SCORES, decibels, pair_scores, to_tensor
from vqdm.images import comparable, problems_of, warn_of_problems
from vqdm.parallel import Ranks
from vqdm.tracking import progress_bar

# Pictures for evaluation use seeds far from those of calibration.
EVALUATION_SEED_OFFSET = 1_000_000
LARGEST_REPLAY_ERROR = 1e-2  # of the output's energy; rounding in 16 bit is far below


def sampled(pipeline, prompts: list[str], seed: int, settings: dict, size: int, what: str) -> Iterator[tuple]:
    """Yield (prompts of a batch, function that samples it), `size` prompts a batch, under a progress bar."""
    with progress_bar(total=len(prompts), description=what) as progress:
        for indices in batches(list(range(len(prompts))), size):
            chunk = [prompts[i] for i in indices]
            yield chunk, lambda chunk=chunk, first=indices[0]: sample(pipeline, chunk, seed, first, settings)
            progress.update(len(chunk))


def record_trajectories(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seed: int,
    settings: dict,
    size: int,
    low: float,
    high: float,
    what: str = "calibration trajectories",
    outputs: bool = False,
) -> Trajectories:
    """UNet inputs, and `outputs` on request, of sampling every prompt, restricted to timesteps in [low, high].

    Raises:
        RunError: the samples hold NaN.
    """
    parts = []
    for chunk, draw in sampled(pipeline, prompts, seed, settings | {"output_type": "latent"}, size, what):
        with Recorder(pipeline.unet, len(chunk), outputs) as recorder:
            draw()
        parts.append(recorder.trajectories().between(low, high))
        if not parts[-1].latents.isfinite().all():
            raise RunError("the UNet gave NaN or infinity while sampling; use another --dtype (float32 or bfloat16)")
    return join(parts)


def check_timestep_range(scheduler, steps: int | None, low: float, high: float) -> None:
    """Raise UserError unless some of the scheduler's timesteps (50 where `steps` is None) lie in [low, high]."""
    scheduler.set_timesteps(steps or 50)
    if not ((scheduler.timesteps >= low) & (scheduler.timesteps <= high)).any():
        raise UserError(f"no step of the scheduler lies between --min_timestep {low} and --max_timestep {high}")


def record_evaluation(
    pipeline: DiffusionPipeline, prompts: list[str], seed: int, settings: dict, size: int
) -> tuple[Trajectories, list[Image.Image]]:
    """The teacher's UNet inputs and outputs, and its pictures.

    Raises:
        RunError: the UNet gives NaN or infinity, so that nothing can be measured against it.
    """
    parts, pictures = [], []
    for chunk, draw in sampled(pipeline, prompts, seed, settings, size, "teacher pictures"):
        with Recorder(pipeline.unet, len(chunk), outputs=True) as recorder:
            pictures += draw()
        parts.append(recorder.trajectories())
        if not (parts[-1].latents.isfinite().all() and parts[-1].outputs.isfinite().all()):
            raise RunError("the UNet gave NaN or infinity while sampling; use another --dtype (float32 or bfloat16)")
        if len(parts) == 1:
            check_replay(pipeline.unet, parts[0])
    return join(parts), pictures


def check_replay(unet: torch.nn.Module, recorded: Trajectories) -> None:
    """Call the UNet again on the last step of a recorded batch.

    Raises UserError where its output is not the recorded one: something else changed it, such as other attention while
    the pipeline samples.
    """
    last = [(n, len(recorded.timesteps) - 1) for n in range(len(recorded.latents))]
    pairs = _errors_and_energies(unet, recorded, last)
    error, energy = (sum(values) for values in zip(*pairs, strict=True))
    if error > LARGEST_REPLAY_ERROR * energy:
        raise UserError(
            f"MODEL's UNet gives another output ({decibels(error, energy):.1f} dB) when called again as recorded: "
            "the pipeline changes it while it samples, which is unsupported"
        )


def pictures(
    pipeline: DiffusionPipeline, prompts: list[str], seed: int, settings: dict, size: int
) -> list[Image.Image]:
    """Pictures of every prompt."""
    return [one for _, draw in sampled(pipeline, prompts, seed, settings, size, "student pictures") for one in draw()]


def compared_pictures(
    teacher: list[Image.Image], student: list[Image.Image], prompts: list[str], name: str
) -> dict[str, float | dict | None]:
    """`pair_scores` of the pairs that can be compared, None without any; `count` of them, and problems of all.

    Warns of images that went wrong, of the full-precision model and of the `name`d one.
    """
    problems = {}
    for whose, images in (("full-precision", teacher), (name, student)):
        warn_of_problems(images, prompts, f"the {whose} model")
        problems[whose.replace("-", "_")] = problems_of(images)
    pairs = [pair for pair in zip(teacher, student, strict=True) if comparable(*pair)]
    scores = pair_scores(*map(to_tensor, zip(*pairs, strict=True))) if pairs else dict.fromkeys(PAIR_SCORES)
    return scores | {"count": len(pairs), "problems": problems}


def output_error(unet: torch.nn.Module, trajectories: Trajectories, size: int, ranks: Ranks | None = None) -> float:
    """Squared error of the UNet's outputs on recorded points over the recorded outputs' energy, in dB."""
    errors, energies = point_errors(unet, trajectories, size, ranks)
    return decibels(sum(errors), sum(energies))


def point_errors(
    unet: torch.nn.Module, trajectories: Trajectories, size: int, ranks: Ranks | None = None
) -> tuple[list[float], list[float]]:
    """Squared error, and energy of what was recorded, of every output at every point.

    Batches are spread over the ranks; the order is that of the points for any number of them.
    """
    every, ranks = list(batches(trajectories.points(), size)), ranks or Ranks()
    with progress_bar(total=len(ranks.shard(every)), description="UNet-output error") as progress:

        def sums(batch: list[tuple[int, int]]) -> list[tuple[float, float]]:
            progress.update()
            return _errors_and_energies(unet, trajectories, batch)

        return tuple(map(list, zip(*(pair for part in ranks.map(every, sums) for pair in part), strict=True)))


@torch.no_grad()
def _errors_and_energies(unet: torch.nn.Module, trajectories: Trajectories, batch: list) -> list[tuple[float, float]]:
    expected = trajectories.expected(batch, unet.device).double()
    guess = unet(**trajectories.inputs(batch, unet.device, unet_dtype(unet))).sample.double()
    sums = ((guess - expected).square().flatten(1).sum(1), expected.square().flatten(1).sum(1))
    return list(zip(*(one.tolist() for one in sums), strict=True))


def error_spread(errors: list[float], energies: list[float]) -> dict[str, float]:
    """How the error, in dB, is spread over single outputs: a few points where the teacher itself is touchy may rule.

    Of `point_errors`: the median, what 95 % are below, and the worst.
    """
    each = torch.tensor([decibels(*pair) for pair in zip(errors, energies, strict=True)], dtype=torch.float64)
    return {"median": each.median().item(), "95%": each.quantile(0.95).item(), "worst": each.max().item()}


def unet_dtype(unet: torch.nn.Module) -> torch.dtype:
    """The type a UNet computes in: that of a bias, which stays as it is also where `conv_in` itself is quantized."""
    return unet.conv_in.bias.dtype


def predicted_bytes(pipeline: DiffusionPipeline, sampling: SamplingConfig, calibration: int, evaluation: int) -> int:
    """Predict the disk space in bytes that a run on so many prompts needs: recorded points, and the pipeline twice.

    Raises:
        UserError: neither settings nor model give the image size.
    """
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    pipeline_bytes = sum(tensor.element_size() * tensor.numel() for part in parts for tensor in part.parameters())
    height, width = picture_size(pipeline, sampling.height, sampling.width)
    latents = pipeline.unet.config.in_channels * (height * width // pipeline.vae_scale_factor**2) * 4
    return 2 * pipeline_bytes + latents * (sampling.num_inference_steps or 50) * (calibration + 3 * evaluation)
