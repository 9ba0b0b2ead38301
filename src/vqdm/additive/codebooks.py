"""Codebooks that many layers share: one set, trained on rows of all of them.

Small layers pay more for codebooks of their own than for codes; a shared set costs next to nothing, so that its
codebooks can be larger (up to 16 bits an entry).

Letters: O rows, I columns; p, g = out and in group size; G = I/g column groups; d = p·g; M codebooks of K entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode
from vqdm.additive.config import SolverConfig
from vqdm.additive.encode import feedback_encode, feedback_factors
from vqdm.additive.kmeans import draw, residual_kmeans
from vqdm.additive.refit import Fit, refit_codebooks, refit_scales, weighted_error
from vqdm.additive.solve import Problem, scaled_groups, support_rms, zero_code

ROUNDS = 1  # of coding the sample and fitting the codebooks to it; a second gains 1 %
REFIT_ITERATIONS = 6
RIDGE = 1.0


@dataclass(frozen=True)
class Sample:
    """Some rows of a layer, ready to be coded.

    Attributes:
        W, H: [O, I] and [I, I], as in `solve.Problem`.
        factors, feedback: what error feedback needs of H, see `encode.feedback_factors`.
        share: the layer's number of weights over the energy tr(W H Wᵀ) of these rows, so that relative errors add up.
    """

    W: Tensor
    H: Tensor
    factors: Tensor
    feedback: Tensor
    share: float


def sample_layer(W: Tensor, H: Tensor, rows: int, config: SolverConfig, generator: torch.Generator) -> Sample:
    """At most `rows` row groups of a layer's W [O, I], drawn without replacement, with its whole H [I, I]."""
    p, g = config.spec.out_group_size, config.spec.in_group_size
    problem = Problem.of(W, H, config.spec)
    kept = draw(len(W) // p, rows, generator).sort().values  # [R']
    some = problem.W.view(-1, p, W.shape[1])[kept.to(W.device)].flatten(0, 1)  # [R, p, I] → [R'·p, I]
    energy = weighted_error(some, problem.H).item()
    share = W.numel() / energy if energy > 0 else 0.0
    return Sample(some, problem.H, *feedback_factors(problem.H, g, config.feedback_damping), share)


def train_shared_codebooks(samples: list[Sample], config: SolverConfig, generator: torch.Generator) -> Tensor:
    """Codebooks [M, K, p, g] for `config.spec`, float32 with the values that float16 keeps; rows have an RMS of one.

    Residual k-means of the samples' scaled groups, then rounds of error feedback and of least squares under all H,
    which fit several codebooks to each other; single ones gain next to nothing (0.06 dB).
    """
    spec = config.spec
    points = torch.cat([_points(sample, config) for sample in samples])  # [N, d]
    limit = config.init_max_points_per_centroid * spec.entries
    codebooks = residual_kmeans(points, spec.num_codebooks, spec.entries, config.init_max_iter, limit, generator)
    codebooks = codebooks.view(spec.codebooks_shape)  # [M, K, d] → [M, K, p, g]
    for _ in range(ROUNDS):
        fits = [Fit(some.W, some.H, encode_sample(some, codebooks, config), some.share) for some in samples]
        codebooks = refit_codebooks(fits, REFIT_ITERATIONS, RIDGE)
    return codebooks.half().float()


def _points(sample: Sample, config: SolverConfig) -> Tensor:
    spec = config.spec
    groups = scaled_groups(sample.W, support_rms(sample.W, spec), spec.out_group_size, spec.in_group_size)
    return groups.flatten(0, 1)  # [R, G, d] → [R·G, d]


def encode_sample(sample: Sample, codebooks: Tensor, config: SolverConfig) -> AdditiveCode:
    """The sample's code by error feedback with given codebooks, its scales fitted.

    Without the scale search of layers, from which codebooks gain nothing.
    """
    spec = config.spec.changed(input_channel_scales=False)  # which the sample has had taken out
    code = zero_code(spec, sample.W.shape[1], codebooks, support_rms(sample.W, spec))
    code = feedback_encode(sample.W, code, sample.factors, sample.feedback, config.beam_size)
    return refit_scales(sample.W, sample.H, code, REFIT_ITERATIONS)
