"""Layers to solve: the synthetic problem, and a pipeline's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vqdm.config import SamplingConfig
from vqdm.diffusion.blocks import matrix_of, select_layers
from vqdm.diffusion.denoisers import denoiser_name, denoiser_of
from vqdm.diffusion.pipelines import load_pipeline
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.job import Job, choose_prompts, read_prompts
from vqdm.quantization.plan import Int8Totals
from vqdm.quantization.recording import teacher_hessians
from vqdm.storage.run_folder import RunFolder
from vqdm.tracking import Stopwatch, Tracker

SAMPLES = 8192
CALIBRATION_PROMPTS, EVALUATION_PROMPTS = "prompts/shapes_calibration.csv", "prompts/shapes_evaluation.csv"


def synthetic_layer(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """W [O, I], H [I, I] and the held-out H [I, I] of `bench_solver.py`, float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator) * 0.02
    W *= 0.5 + torch.rand(1, columns, generator=generator)
    A = torch.randn(columns, columns, generator=generator) / columns**0.5
    X = _inputs(A, generator)
    loud = torch.randperm(columns, generator=generator)[: max(1, columns // 100)]
    other = _inputs(A, generator)
    for inputs in (X, other):
        inputs[:, loud] *= 10
    return W, X.T @ X / SAMPLES, other.T @ other / SAMPLES


def _inputs(A: Tensor, generator: torch.Generator) -> Tensor:
    spread = torch.randn(SAMPLES, len(A), generator=generator) * torch.logspace(0, -2, len(A))
    return spread @ A.T * 8 + 0.1 * torch.randn(SAMPLES, len(A), generator=generator)


def model_layers(
    model: str, cache: str, device: str, **settings
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """(name, W [O, I], H [I, I], held-out H) of the layers that are quantized by default, by the shapes' prompts.

    `settings`: other fields of the configuration; runs of one `output_dir` share the prompts' trajectories.
    """
    usual = dict(
        calibration_prompts=CALIBRATION_PROMPTS,
        evaluation_prompts=EVALUATION_PROMPTS,
        output_dir=f"{cache}/work",
        sampling=SamplingConfig(num_inference_steps=20, guidance_scale=3.0),
        calibration_nsamples=192,
        calibration_nsteps=5,
    )
    config = QuantizeConfig(model=model, hessian_cache=cache, **usual | settings)
    pipeline = load_pipeline(model, torch.device(device), torch.float32)
    layers = select_layers(denoiser_of(pipeline), "default", 0, config.spec, {})
    folder, tracker = RunFolder(config.output_dir), Tracker("none", "", None, {})
    calibration, _ = choose_prompts(config, *read_prompts(config))
    component = denoiser_name(pipeline)
    job = Job(config, pipeline, layers, calibration, [], folder, tracker, Stopwatch(), 0, Int8Totals(), component)
    store = teacher_hessians(job)
    for layer in layers:
        W = matrix_of(denoiser_of(pipeline).get_submodule(layer.name), layer.spec.group_channels).float()
        yield layer.name, W, *store.load(layer)
