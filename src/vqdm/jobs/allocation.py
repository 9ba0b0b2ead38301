"""Bit allocation: every layer's bits for a given number of stored bits per weight, as trellis codes.

What a layer's error will be at any bits is known from its Hessian (`additive.trellis_solve`); what that error does to
the UNet's output is measured by backward passes with the layers coded at `FIRST_BITS`, and measured again at the bits
that were chosen from it, since effects are first-order. One price of a bit then divides the budget over all columns of
all layers: each takes the width at which the next unit would save less than its price.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vqdm.additive.code import AdditiveCode, Bank, CodeSpec
from vqdm.additive.trellis import UNITS, segment_rows
from vqdm.additive.trellis_solve import Demand, Share, layer_demand, price_for, rates
from vqdm.diffusion.blocks import Layer, matrix_of, weight_of
from vqdm.diffusion.hessians import passes
from vqdm.diffusion.sensitivity import output_effects, spread_over_noise
from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.jobs.banks import trellis_bank, trellis_codebooks
from vqdm.jobs.job import Job
from vqdm.jobs.pieces import Tensors, read
from vqdm.jobs.plan import bank_bits, layer_bits
from vqdm.jobs.recording import teacher_trajectories, unet_calls
from vqdm.jobs.solving import solve_share
from vqdm.storage.atomic import Damaged, load_sealed_json, save_json, save_sealed, save_sealed_json
from vqdm.storage.hessians import HessianStore
from vqdm.storage.runs import layer_generator
from vqdm.tracking import bar, say

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
FAST_STATE_BITS = 8  # of the codes that effects are measured with: within half a decibel, at a tenth of the time


def trellis_layer(layer: Layer, state_bits: int, bits: float, exponent: int = 0) -> Layer:
    """The layer as a trellis code of about `bits` per weight."""
    T = segment_rows(layer.rows)
    spec = CodeSpec(
        num_codebooks=1,
        nbits_per_codebook=state_bits,
        in_group_size=1,
        group_channels=layer.spec.group_channels,
        input_channel_scales=True,
        shared_codebooks=trellis_bank(state_bits),
        segment_rows=T,
        segment_bits=round(bits * layer.columns) * T,
        log_scales=True,
        scale_exponent=exponent,
    )
    return replace(layer, spec=spec)


def allocated(job: Job, store: HessianStore) -> list[Layer]:
    """The job's layers, those without an override with bits that together take `target_bits` per weight.

    The plan is written into the output folder, in the form that `--overrides` reads, and read again on resumption.
    Raises UserError when the target is below what the least bits of every layer take.
    """
    path = job.folder.work / PLAN
    if not job.ranks.agreed(path.is_file()):
        layers = planned_layers(job, store)
        plan = {layer.name: {name: getattr(layer.spec, name) for name in PLANNED} for layer in layers}
        if job.ranks.main:
            save_sealed_json(plan, path)
    plan = job.ranks.agreed(read_plan(path) if job.ranks.main else None)
    if job.ranks.main:
        save_json(plan, job.folder.path / PLAN)
    return planned(job.layers, plan, path)


def read_plan(path: Path) -> dict[str, dict]:
    """What the run has decided. Raises RunError when the file is damaged."""
    try:
        return load_sealed_json(path)
    except Damaged as error:
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
    free = [layer for layer in job.layers if not overridden(job, layer)]
    demands = layer_demands(job, store, free)
    exponents = {layer.name: scale_exponent(job, layer) for layer in free}
    chosen = [
        trellis_layer(layer, FAST_STATE_BITS, min(FIRST_BITS, job.config.target_bits), exponents[layer.name])
        for layer in free
    ]
    for name in ("first", "second"):
        fast = [with_state_bits(layer, FAST_STATE_BITS) for layer in chosen]
        effects = layer_effects(job, store, fast, name)
        costs = {layer.name: cost_per_error(demands[layer.name], layer, effects[layer.name]) for layer in fast}
        full = [with_state_bits(layer, job.config.state_bits) for layer in chosen]
        chosen, expected = divide(job, full, demands, costs)
        decibels = 10 * math.log10(max(expected, 1e-12))
        say(f"plan by the {name} effects: expected UNet-output error {decibels:.1f} dB")
    found = {layer.name: layer for layer in chosen}
    return [found.get(layer.name, layer) for layer in job.layers]


def overridden(job: Job, layer: Layer) -> bool:
    """Whether an override says what the layer becomes."""
    return any(re.fullmatch(pattern, layer.name) for pattern in job.config.overrides)


def with_state_bits(layer: Layer, state_bits: int) -> Layer:
    """The layer as a trellis code with other states."""
    most = layer.columns * state_bits * layer.spec.segment_rows
    changes = {"nbits_per_codebook": state_bits, "shared_codebooks": trellis_bank(state_bits)}
    return replace(layer, spec=layer.spec.changed(**changes, segment_bits=min(layer.spec.segment_bits, most)))


def scale_exponent(job: Job, layer: Layer) -> int:
    """The octave of the layer's weights: stored logarithms of scales count from there."""
    rms = job.unet.get_submodule(layer.name).weight.detach().float().square().mean().sqrt().item()
    return max(-256, min(256, round(math.log2(rms)))) if rms > 0 else 0


def layer_demands(job: Job, store: HessianStore, layers: list[Layer]) -> dict[str, Demand]:
    """By name, what every layer needs of bits; ranks share the work."""

    def demand(layer: Layer) -> Demand:
        weight = matrix_of(job.unet.get_submodule(layer.name), layer.spec.group_channels).float()
        some = trellis_layer(layer, job.config.state_bits, FIRST_BITS).spec
        found = layer_demand(weight, store.load(layer, weight.device)[0], some).to("cpu")
        progress.update()
        return found

    with bar(total=len(job.ranks.share(layers)), what="rate-distortion curves") as progress:
        return dict(zip([layer.name for layer in layers], job.ranks.each(layers, demand), strict=True))


# ------------------------------------------------------------------------------------------- effects


def layer_effects(job: Job, store: HessianStore, layers: list[Layer], name: str) -> dict[str, float]:
    """By layer name, the UNet's relative output error when this layer alone is coded as it is here."""
    trajectories = teacher_trajectories(job)
    points = spread_over_noise(trajectories, job.config.sensitivity_points)
    say(f"effects of {len(layers)} layers on the output, at {len(points)} points")
    changes = coding_errors(job, store, layers, name)
    calls = [call for point in points for call in unet_calls(job, trajectories, [point])]
    generator = lambda index: layer_generator(job.config.seed, f"effects:{index}")  # noqa: E731
    with bar(total=len(job.ranks.share(calls)), what="effects of layers") as progress:
        return output_effects(job.unet, changes, calls, generator, progress.update, job.ranks)


def coding_errors(job: Job, store: HessianStore, layers: list[Layer], name: str) -> dict[str, Tensor]:
    """By layer name, coded minus original weight, in the weight's shape and type.

    Ranks share the layers, and find each other's codes in the run's folder under `name`.
    """
    bank = Bank(trellis_codebooks(FAST_STATE_BITS).to(job.unet.device), 1)
    banks, folder = {trellis_bank(FAST_STATE_BITS): bank}, job.folder.work / f"coded_{name}"
    missing = job.ranks.agreed([layer for layer in layers if not (folder / f"{layer.name}.safetensors").is_file()])
    for groups in passes(store.groups(missing), job.config.hessian_memory_gb):
        some = [layer for group in groups for layer in group]
        for layer, code, _ in solve_share(job, store, some, job.config.solver, banks):
            save_sealed(code.pack(), folder / f"{layer.name}.safetensors")
    job.ranks.wait()
    return {layer.name: coding_error(job, layer, read(folder / f"{layer.name}.safetensors"), banks) for layer in layers}


def coding_error(job: Job, layer: Layer, packed: Tensors, banks: dict[str, Bank]) -> Tensor:
    """Coded minus original weight of one layer, from its packed code."""
    weight, bank = job.unet.get_submodule(layer.name).weight, banks[layer.spec.shared_codebooks]
    packed = {name: tensor.to(weight.device) for name, tensor in packed.items()}
    code = AdditiveCode.unpack(layer.spec, (layer.rows, layer.columns), packed, bank.codebooks)
    coded = weight_of(code.dequantize(), weight.shape, layer.spec.group_channels)
    return (coded - weight.float()).to(weight.dtype)


def cost_per_error(demand: Demand, layer: Layer, effect: float) -> float:
    """What a unit of a layer's expected error costs at the output, by its effect as it is coded here."""
    known = rates(layer.spec.segment_rows, layer.spec.nbits_per_codebook)
    share = Share(demand.errors(known), known.widths)
    picks = share.picks(price_for([share], UNITS * layer.spec.segment_bits / layer.spec.segment_rows))
    expected = share.errors.gather(1, picks[:, None]).sum().item()
    return effect / expected if expected > 0 else 0.0


# ------------------------------------------------------------------------------------------- dividing


def divide(
    job: Job, layers: list[Layer], demands: dict[str, Demand], costs: dict[str, float]
) -> tuple[list[Layer], float]:
    """The layers with the bits that cost the least at the output, and that cost, for the job's target.

    Raises:
        UserError: the least bits of every layer take more than the target.
    """
    shares = []
    for layer in layers:
        known = rates(layer.spec.segment_rows, layer.spec.nbits_per_codebook)
        share = Share(demands[layer.name].errors(known) * costs[layer.name], known.widths, layer.rows / UNITS)
        shares.append(share.with_least(LEAST_BITS * layer.rows * layer.columns))
    free = {layer.name for layer in layers}
    fixed = [layer for layer in job.layers if layer.name not in free]
    weights = sum(layer.rows * layer.columns for layer in job.layers)
    empty = [replace(layer, spec=layer.spec.changed(segment_bits=0)) for layer in layers]
    aside = sum(map(layer_bits, fixed + empty)) + bank_bits(fixed + layers)
    budget = job.config.target_bits * weights - aside
    least = sum(share.taken(math.inf) for share in shares)
    if budget < least:
        raise UserError(
            f"--target_bits {job.config.target_bits} is too low: at {LEAST_BITS:g} bit per weight in every layer, with "
            f"scales and the shared codebooks, the layers take {(least + aside) / weights:.3f}"
        )
    price = price_for(shares, budget)
    chosen, expected = [], 0.0
    for layer, share in zip(layers, shares, strict=True):
        picks = share.picks(price)
        total = int(share.widths[picks].sum())
        expected += share.errors.gather(1, picks[:, None]).sum().item()
        chosen.append(replace(layer, spec=layer.spec.changed(segment_bits=total * layer.spec.segment_rows // UNITS)))
    return chosen, expected
