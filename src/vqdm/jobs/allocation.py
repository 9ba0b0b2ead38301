"""Bits where they matter: every layer's format for a given number of stored bits a weight.

Each layer is coded at two bits and the effect of that on the UNet's output is estimated; how errors fall with more bits
is measured on the rows that the shared codebooks are trained on. The budget then goes where a bit saves most.
"""

from __future__ import annotations

import math
import re
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from vqdm.additive.allocate import allocate
from vqdm.additive.code import Bank
from vqdm.additive.shared import encode, sample_error
from vqdm.diffusion.blocks import Layer, weight_of
from vqdm.diffusion.hessians import passes
from vqdm.diffusion.sensitivity import output_effects, spread_over_noise
from vqdm.documents import first_line, read_json
from vqdm.errors import RunError, UserError
from vqdm.jobs.banks import bank_path, draw_samples, load_codebooks, shared, train
from vqdm.jobs.job import Job
from vqdm.jobs.plan import bank_bits, bank_users, layer_bits
from vqdm.jobs.recording import teacher_trajectories, unet_calls
from vqdm.jobs.solving import solve_layers
from vqdm.storage.atomic import save_json
from vqdm.storage.hessians import HessianStore
from vqdm.storage.runs import layer_generator
from vqdm.tracking import bar, say

# (codebooks, bits of each) at groups of four, from 1 to 12 bits a weight. One large codebook is better than several
# small ones as long as training data and search allow it. The first is what effects are measured at.
MENU = ((1, 8), (1, 4), (1, 6), (1, 10), (1, 12), (2, 7), (2, 8), (2, 10), (3, 8), (4, 8), (6, 8))
GROUP = 4
PLAN = "plan.json"
PLANNED = ("num_codebooks", "nbits_per_codebook", "in_group_size", "shared_codebooks")


@dataclass(frozen=True)
class Choices:
    """What a layer can become.

    Attributes:
        layers: the layer in each format.
        bits: what each takes, banks aside.
        costs: the error that each is expected to add to the UNet's output, over the output's energy.
    """

    layers: list[Layer]
    bits: list[int]
    costs: list[float]

    def without(self, banks: Set[str]) -> Choices:
        """The choices that use none of `banks`."""
        kept = [k for k, layer in enumerate(self.layers) if layer.spec.shared_codebooks not in banks]
        return Choices(*([values[k] for k in kept] for values in (self.layers, self.bits, self.costs)))


def allocated(job: Job, store: HessianStore) -> list[Layer]:
    """The job's layers, those without an override in formats that together take `target_bits` a weight.

    The plan is written into the output folder, in the form that `--overrides` reads, and read again on resumption.
    Raises UserError when the target is below what the cheapest formats take.
    """
    path = job.folder.path / PLAN
    if not path.is_file():
        layers = divided(measured(job, store), job.config.target_bits)
        save_json({layer.name: {name: getattr(layer.spec, name) for name in PLANNED} for layer in layers}, path)
    return read_plan(path, job.layers)


def read_plan(path: Path, layers: list[Layer]) -> list[Layer]:
    """The layers in the formats of a plan.

    Raises:
        RunError: it is damaged, lacks a layer, or gives one a format that cannot be.
    """
    try:
        plan = read_json(path)
        planned = [replace(layer, spec=layer.spec.changed(**plan[layer.name])) for layer in layers]
        for layer in planned:
            layer.spec.check_shape(layer.rows, layer.columns)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({first_line(error)}); delete it and run again with --resume") from None
    return planned


# ------------------------------------------------------------------------------------------- measuring


def measured(job: Job, store: HessianStore) -> list[Choices]:
    """Every layer's choices; what it is now for those that an override speaks of."""
    free = [layer for layer in job.layers if not any(re.fullmatch(one, layer.name) for one in job.config.overrides)]
    options = {layer.name: formats(layer, job.config.share_codebooks) for layer in free}
    falls = {}
    for layers in bank_users([options[layer.name][0] for layer in free]).values():
        falls |= error_falls(job, store, layers)
    effects = layer_effects(job, store, [options[layer.name][0] for layer in free])
    return [
        _choices(options[layer.name], effects[layer.name], falls[layer.name])
        if layer.name in options
        else _choices([layer], 0.0, [1.0])
        for layer in job.layers
    ]


def formats(layer: Layer, how: str) -> list[Layer]:
    """The layer in every format of the menu."""
    own = layer.spec.changed(in_group_size=GROUP, shared_codebooks="")
    specs = [own.changed(num_codebooks=M, nbits_per_codebook=b) for M, b in MENU]
    return [shared(replace(layer, spec=spec), how) for spec in specs]


def _choices(options: list[Layer], effect: float, falls: list[float]) -> Choices:
    return Choices(options, [layer_bits(option) for option in options], [effect * fall for fall in falls])


def error_falls(job: Job, store: HessianStore, layers: list[Layer]) -> dict[str, list[float]]:
    """By layer name, the relative error in every format of the menu over that in the first.

    Trains the banks. Layers that these are not trained on get the others' geometric mean.
    """
    samples = draw_samples(job, store, layers, job.config.solver.with_spec(layers[0].spec))
    errors = []
    for option in formats(layers[0], job.config.share_codebooks):
        config = job.config.solver.with_spec(option.spec)
        name = option.spec.shared_codebooks
        codebooks = load_codebooks(job, name) if bank_path(job, name).is_file() else train(job, config, samples)
        errors.append([sample_error(sample, encode(sample, codebooks, config)) for sample in samples.values()])
    falls = [[error / max(first, 1e-30) for error, first in zip(row, errors[0], strict=True)] for row in errors]
    usual = [math.exp(sum(math.log(max(fall, 1e-9)) for fall in row) / len(row)) for row in falls]
    own = dict(zip(samples, map(list, zip(*falls, strict=True)), strict=True))
    return {layer.name: own.get(layer.name, usual) for layer in layers}


def layer_effects(job: Job, store: HessianStore, layers: list[Layer]) -> dict[str, float]:
    """By layer name, the UNet's relative output error when this layer alone is coded."""
    trajectories = teacher_trajectories(job)
    points = spread_over_noise(trajectories, job.config.sensitivity_points)
    say(f"effects of {len(layers)} layers on the output, at {len(points)} points")
    changes = coding_errors(job, store, layers)
    calls = [call for point in points for call in unet_calls(job, trajectories, [point])]
    with bar(total=len(calls), what="effects of layers") as progress:
        return output_effects(job.unet, changes, calls, layer_generator(job.config.seed, "effects"), progress.update)


def coding_errors(job: Job, store: HessianStore, layers: list[Layer]) -> dict[str, Tensor]:
    """By layer name, coded minus original weight, in the weight's shape and type; one pass of error feedback."""
    banks = {name: Bank(load_codebooks(job, name), 1) for name in bank_users(layers)}
    solver, changes = replace(job.config.solver, max_epochs=1), {}
    for groups in passes(store.groups(layers), job.config.hessian_memory_gb):
        hessians = {group[0].name: store.load(group[0], job.unet.device) for group in groups}
        for layer, (code, _) in solve_layers(job, groups, hessians, solver, banks):
            weight = job.unet.get_submodule(layer.name).weight
            coded = weight_of(code.dequantize(), weight.shape, layer.spec.group_channels)
            changes[layer.name] = (coded - weight.float()).to(weight.dtype)
    return {layer.name: changes[layer.name] for layer in layers}


# ------------------------------------------------------------------------------------------- dividing


def divided(choices: list[Choices], target_bits: float) -> list[Layer]:
    """The layers in formats that take at most `target_bits` a weight, banks included, at the least summed cost.

    Banks whose own bits are better spent on codes are left out, one after another. Raises UserError when even the
    cheapest formats take more.
    """
    banks = {name: bank_bits(of) for name, of in bank_users([o for one in choices for o in one.layers]).items()}
    dropped: set[str] = set()
    cost, layers = _divided(choices, banks, target_bits)
    while len(dropped) < len(banks) - 1:
        tries = {name: _divided(choices, banks, target_bits, {*dropped, name}) for name in banks if name not in dropped}
        name = min(tries, key=lambda one: (tries[one][0], -banks[one]))
        if tries[name][0] >= cost < math.inf:
            break
        dropped.add(name)
        cost, layers = tries[name]
    if not layers:
        least = sum(min(one.bits) for one in choices) / _weights([one.layers[0] for one in choices])
        raise UserError(f"--target_bits {target_bits} is too low: codes and scales alone take {least:.3f}")
    decibels = 10 * math.log10(max(cost, 1e-12))
    say(f"plan: {_stored(layers):.3f} bits a weight, expected UNet-output error {decibels:.1f} dB")
    return layers


def _divided(
    choices: list[Choices], banks: dict[str, int], target_bits: float, dropped: Set[str] = frozenset()
) -> tuple[float, list[Layer]]:
    """Cost and layers without the banks that are dropped; infinite and empty where the target cannot be met."""
    left = [one.without(dropped) for one in choices]
    if not all(one.layers for one in left):
        return math.inf, []
    paid = sum(bits for name, bits in banks.items() if name not in dropped)
    budget = int(target_bits * _weights([one.layers[0] for one in left])) - paid
    try:
        chosen = allocate([one.bits for one in left], [one.costs for one in left], budget)
    except ValueError:
        return math.inf, []
    picked = list(zip(left, chosen, strict=True))
    return sum(one.costs[k] for one, k in picked), [one.layers[k] for one, k in picked]


def _weights(layers: list[Layer]) -> int:
    return sum(layer.rows * layer.columns for layer in layers)


def _stored(layers: list[Layer]) -> float:
    return (sum(map(layer_bits, layers)) + bank_bits(layers)) / _weights(layers)
