"""A layer, or several of one shape at once: from weights and second moments of inputs to additive codes.

Letters: O rows, I columns; p, g = out and in group size; R = O/p row groups, G = I/g column groups; d = p·g;
M codebooks of K entries; S scales per row group, 1 or G; L layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, islice, repeat

import torch
from torch import Tensor

from vqdm.additive.beam import adam_steps, beam_search
from vqdm.additive.code import AdditiveCode, CodeSpec, SharedCodebooks, group_columns, stored_bits
from vqdm.additive.codebooks import Fit, draw, refit_codebooks, refit_scales, residual_kmeans, to_groups, weighted_error
from vqdm.additive.encode import coordinate_descent, feedback_encode, feedback_factors, searched_feedback, together
from vqdm.additive.trellis_solve import solve_trellis
from vqdm.config import check_fields, flag, flags_in

ENCODERS = ("ldl", "beam")
_additive = partial(flag, needs=("not target_bits or overrides",))  # trellis codes have a solver without settings
_beam = partial(flag, needs=("not target_bits or overrides", "encoder beam"))


@dataclass(frozen=True)
class SolverConfig:
    """Settings of `solve_layer`. Raises ValueError, naming the field, on impossible values.

    Attributes:
        damping: added to the Hessian's diagonal where it is factored, times the diagonal's mean.
        shared_damping: the same with shared codebooks, where rows have scales that feedback does not outgrow.
    """

    spec: CodeSpec = flags_in(
        CodeSpec, "format of additive codes (2x8, 3x8 and 4x8 at group 8 are the paper's 2, 3 and 4 bits)"
    )
    encoder: str = _additive(
        "ldl", "ldl: error feedback with a beam per group; beam: the paper's beam search over rows", choices=ENCODERS
    )
    beam_size: int = _additive(8, "beam size of the code search", ge=1)
    init_max_iter: int = _additive(25, "iterations of the residual k-means", ge=1)
    init_max_points_per_centroid: int = _additive(100, "subsample of k-means, per centroid", ge=1)
    lr: float = _beam(
        1e-4, "learning rate of Adam on codebooks and scales (beam only; ldl solves for them)", ge=0, lt=1
    )
    steps_per_epoch: int = _beam(100, "Adam steps between two code searches (beam only)", ge=0)
    max_epochs: int = _additive(20, "limit of rounds of refit and code search", ge=1)
    relative_mse_tolerance: float = _additive(
        0.01, "stop a layer after a round with a smaller relative improvement", ge=0, lt=1
    )
    damping: float = 0.01
    shared_damping: float = 0.003

    def __post_init__(self) -> None:
        if self.spec.row_bits:
            raise ValueError(f"row_bits is {self.spec.row_bits}; codes of variable rate are loaded but no longer made")
        check_fields(self)
        for name in ("damping", "shared_damping"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are numbers from 0 up to 1")

    @property
    def feedback_damping(self) -> float:
        """The damping of this format."""
        return self.shared_damping if self.spec.shared_codebooks else self.damping

    def with_spec(self, spec: CodeSpec) -> SolverConfig:
        """The same search for another format."""
        return replace(self, spec=spec)

    def to_dict(self) -> dict:
        return asdict(self)


REFIT_ITERATIONS = 4  # of conjugate gradients, from where the last ones ended; more gain nothing
RIDGE = 1.0  # how many more uses a codebook entry's present value counts for
SAMPLED_USES = 512  # uses of a codebook entry that a fit sees at most; a quarter of them costs 5 to 20 % of error
RELAXED_EPOCHS = 8  # searches with perturbed codebooks and a softened H, less and less of both
RELAXED_EPOCHS_LARGE = 3  # the same for layers of many groups, which gain little from more
MANY_GROUPS = 2**14
PERTURBATION = 0.4  # noise of the first, in units of the square root of the relative error
GAP_COLUMNS = 1024  # of a layer at most, for its gap to the bound: eigenvalues of more take longer than codes
SOFTENING = 0.05  # added to H's diagonal in the first, in units of its mean


@dataclass(frozen=True)
class LayerReport:
    """What a layer's code is worth. Errors are those of the code as stored, float16 and all.

    Attributes:
        error: tr((W−Ŵ) H (W−Ŵ)ᵀ) / tr(W H Wᵀ).
        held_out_error: the same on the held-out H, or None.
        bits_per_weight: all stored bits of the code over the layer's weights, with its part of shared codebooks.
        code_bits_per_weight: the codes' share of them, M·b / (p·g) but for padding to whole bytes.
        gap_db: decibels between `error` and the rate–distortion bound at `bits_per_weight`; None where either is zero,
            and for layers of more than `GAP_COLUMNS` columns.
        epochs: searches for codes, each with its refit.
        seconds: wall-clock time of the whole solution; of layers solved together, the same share of it for each.
    """

    error: float
    held_out_error: float | None
    bits_per_weight: float
    code_bits_per_weight: float
    gap_db: float | None
    epochs: int
    seconds: float

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """What `solve_layer` is given.

    Raises ValueError on shapes that do not divide into groups and on values that are not finite.
    """

    W: Tensor
    H: Tensor
    config: SolverConfig
    generator: torch.Generator
    held_out: Tensor | None = None
    shared: SharedCodebooks | None = None

    def __post_init__(self) -> None:
        _check(self.W, self.H, self.held_out, self.config.spec, self.shared)


@dataclass(frozen=True)
class Problem:
    """A layer ready to be coded: columns reordered, input scales and a power of two taken out, H of mean diagonal one.

    Attributes:
        W, H: [O, I] and [I, I].
        order: the column groups of the layer in the order they have here, [G].
        exponent: W is the layer's weight over 2^exponent.
        input_scales: [I] in the layer's order, or None.
    """

    W: Tensor
    H: Tensor
    order: Tensor
    exponent: int
    input_scales: Tensor | None

    @classmethod
    def of(cls, W: Tensor, H: Tensor, spec: CodeSpec) -> Problem:
        columns = input_scales(W) if spec.input_channel_scales else None
        exponent = unit_exponent(W)
        scaled, metric = fold_input_scales(W / 2.0**exponent, _normalised(H), columns)
        order = descending_groups(metric, spec.in_group_size)
        index = group_columns(order, spec.in_group_size)
        return cls(scaled[:, index].contiguous(), metric[index][:, index].contiguous(), order, exponent, columns)

    def finish(self, code: AdditiveCode, spec: CodeSpec) -> AdditiveCode:
        """The layer's code as stored, from a code of `W`."""
        code = times_power(code.with_groups(self.order.argsort()), self.exponent)
        return replace(code, spec=spec, input_scales=self.input_scales).stored()


def solve_layer(
    W: Tensor,
    H: Tensor,
    config: SolverConfig,
    generator: torch.Generator,
    held_out: Tensor | None = None,
    shared: SharedCodebooks | None = None,
) -> tuple[AdditiveCode, LayerReport]:
    """Additive code of W [O, I] that minimises tr((W−Ŵ) H (W−Ŵ)ᵀ), eq. 2 of VQDM (arXiv 2409.00492).

    Args: `W`, and the second moment `H` [I, I] of the layer's inputs, float32 on one device; `generator` for all
    random draws, so that equal calls give equal codes; `held_out`, a second H that is only reported on; `shared`, the
    codebooks that `config.spec` names, which are not changed.
    Returns the code as stored, the best seen by its error on H, and a report. Raises ValueError on shapes that do not
    divide into groups and on values that are not finite.
    """
    return solve_layers([Task(W, H, config, generator, held_out, shared)])[0]


def solve_layers(tasks: Sequence[Task]) -> list[tuple[AdditiveCode, LayerReport]]:
    """`solve_layer` of each of the tasks, which have their shape, device, config and shared codebooks in common.

    Searches for codes go through all layers at once, so that a launch on a GPU does the work of all. A layer's result
    is the one it has alone up to rounding: random draws are its own, and so is the best that is kept. Raises ValueError
    on tasks that differ in what they must have in common.
    """
    started = time.perf_counter()
    if len({(task.W.shape, task.config, id(task.shared)) for task in tasks}) != 1:
        raise ValueError("layers that are solved together must have one shape, config and set of shared codebooks")
    config, spec = tasks[0].config, tasks[0].config.spec
    if spec.is_trellis:
        codes = solve_trellis([(task.W, task.H) for task in tasks], spec)
        return _reported(tasks, codes, [1] * len(tasks), started)
    problems = [Problem.of(task.W, task.H, spec) for task in tasks]
    inner = config.with_spec(spec.changed(input_channel_scales=False))
    found = search(problems, inner, [task.generator for task in tasks], tasks[0].shared)
    codes = [problem.finish(best, spec) for problem, (best, _) in zip(problems, found, strict=True)]
    return _reported(tasks, codes, [epochs for _, epochs in found], started)


def _reported(
    tasks: Sequence[Task], codes: list[AdditiveCode], epochs: list[int], started: float
) -> list[tuple[AdditiveCode, LayerReport]]:
    """Codes with their reports."""
    reports = [_report(*one) for one in zip(tasks, codes, epochs, strict=True)]
    seconds = (time.perf_counter() - started) / len(tasks)
    return [(code, replace(report, seconds=seconds)) for code, report in zip(codes, reports, strict=True)]


def _check(W: Tensor, H: Tensor, held_out: Tensor | None, spec: CodeSpec, shared: SharedCodebooks | None) -> None:
    if W.dim() != 2 or W.numel() == 0:
        raise ValueError(f"the weight has shape {tuple(W.shape)}; it must be a matrix")
    spec.check_shape(*W.shape)
    if bool(spec.shared_codebooks) != (shared is not None):
        raise ValueError("shared codebooks are needed if the format has them, and only then")
    if shared is not None and shared.codebooks.shape != spec.codebooks_shape:
        shape = tuple(shared.codebooks.shape)
        raise ValueError(f"the shared codebooks have shape {shape}; the format has {spec.codebooks_shape}")
    matrices = {"the Hessian": H} if held_out is None else {"the Hessian": H, "the held-out Hessian": held_out}
    for name, matrix in matrices.items():
        if matrix.shape != (W.shape[1], W.shape[1]):
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}; the weight has {W.shape[1]} columns")
    for name, matrix in {"the weight": W, **matrices}.items():
        if not matrix.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")


def _normalised(H: Tensor) -> Tensor:
    """H with a mean diagonal of one; the identity where H is zero, so that the weights themselves are matched."""
    mean = H.diagonal().mean()
    return H / mean if mean > 0 else torch.eye(len(H), dtype=H.dtype, device=H.device)


def unit_exponent(W: Tensor) -> int:
    """The power of two to divide W by: 0 for ordinary rows, those whose norms float16 holds well."""
    norm = (W.norm() / math.sqrt(len(W))).item()
    exponent = round(math.log2(norm)) if norm > 0 else 0
    return exponent if abs(exponent) > 8 else 0


def times_power(code: AdditiveCode, exponent: int) -> AdditiveCode:
    """`code` times 2^exponent, half of it in own codebooks, the rest in the scales, so that float16 holds both."""
    half = 0 if code.spec.shared_codebooks else exponent // 2
    return replace(code, codebooks=code.codebooks * 2.0**half, scales=code.scales * 2.0 ** (exponent - half))


def input_scales(W: Tensor) -> Tensor:
    """RMS of every column of W [O, I] relative to all, as float16 keeps it, and 1 where that is zero: float32 [I]."""
    rms = W.square().mean(0).sqrt()
    scales = (rms / rms.mean()).to(torch.float16).float()
    return torch.where((scales > 0) & scales.isfinite(), scales, 1.0)


def fold_input_scales(W: Tensor, H: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """The problem that is left once the input scales are taken out of W."""
    if columns is None:
        return W, H
    return W / columns, H * columns * columns[:, None]


def descending_groups(H: Tensor, g: int) -> Tensor:
    """Column groups [G] in the order of error feedback: what weighs most first, for the rest to make up for."""
    return H.diagonal().view(-1, g).sum(1).argsort(descending=True, stable=True)


def search(
    problems: list[Problem], config: SolverConfig, generators: list[torch.Generator], shared: SharedCodebooks | None
) -> list[tuple[AdditiveCode, int]]:
    """For every layer the best code found and the number of searches for codes it took.

    A large layer's codebooks are fitted to some of its rows, and all rows are then coded with them.
    """
    if shared is not None:
        scales = [support_rms(problem.W, config.spec) for problem in problems]
        fixed = _fixed_candidates(problems, config, [shared.codebooks.float()] * len(problems), scales)
        return _best(problems, fixed, config, settled=1)
    if config.encoder == "beam":
        each = (_beam_candidates(problem, config, own) for problem, own in zip(problems, generators, strict=True))
        return _best(problems, zip(*each, strict=True), config, settled=1)
    some = [_sampled(problem, config.spec, own) for problem, own in zip(problems, generators, strict=True)]
    settled = relaxed_epochs(some[0].W, config) + 1
    found = _best(some, _ldl_candidates(some, config, generators), config, settled)
    if some[0] is problems[0]:
        return found
    scales = [row_norms(problem.W, config.spec) for problem in problems]
    fixed = _fixed_candidates(problems, config, [code.codebooks for code, _ in found], scales)
    coded = _best(problems, fixed, config, settled=1)
    return [(code, epochs + more) for (_, epochs), (code, more) in zip(found, coded, strict=True)]


def _sampled(problem: Problem, spec: CodeSpec, generator: torch.Generator) -> Problem:
    """The problem with the rows that codebooks are fitted to; itself where these are all."""
    rows = sampled_rows(problem.W, spec, generator)
    return problem if rows is None else replace(problem, W=problem.W[rows])


def sampled_rows(W: Tensor, spec: CodeSpec, generator: torch.Generator) -> Tensor | None:
    """The rows of W [O, I] that own codebooks are fitted to, whole row groups; None for all."""
    p, R, G = spec.out_group_size, len(W) // spec.out_group_size, W.shape[1] // spec.in_group_size
    wanted = -(-SAMPLED_USES * spec.entries // (1 if spec.groupwise_codebooks else G))
    if wanted >= R:
        return None
    return group_columns(draw(R, wanted, generator).sort().values.to(W.device), p)


@dataclass
class _Best:
    """The best of a layer's candidates so far; the search has `ended` where one gains little over the one before."""

    config: SolverConfig
    settled: int  # candidates that may gain as little as they like
    code: AdditiveCode | None = None
    least: float = math.inf
    previous: float = math.inf
    epochs: int = 0
    ended: bool = False

    def see(self, code: AdditiveCode, error: float) -> None:
        self.epochs += 1
        if self.code is None or error < self.least:
            self.code, self.least = code, error
        enough = error < (1 - self.config.relative_mse_tolerance) * self.previous
        self.ended, self.previous = self.epochs > self.settled and not enough, error


def _best(
    problems: list[Problem], candidates: Iterator[Sequence[AdditiveCode]], config: SolverConfig, settled: int
) -> list[tuple[AdditiveCode, int]]:
    """For every layer the best of its candidates and how many it took; after `settled` of them, a small gain ends it.

    A layer whose search has ended waits for the others.
    """
    layers = [_Best(config, settled) for _ in problems]
    for codes in islice(candidates, config.max_epochs):
        for layer, problem, code in zip(layers, problems, codes, strict=True):
            if not layer.ended:
                layer.see(code, weighted_error(problem.W - code.dequantize(), problem.H).item())
        if all(layer.ended for layer in layers):
            break
    return [(layer.code, layer.epochs) for layer in layers]


def _fixed_candidates(
    problems: list[Problem], config: SolverConfig, codebooks: list[Tensor], scales: list[Tensor]
) -> Iterator[list[AdditiveCode]]:
    """Error feedback once, then coordinate descent again and again, scales fitted after each; without end."""
    spec, beam_size = config.spec, config.beam_size
    W, H = _matrices(problems)
    factors, feedback = _feedback(H, config)
    codes = [zero_code(spec, w.shape[1], *given) for w, *given in zip(W, codebooks, scales, strict=True)]
    codes = searched_feedback(W, H, codes, factors, feedback, beam_size)
    del factors, feedback  # as large as H
    while True:
        codes = [as_stored(refit_scales(*layer, REFIT_ITERATIONS)) for layer in zip(W, H, codes, strict=True)]
        yield codes
        codes = together(coordinate_descent, W, H, codes, beam_size=beam_size)


def _matrices(problems: list[Problem]) -> tuple[list[Tensor], list[Tensor]]:
    return [problem.W for problem in problems], [problem.H for problem in problems]


def _feedback(H: list[Tensor], config: SolverConfig) -> tuple[list[Tensor], list[Tensor]]:
    found = [feedback_factors(h, config.spec.in_group_size, config.feedback_damping) for h in H]
    return [factors for factors, _ in found], [feedback for _, feedback in found]


def _ldl_candidates(
    problems: list[Problem], config: SolverConfig, generators: list[torch.Generator]
) -> Iterator[list[AdditiveCode]]:
    """Error feedback once, then coordinate descent again and again, a refit after each; without end.

    Plain descent settles within a few searches. Perturbed codebooks at first (stochastic relaxation, LSQ++, Martinez
    et al., ECCV 2018), and an H that trusts other groups less to make up for errors, end 5 to 10 % lower.
    """
    W, H = _matrices(problems)
    codes = [initial_code(w, config, own) for w, own in zip(W, generators, strict=True)]
    codes = together(feedback_encode, W, codes, *_feedback(H, config), beam_size=config.beam_size)
    codes = list(map(_refit, W, H, codes))
    yield codes
    relaxed = relaxed_epochs(W[0], config)
    for epoch in count():
        heat = max(0.0, 1 - epoch / relaxed) if relaxed else 0.0
        softened = [with_diagonal(h, SOFTENING * heat**3) for h in H]
        noisy = list(map(perturbed, W, H, codes, repeat(PERTURBATION * heat), generators))
        found = together(coordinate_descent, W, softened, noisy, beam_size=config.beam_size)
        codes = [replace(code, codes=new.codes) for code, new in zip(codes, found, strict=True)]
        codes = list(map(_refit, W, softened, codes))
        yield codes


def with_diagonal(H: Tensor, added: float) -> Tensor:
    """H with so much added to its diagonal; itself where that is nothing."""
    if not added:
        return H
    softened = H.clone()
    softened.diagonal().add_(added)
    return softened


def relaxed_epochs(W: Tensor, config: SolverConfig) -> int:
    """How many of the searches that fit codebooks to W [O, I] are perturbed; two of `max_epochs` are not."""
    groups = W.numel() // (config.spec.out_group_size * config.spec.in_group_size)
    wanted = RELAXED_EPOCHS if groups < MANY_GROUPS else RELAXED_EPOCHS_LARGE
    return min(wanted, max(0, config.max_epochs - 2))


def _beam_candidates(problem: Problem, config: SolverConfig, generator: torch.Generator) -> Iterator[AdditiveCode]:
    """VQDM's rounds: Adam on codebooks and scales, then a beam search in a new random order, without end."""
    W, H = problem.W, problem.H
    G, M = W.shape[1] // config.spec.in_group_size, config.spec.num_codebooks
    code = initial_code(W, config, generator)
    code = without_feedback(W, code)
    while True:
        code = as_stored(adam_steps(W, H, code, config.lr, config.steps_per_epoch))
        order = draw(G, G, generator).to(W.device)
        codebook_orders = torch.stack([draw(M, M, generator) for _ in range(G)])
        index = group_columns(order, config.spec.in_group_size)
        ordered = W[:, index], H[index][:, index], code.with_groups(order)
        code = beam_search(*ordered, config.beam_size, codebook_orders).with_groups(order.argsort())
        yield code


def initial_code(W: Tensor, config: SolverConfig, generator: torch.Generator) -> AdditiveCode:
    """Scales, residual k-means codebooks of the scaled groups, and codes that are all zero."""
    spec = config.spec
    p, g, M, K = spec.out_group_size, spec.in_group_size, spec.num_codebooks, spec.entries
    scales = row_norms(W, spec)
    points = scaled_groups(W, scales, p, g)  # [R, G, d]
    sets = points.unbind(1) if spec.groupwise_codebooks else [points.reshape(-1, p * g)]
    limit = config.init_max_points_per_centroid * K
    found = [residual_kmeans(one, M, K, config.init_max_iter, limit, generator) for one in sets]
    codebooks = torch.stack(found).view(-1, M, K, p, g)  # [G or 1, M, K, d] → [G or 1, M, K, p, g]
    codes = torch.zeros(*points.shape[:2], M, dtype=torch.int64, device=W.device)
    return as_stored(AdditiveCode(spec, codes, codebooks if spec.groupwise_codebooks else codebooks[0], scales))


def zero_code(spec: CodeSpec, columns: int, codebooks: Tensor, scales: Tensor) -> AdditiveCode:
    """Given codebooks and scales [R, S], and codes that are all the first."""
    shape = len(scales), columns // spec.in_group_size, spec.num_codebooks
    codes = torch.zeros(shape, dtype=torch.int64, device=scales.device)
    return as_stored(AdditiveCode(spec, codes, codebooks, scales))


def row_norms(W: Tensor, spec: CodeSpec) -> Tensor:
    """AQLM's first scales [R, S] for a layer's own codebooks: norms of rows, or of rows like what a scale covers."""
    return support_rms(W, spec) * math.sqrt(W.shape[1])


def support_rms(W: Tensor, spec: CodeSpec) -> Tensor:
    """RMS [R, S] of the weights that each scale covers."""
    groups = to_groups(W, spec.out_group_size, spec.in_group_size)  # [R, G, d]
    R, G, d = groups.shape
    return groups.view(R, -1, d if spec.scale_nbits else G * d).square().mean(2).sqrt()


def scaled_groups(W: Tensor, scales: Tensor, p: int, g: int) -> Tensor:
    """Column groups [R, G, d] of W over their scales [R, S]; where a scale is zero, as they are."""
    return to_groups(W, p, g) / torch.where(scales == 0, 1.0, scales)[:, :, None]


def without_feedback(W: Tensor, code: AdditiveCode) -> AdditiveCode:
    """`code` with the codes of plain residual quantization, which looks at the weights alone."""
    g = code.spec.in_group_size
    factors = torch.eye(g, dtype=W.dtype, device=W.device).expand(W.shape[1] // g, g, g)
    return feedback_encode(W, code, factors, W.new_zeros(W.shape[1], W.shape[1]), beam_size=1)


def perturbed(W: Tensor, H: Tensor, code: AdditiveCode, level: float, generator: torch.Generator) -> AdditiveCode:
    """`code` with Gaussian noise on its codebooks: all M together `level` · √(relative error) · RMS of its values."""
    M = code.spec.num_codebooks
    unscaled = replace(code, scales=torch.ones_like(code.scales)).dequantize()
    spread = unscaled.square().mean().sqrt() * math.sqrt(relative_error(W, code, H) / M)
    noise = torch.randn(code.codebooks.shape, generator=generator, device=generator.device).to(W.device)
    return replace(code, codebooks=code.codebooks + level * spread * noise)


def as_stored(code: AdditiveCode) -> AdditiveCode:
    """`code` with its values rounded to what is stored, in float32 to go on with."""
    stored = code.stored()
    return replace(stored, codebooks=stored.codebooks.float(), scales=stored.scales.float())


def _refit(W: Tensor, H: Tensor, code: AdditiveCode) -> AdditiveCode:
    code = replace(code, codebooks=refit_codebooks([Fit(W, H, code)], REFIT_ITERATIONS, RIDGE))
    return as_stored(refit_scales(W, H, code, REFIT_ITERATIONS))


def _report(task: Task, code: AdditiveCode, epochs: int) -> LayerReport:
    """All but the time it took."""
    W, H, held_out, shared = task.W, task.H, task.held_out, task.shared
    error = relative_error(W, code, H)
    bits = stored_bits(code.pack()) / W.numel() + (shared.bits_per_weight if shared else 0)
    return LayerReport(
        error=error,
        held_out_error=None if held_out is None else relative_error(W, code, held_out),
        bits_per_weight=bits,
        code_bits_per_weight=stored_bits({"codes": code.pack()["codes"]}) / W.numel(),
        gap_db=gap_to_bound(error, W, H, bits) if len(H) <= GAP_COLUMNS else None,
        epochs=epochs,
        seconds=0.0,
    )


def relative_error(W: Tensor, code: AdditiveCode, H: Tensor) -> float:
    """tr((W−Ŵ) H (W−Ŵ)ᵀ) / tr(W H Wᵀ); 0 where the denominator is 0."""
    energy = weighted_error(W, H).item()
    return max(0.0, weighted_error(W - code.dequantize(), H).item() / energy) if energy > 0 else 0.0


# ------------------------------------------------------------------------------------------------ rate–distortion bound
#
# ------------------------------------------------------------------------------------------------ rate–distortion bound
#
# The least weighted error that any code of a given rate can have, for Gaussian rows.
#
# Reverse water-filling over the eigenvalues λ_i of H^½ Σ_w H^½ (Cover & Thomas, Elements of Information Theory, §10.3):
#
#     R = (1/I) Σ max(0, ½ log₂(λ_i/θ)),   D = Σ min(θ, λ_i),   relative bound D / Σ λ_i
#
# Letters: O rows, I columns; Σ_w [I, I] the covariance of the rows.


def gap_to_bound(error: float, W: Tensor, H: Tensor, bits_per_weight: float) -> float | None:
    """Decibels between a code's relative error and the bound at its stored bits; negative below the bound.

    None where either is zero. A layer can fall below the bound: rows need not be Gaussian, and codebooks remember.
    """
    limit = relative_bound(row_spectrum(W, H), bits_per_weight)
    return 10 * math.log10(error / limit) if error > 0 and limit > 0 else None


def relative_bound(spectrum: Tensor, bits: float) -> float:
    """Reverse water-filling: D / Σ λ_i at `bits` a weight for eigenvalues [I] of any order; 0 where all are zero."""
    ordered = spectrum.double().clamp(min=0).sort(descending=True).values
    active = ordered[ordered > 0]
    if len(active) == 0:
        return 0.0
    counts = torch.arange(1, len(active) + 1, device=active.device)
    # With the n largest above the water, log₂ θ is their mean logarithm less 2·R·I/n; n is the last to stay above it.
    levels = active.log2().cumsum(0) / counts - 2 * bits * len(ordered) / counts  # [n], log₂ θ
    last = int((active.log2() >= levels).sum()) - 1
    theta = levels[last].exp2()
    return (torch.minimum(ordered, theta).sum() / ordered.sum()).item()


def row_spectrum(W: Tensor, H: Tensor) -> Tensor:
    """Eigenvalues [I] of H^½ Σ_w H^½ for the rows of W [O, I], from the equal ones of Lᵀ H L with Σ_w = L Lᵀ."""
    covariance = shrunk_covariance(W)
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        factor = covariance.diagonal().sqrt().diag()
    return torch.linalg.eigvalsh(factor.T @ H @ factor)


def shrunk_covariance(W: Tensor) -> Tensor:
    """Second moment [I, I] of the rows of W [O, I], its off-diagonal shrunk by the share of it that chance explains.

    Schäfer & Strimmer (2005), target "diagonal, unequal variance", for zero means: with few rows for the columns the
    plain estimate would be singular, and the bound zero.
    """
    O = len(W)  # noqa: E741
    moment = W.T @ W / O
    squares = W.square()
    chance = (squares.T @ squares / O - moment.square()) / max(O - 1, 1)  # variance of every entry of `moment`
    signal = moment.square().sum() - moment.diagonal().square().sum()
    noise = chance.sum() - chance.diagonal().sum()
    kept = (1 - noise / signal).clamp(0, 1) if signal > 0 else moment.new_zeros(())
    return kept * moment + (1 - kept) * moment.diagonal().diag()
