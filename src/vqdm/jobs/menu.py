"""What layers can become for a number of bits, and how their errors fall as bits rise.

All formats are of variable rate, with one codebook. That is better than several small ones whose entries are added up,
and the more columns share a code the better, as long as a code has bits for them: layers that need more bits have
smaller groups.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch

from vqdm.additive.shared import encode, sample_error
from vqdm.diffusion.blocks import Layer
from vqdm.jobs.banks import at_rate, choose_layers, draw_samples, train
from vqdm.jobs.job import Job
from vqdm.jobs.pieces import Tensors, pieces
from vqdm.storage.hessians import HessianStore

# Columns of a group → mean bits of a group that errors are measured at, and the step of those that are offered.
MEASURED = {4: (2, 5, 8, 11), 2: (5, 8, 11), 1: (5, 8, 11)}
STEPS = {4: 0.5, 2: 0.5, 1: 0.25}
LARGEST = 12  # bits of a code
USUAL = (4, 8)  # columns, and bits of a group: of the format that effects are measured in
LEAST = 1e-12  # of a relative error


def formats(layer: Layer, how: str) -> list[Layer]:
    """The layer in every format, groups of one size after another."""
    return [at(layer, g, bits, how) for g in MEASURED for bits in offered(g)]


def usual_format(layer: Layer, how: str) -> Layer:
    """The layer in the format that effects are measured in."""
    return at(layer, *USUAL, how)


def offered(g: int) -> list[float]:
    """Mean bits of a group of g columns, all between the least and the most that are measured."""
    least, most = min(MEASURED[g]), max(MEASURED[g])
    return [least + STEPS[g] * k for k in range(round((most - least) / STEPS[g]) + 1)]


def at(layer: Layer, g: int, bits: float, how: str) -> Layer:
    """The layer with groups of g columns that take so many bits in the mean."""
    spec = layer.spec.changed(
        num_codebooks=1, nbits_per_codebook=LARGEST, in_group_size=g, input_channel_scales=True, row_bits=0
    )
    return at_rate(replace(layer, spec=spec), bits, how)


def error_falls(job: Job, store: HessianStore, layers: list[Layer]) -> dict[str, list[float]]:
    """By layer name, the relative error in every format over that in the usual one. All layers share their banks.

    Trains the banks, each on one rank. Errors between two measured rates lie on the line between their logarithms.
    Layers that these are not measured on get the others' geometric mean.
    """
    how = job.config.share_codebooks
    sampled = choose_layers(layers, job.bank_memory_gb, job.config.seed)
    sizes = {at(layers[0], g, rates[0], how).spec.shared_codebooks: g for g, rates in MEASURED.items()}
    parts = pieces(
        job.ranks, job.folder.work / "falls", list(sizes), lambda name: measured_errors(job, store, layers, sizes[name])
    )
    logs = {g: part["errors"].clamp(min=LEAST).log().numpy() for g, part in zip(MEASURED, parts, strict=True)}
    usual = logs[USUAL[0]][MEASURED[USUAL[0]].index(USUAL[1])]  # [layers]
    lines = [[np.interp(offered(g), MEASURED[g], line) for line in logs[g].T] for g in MEASURED]
    falls = np.concatenate(lines, axis=1) - usual[:, None]  # [layers, formats]
    own = {layer.name: np.exp(fall).tolist() for layer, fall in zip(sampled, falls, strict=True)}
    return {layer.name: own.get(layer.name, np.exp(falls.mean(0)).tolist()) for layer in layers}


def measured_errors(job: Job, store: HessianStore, layers: list[Layer], g: int) -> Tensors:
    """Relative errors [rates, layers] of some rows of the layers that are drawn, by error feedback alone."""
    how, solver = job.config.share_codebooks, job.config.solver
    config = solver.with_spec(at(layers[0], g, MEASURED[g][0], how).spec)
    samples = cache(partial(draw_samples, job, store, layers, config))
    codebooks, by_name = train(job, config, samples), {layer.name: layer for layer in layers}

    def error(name: str, bits: float) -> float:
        spec = at(by_name[name], g, bits, how).spec
        return sample_error(samples()[name], encode(samples()[name], codebooks, solver.with_spec(spec)))

    errors = [[error(name, bits) for name in samples()] for bits in MEASURED[g]]
    return {"errors": torch.tensor(errors, dtype=torch.float64)}
