"""Bit allocation: every layer's bits for a given number of stored bits per weight, as trellis codes.

What a layer's error will be at any bits is known from its Hessian (`additive.trellis_solve`); what that error does to
the denoiser's output is measured by backward passes with the layers coded at `FIRST_BITS`, and again at the bits that
were chosen from it, since effects are first-order. The budget then goes where a bit saves most.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vqdm.additive.code import AdditiveCode, CodeSpec, SharedCodebooks
from vqdm.additive.trellis import UNITS, allowed_widths, segment_rows
from vqdm.additive.trellis_solve import LEAST_ERROR, Curve, layer_curves
from vqdm.config import label
from vqdm.diffusion.blocks import Layer, matrix_of, weight_of
from vqdm.diffusion.hessians import HessianStore, passes
from vqdm.diffusion.sensitivity import output_effects, spread_over_noise
from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.quantization.block import quantize_shard
from vqdm.quantization.config import FAST_STATE_BITS, STATE_BITS, QuantizeConfig
from vqdm.quantization.plan import layer_bits, shared_codebook_bits
from vqdm.quantization.recording import denoiser_calls, teacher_trajectories
from vqdm.quantization.shared_codebooks import trellis_codebooks, trellis_table_name
from vqdm.storage.files import CorruptFileError, load_checked_json, save_checked, save_checked_json, save_json
from vqdm.storage.run_folder import Tensors, layer_generator, read_shard
from vqdm.tracking import log_info, progress_bar

if TYPE_CHECKING:
    from vqdm.quantization.job import Job


PLAN = "plan.json"
PLANNED = (
    "num_codebooks",
    "nbits_per_codebook",
    "in_group_size",
    "input_channel_scales",
    "shared_codebooks",
    "segment_rows",
    "segment_bits",
    "log_scales",
    "scale_exponent",
)
FIRST_BITS = 2.0  # per weight, at which effects are first measured
LEAST_BITS = 1.0  # of code per weight in every layer: what a layer that vanishes does is not to be predicted
RATE_STEP = 1 / 16  # bits per weight between the rates that are offered
COMPARABLE_BITS = 6.0  # per weight, up to which codes of `FAST_STATE_BITS` say what others will leave


def trellis_layer(layer: Layer, state_bits: int, bits: float, exponent: int = 0) -> Layer:
    """The layer as a trellis code of about `bits` per weight."""
    T = segment_rows(layer.rows)
    spec = CodeSpec(
        num_codebooks=1,
        nbits_per_codebook=state_bits,
        in_group_size=1,
        group_channels=layer.spec.group_channels,
        input_channel_scales=True,
        shared_codebooks=trellis_table_name(state_bits),
        segment_rows=T,
        log_scales=True,
        scale_exponent=exponent,
    )
    layer = replace(layer, spec=spec)
    return replace(layer, spec=spec.changed(segment_bits=segment_bits(layer, min(bits, state_bits))))


def allocated(job: Job, store: HessianStore) -> list[Layer]:
    """The job's layers, those without an override with bits that together take `target_bits` per weight.

    The plan is written into the output folder, in the form that `--overrides` reads, and read again on resumption.
    """
    path = job.folder.work / PLAN
    if not job.ranks.broadcast(path.is_file()):
        layers = planned_layers(job, store)
        plan = {layer.name: {name: getattr(layer.spec, name) for name in PLANNED} for layer in layers}
        if job.ranks.main:
            save_checked_json(plan, path)
    plan = job.ranks.broadcast(read_plan(path) if job.ranks.main else None)
    if job.ranks.main:
        save_json(plan, job.folder.beside(PLAN))
    return planned(job.layers, plan, path)


def read_plan(path: Path) -> dict[str, dict]:
    """What the run has decided. Raises RunError when the file is damaged."""
    try:
        return load_checked_json(path)
    except CorruptFileError as error:
        raise RunError(f"{path} is damaged ({error}); delete it and run again with --resume") from None


def planned(layers: list[Layer], plan: dict[str, dict], path: Path) -> list[Layer]:
    """The layers in the formats of a plan. Raises RunError when it lacks a layer or has a format that cannot be."""
    try:
        found = [replace(layer, spec=layer.spec.changed(**plan[layer.name])) for layer in layers]
        for layer in found:
            layer.spec.check_shape(layer.rows, layer.columns)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({first_line(error)}); delete it and run again with --resume") from None
    return found


def planned_layers(job: Job, store: HessianStore) -> list[Layer]:
    """All layers with the bits that are best by effects measured twice; overridden ones as they are."""
    free = [layer for layer in job.layers if not overridden(job.config, layer)]
    curves, fast_curves = expected_curves(job, store, free)
    exponents = {layer.name: scale_exponent(job, layer) for layer in free}
    bits = {layer.name: min(FIRST_BITS, job.config.target_bits) for layer in free}
    for name in ("first", "second"):
        fast = [trellis_layer(layer, FAST_STATE_BITS, bits[layer.name], exponents[layer.name]) for layer in free]
        effects, errors = layer_effects(job, store, fast, name)
        if job.swapper and job.ranks.main:  # all ranks have the effects
            shutil.rmtree(job.folder.work / f"coded_{name}")
        curves = corrected(curves, fast_curves, fast, errors)
        costs = {layer.name: effects[layer.name] / max(errors[layer.name], LEAST_ERROR) for layer in fast}
        full = [trellis_layer(layer, job.config.state_bits, FIRST_BITS, exponents[layer.name]) for layer in free]
        chosen, expected = divide(job, full, curves, costs)
        bits = {layer.name: layer.spec.code_bits_per_weight(layer.columns) for layer in chosen}
        decibels = 10 * math.log10(max(expected, 1e-12))
        log_info(f"plan by the {name} effects: expected {label(job.component)}-output error {decibels:.1f} dB")
    found = {layer.name: layer for layer in chosen}
    return [found.get(layer.name, layer) for layer in job.layers]


def overridden(config: QuantizeConfig, layer: Layer) -> bool:
    """Whether an override says what the layer becomes."""
    return any(re.fullmatch(pattern, layer.name) for pattern in config.overrides)


def scale_exponent(job: Job, layer: Layer) -> int:
    """The octave of the layer's weights: stored logarithms of scales count from there."""
    rms = job.denoiser.get_submodule(layer.name).weight.detach().float().square().mean().sqrt().item()
    return max(-256, min(256, round(math.log2(rms)))) if rms > 0 else 0


def expected_curves(job: Job, store: HessianStore, layers: list[Layer]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """By name, every layer's expected errors as it will be coded, and with `FAST_STATE_BITS`; ranks share the work."""

    def curves(layer: Layer) -> list[Curve]:
        weight = matrix_of(job.denoiser.get_submodule(layer.name), layer.spec.group_channels)
        weight = weight.to(job.denoiser.device).float()
        full, fast = (trellis_layer(layer, L, FIRST_BITS).spec for L in (job.config.state_bits, FAST_STATE_BITS))
        found = layer_curves(weight, store.load(layer, weight.device)[0], full, [fast])
        progress.update()
        return found

    with progress_bar(total=len(job.ranks.shard(layers)), description="rate-distortion curves") as progress:
        found = zip(*job.ranks.map(layers, curves), strict=True)
    full, fast = (dict(zip([layer.name for layer in layers], some, strict=True)) for some in found)
    return full, fast


def corrected(
    curves: dict[str, Curve], fast_curves: dict[str, Curve], layers: list[Layer], errors: dict[str, float]
) -> dict[str, Curve]:
    """The curves, corrected by the errors that coding with `FAST_STATE_BITS` gave, over those expected of it.

    Args: `layers` as they were coded, and `errors` by layer name. Those of more than `COMPARABLE_BITS` correct nothing.
    """
    known = [layer for layer in layers if layer.spec.code_bits_per_weight(layer.columns) <= COMPARABLE_BITS]
    totals = {layer.name: width_total(layer) for layer in known}
    ratios = {name: fast_curves[name].ratio(total, errors[name]) for name, total in totals.items()}
    return curves | {name: curves[name].corrected(total, ratios[name]) for name, total in totals.items()}


# ------------------------------------------------------------------------------------------- effects


def layer_effects(
    job: Job, store: HessianStore, layers: list[Layer], name: str
) -> tuple[dict[str, float], dict[str, float]]:
    """By layer name, the denoiser's relative output error when this layer alone is coded as it is here; and its own."""
    model, calls = job.text.effects(job.config.sensitivity_points) if job.text else denoiser_effects(job)
    log_info(f"effects of {len(layers)} layers on the output, at {len(calls)} points")
    changes, errors = coding_errors(job, store, layers, name)
    generator = lambda index: layer_generator(job.config.seed, f"effects:{index}")  # noqa: E731
    with progress_bar(total=len(job.ranks.shard(calls)), description="effects of layers") as progress:
        return output_effects(model, changes, calls, generator, progress.update, job.ranks), errors


def denoiser_effects(job: Job) -> tuple[nn.Module, list[Callable[[], dict]]]:
    """The denoiser, and calls of it on single points, spread over prompts and steps."""
    trajectories = teacher_trajectories(job)
    points = spread_over_noise(trajectories, job.config.sensitivity_points)
    return job.denoiser, [call for point in points for call in denoiser_calls(job, trajectories, [point])]


def coding_errors(
    job: Job, store: HessianStore, layers: list[Layer], name: str
) -> tuple[dict[str, Tensor | Callable[[], Tensor]], dict[str, float]]:
    """By layer name, coded minus original weight, in the weight's shape and type; and the relative error of that.

    Ranks share the layers, and find each other's codes in the run's folder under `name`. Where the denoiser is not on
    the device whole, the changes are functions, which read the codes.
    """
    books = SharedCodebooks(trellis_codebooks(FAST_STATE_BITS).to(job.denoiser.device), 1)
    shared_codebooks, folder = {trellis_table_name(FAST_STATE_BITS): books}, job.folder.work / f"coded_{name}"
    missing = job.ranks.broadcast([layer for layer in layers if not (folder / f"{layer.name}.safetensors").is_file()])
    for groups in passes(store.groups(missing), job.config.hessian_memory_gb):
        some = [layer for group in groups for layer in group]
        for layer, code, report in quantize_shard(job, store, some, job.config.solver, shared_codebooks):
            error = torch.tensor(report.error, dtype=torch.float64)
            save_checked(code.pack() | {"error": error}, folder / f"{layer.name}.safetensors")
    job.ranks.barrier()
    if job.swapper:
        errors = {layer.name: read_shard(folder / f"{layer.name}.safetensors")["error"].item() for layer in layers}
        return {layer.name: partial(stored_error, job, layer, folder, shared_codebooks) for layer in layers}, errors
    parts = {layer.name: read_shard(folder / f"{layer.name}.safetensors") for layer in layers}
    errors = {name: part.pop("error").item() for name, part in parts.items()}
    return {layer.name: coding_error(job, layer, parts[layer.name], shared_codebooks) for layer in layers}, errors


def stored_error(job: Job, layer: Layer, folder: Path, shared_codebooks: dict[str, SharedCodebooks]) -> Tensor:
    """The same as `coding_error`, of a code in a folder, on the device."""
    packed = read_shard(folder / f"{layer.name}.safetensors")
    packed.pop("error")
    return coding_error(job, layer, packed, shared_codebooks, job.denoiser.device)


@torch.no_grad()
def coding_error(
    job: Job,
    layer: Layer,
    packed: Tensors,
    shared_codebooks: dict[str, SharedCodebooks],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Coded minus original weight of one layer, from its packed code; on the CPU, where those of all layers are."""
    weight, books = job.denoiser.get_submodule(layer.name).weight, shared_codebooks[layer.spec.shared_codebooks]
    packed = {name: tensor.to(weight.device) for name, tensor in packed.items()}
    code = AdditiveCode.unpack(layer.spec, (layer.rows, layer.columns), packed, books.codebooks)
    coded = weight_of(code.dequantize(), weight.shape, layer.spec.group_channels)
    return (coded - weight.float()).to(device, weight.dtype)


# ------------------------------------------------------------------------------------------- dividing


def divide(
    job: Job, layers: list[Layer], curves: dict[str, Curve], costs: dict[str, float]
) -> tuple[list[Layer], float]:
    """The layers with the bits that cost the least at the output, and that cost, for the job's target.

    `costs`: what a unit of a layer's relative error costs at the output. `check_target` has found the target possible.
    """
    choices = [offered(layer) for layer in layers]
    bits = [[layer_bits(layer) for layer in options] for options in choices]
    errors = [curves[options[0].name].at(np.array([width_total(one) for one in options])) for options in choices]
    expected = [(costs[options[0].name] * error).tolist() for options, error in zip(choices, errors, strict=True)]
    free = {layer.name for layer in layers}
    fixed = [layer for layer in job.layers if layer.name not in free]
    weights = sum(layer.rows * layer.columns for layer in job.layers)
    aside = sum(map(layer_bits, fixed)) + shared_codebook_bits(fixed + layers)
    chosen = allocate(bits, expected, int(job.config.target_bits * weights) - aside)
    found = [options[k] for options, k in zip(choices, chosen, strict=True)]
    return found, sum(one[k] for one, k in zip(expected, chosen, strict=True))


def check_target(config: QuantizeConfig, layers: list[Layer]) -> None:
    """Check that the layers can take `target_bits` per weight, from their shapes alone.

    Raises:
        UserError: the target is below the least bits of all layers, or above their most, or every layer is overridden.
    """
    fixed = [layer for layer in layers if overridden(config, layer)]
    low, high = (
        [trellis_layer(layer, config.state_bits, rate) for layer in layers if not overridden(config, layer)]
        for rate in (LEAST_BITS, config.state_bits)
    )
    if not low:
        raise UserError(
            "--target_bits has no layer to allocate bits to; leave it out, since --overrides names them all"
        )
    weights = sum(layer.rows * layer.columns for layer in layers)
    overridden_bits, table_bits = sum(map(layer_bits, fixed)), shared_codebook_bits(fixed + low)
    aside = overridden_bits + table_bits
    least, most = (sum(map(layer_bits, some)) + aside for some in (low, high))
    given, table, state_bits = config.target_bits, table_bits / weights, config.state_bits
    others = f", and overridden layers {overridden_bits / weights:.3f}" if fixed else ""
    if int(given * weights) < least:
        raise UserError(
            f"--target_bits {given} is too low: codes of {LEAST_BITS:g} bit with scales take "
            f"{(least - aside) / weights:.3f} bits per weight, and the shared table {table:.3f} of so few "
            f"weights{others}; choose {math.ceil(1000 * least / weights) / 1000:.3f} or more, smaller --state_bits, or "
            "more layers (--layer_filter)"
        )
    if given * weights > most:
        larger = ", or larger --state_bits" if state_bits < max(STATE_BITS) else ""
        raise UserError(
            f"--target_bits {given} is too high: codes of --state_bits {state_bits} with scales take at most "
            f"{(most - aside) / weights:.3f} bits per weight, and the shared table {table:.3f}{others}; choose "
            f"{math.floor(1000 * most / weights) / 1000:.3f} or less{larger}"
        )


def offered(layer: Layer) -> list[Layer]:
    """The layer at every rate from the least to the most."""
    most = layer.spec.nbits_per_codebook
    rates = np.arange(LEAST_BITS, most + RATE_STEP / 2, RATE_STEP)
    return [replace(layer, spec=layer.spec.changed(segment_bits=segment_bits(layer, rate))) for rate in rates.tolist()]


def segment_bits(layer: Layer, bits: float) -> int:
    """Bits of a segment of all columns at about `bits` per weight, which allowed widths add up to."""
    T, L = layer.spec.segment_rows, layer.spec.nbits_per_codebook
    widths = allowed_widths(T, L)
    unit = widths[-1] - widths[-2]
    total = round(bits * UNITS * layer.columns / unit) * unit
    return max(total, widths[1]) * T // UNITS


def width_total(layer: Layer) -> int:
    """The summed widths of a row's columns."""
    return UNITS * layer.spec.segment_bits // layer.spec.segment_rows


# ---------------------------------------------------------------------------------------------------- dividing the bits
#
# Dividing a budget of bits among layers whose errors add up.
#
# For each layer the choices on the lower convex hull of (bits, cost) are the solutions for some price of a bit (Shoham
# & Gersho, 1988, "Efficient bit allocation for an arbitrary set of quantizers"); they are bought in the order of what a
# bit saves. The result is the least possible cost for the bits it takes.


def allocate(bits: list[list[int]], costs: list[list[float]], budget: int) -> list[int]:
    """The choice of every layer, given the `bits` and `costs` of each of its choices, within `budget` bits in all.

    Raises ValueError when the budget is below the sum of the cheapest choices.
    """
    hulls = [lower_hull(*layer) for layer in zip(bits, costs, strict=True)]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(own[choice] for own, choice in zip(bits, chosen, strict=True))
    if left < 0:
        raise ValueError(f"the budget of {budget} bits is below the least possible, {budget - left}")
    for layer, before, after in _steps(hulls, bits, costs):
        step = bits[layer][after] - bits[layer][before]
        if chosen[layer] == before and step <= left:
            chosen[layer] = after
            left -= step
    return chosen


def lower_hull(bits: list[int], costs: list[float]) -> list[int]:
    """Choices on the lower convex hull of (bits, cost), from the fewest bits to the least cost."""
    hull: list[int] = []
    for choice in sorted(range(len(bits)), key=lambda k: (bits[k], costs[k])):
        if hull and costs[choice] >= costs[hull[-1]]:
            continue
        while len(hull) > 1 and not _convex(bits, costs, hull[-2], hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _convex(bits: list[int], costs: list[float], a: int, b: int, c: int) -> bool:
    return (costs[a] - costs[b]) * (bits[c] - bits[b]) > (costs[b] - costs[c]) * (bits[b] - bits[a])


def _steps(hulls: list[list[int]], bits: list[list[int]], costs: list[list[float]]) -> list[tuple[int, int, int]]:
    """(layer, from, to) of every step along a hull, the most saving a bit first."""
    steps = [(layer, *pair) for layer, hull in enumerate(hulls) for pair in pairwise(hull)]

    def saving(step: tuple[int, int, int]) -> float:
        layer, a, b = step
        return (costs[layer][a] - costs[layer][b]) / (bits[layer][b] - bits[layer][a])

    return sorted(steps, key=saving, reverse=True)
