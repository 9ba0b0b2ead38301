"""Shared codebooks: their names, their training on recorded Hessians, their files.

Small layers pay more for codebooks of their own than for codes; a shared set costs next to nothing, so that its
codebooks can be larger (up to 16 bits per entry)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, CodeSpec, SharedCodebooks
from vqdm.additive.codebooks import Fit, draw, refit_codebooks, refit_scales, residual_kmeans, weighted_error
from vqdm.additive.encode import feedback_encode, feedback_factors
from vqdm.additive.solve import Problem, SolverConfig, scaled_groups, support_rms, zero_code
from vqdm.additive.trellis import table
from vqdm.diffusion.blocks import Layer, matrix_of
from vqdm.diffusion.hessians import HessianStore
from vqdm.quantization.plan import shared_codebook_users
from vqdm.storage.files import save_checked
from vqdm.storage.run_folder import layer_generator, read_shard
from vqdm.tracking import log_info, progress_bar

if TYPE_CHECKING:
    from vqdm.quantization.job import Job


LAYERS = 48  # that shared codebooks are trained on at most
GROUPS = 2**17  # column groups that they give together, about


def shared(layer: Layer, how: str) -> Layer:
    """Return the layer with the shared codebooks of its format, of the whole model or ("kind") of its kind of layer."""
    if how == "none" or layer.spec.shared_codebooks or not layer.spec.can_share:
        return layer
    return replace(layer, spec=layer.spec.changed(shared_codebooks=shared_codebook_name(layer.spec, how, layer.kind)))


def trellis_table_name(state_bits: int) -> str:
    """Return the name of the table of a trellis."""
    return f"trellis_{state_bits}"


def trellis_codebooks(state_bits: int) -> Tensor:
    """Return the table of a trellis as shared codebooks [1, 2^L, 1, 1]."""
    return table(state_bits).view(1, -1, 1, 1)


def shared_codebook_name(spec: CodeSpec, how: str, kind: str) -> str:
    """Return a name like `unet_2x8_1x4`: owner, codebooks x bits, out x in group size."""
    books, group = (spec.num_codebooks, spec.nbits_per_codebook), (spec.out_group_size, spec.in_group_size)
    return "{}_{}x{}_{}x{}".format(kind if how == "kind" else "unet", *books, *group)


def make_shared_codebooks(job: Job, store: HessianStore) -> dict[str, SharedCodebooks]:
    """Return the shared codebooks that the layers name, from the run's folder or trained."""
    shared_codebooks = {}
    for name, layers in shared_codebook_users(job.layers).items():
        weights = sum(layer.rows * layer.columns for layer in layers)
        if layers[0].spec.is_trellis:  # nothing is trained
            codebooks = trellis_codebooks(layers[0].spec.nbits_per_codebook).to(job.denoiser.device)
            shared_codebooks[name] = SharedCodebooks(codebooks, weights)
            continue
        config = job.config.solver.with_spec(layers[0].spec)
        path = job.folder.work / "shared_codebooks" / f"{name}.safetensors"
        if job.ranks.main and not path.is_file():
            samples = sample_layers(job, store, trained_on(job.layers, name, layers[0].spec), config)
            log_info(f"shared codebooks {name}: training on {len(samples)} layers")
            codebooks = train_shared_codebooks(samples, config, layer_generator(job.config.seed, name))
            save_checked({"codebooks": codebooks}, path)
        job.ranks.barrier()
        shared_codebooks[name] = SharedCodebooks(read_shard(path)["codebooks"].to(job.denoiser.device), weights)
    return shared_codebooks


def trained_on(layers: list[Layer], name: str, spec: CodeSpec) -> list[Layer]:
    """Return the layers that shared codebooks are trained on: all of their owner, whatever bits are allocated."""
    owners = {"linear", "conv"} & {name.split("_")[0]}
    fits = [one for one in layers if one.columns % spec.in_group_size == one.rows % spec.out_group_size == 0]
    return [one for one in fits if not owners or one.kind in owners]


def sample_layers(job: Job, store: HessianStore, layers: list[Layer], config: SolverConfig) -> list[Sample]:
    """Return rows of some layers, chosen with a seed: as many layers as memory holds the Hessians of."""
    chosen = choose_layers(layers, job.codebook_memory_gb, job.config.seed)
    rows = max(8, GROUPS * config.spec.in_group_size // sum(layer.columns for layer in chosen))
    samples = []
    for layer in progress_bar(chosen, description="layers of shared codebooks"):
        generator = layer_generator(job.config.seed, f"bank:{layer.name}")
        W = matrix_of(job.denoiser.get_submodule(layer.name), layer.spec.group_channels).float()
        samples.append(sample_layer(W, store.load(layer, W.device)[0], rows, config, generator))
    return samples


def choose_layers(layers: list[Layer], memory_gb: float, seed: int) -> list[Layer]:
    """Return at most `LAYERS` of the layers, at random, in their order; their samples fit into memory."""
    generator = torch.Generator().manual_seed(seed)
    free, chosen = memory_gb * 1e9, []
    for index in torch.randperm(len(layers), generator=generator).tolist():
        need = 3 * 4 * layers[index].columns ** 2
        if need <= free and len(chosen) < LAYERS:
            chosen.append(index)
            free -= need
    return [layers[index] for index in sorted(chosen)]


# ------------------------------------------------------------------------------------------------------------- training
#
# One set of codebooks, trained on rows of all layers that share it.
#
# Letters: O rows, I columns; p, g = out and in group size; G = I/g column groups; d = p·g; M codebooks of K entries.

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
