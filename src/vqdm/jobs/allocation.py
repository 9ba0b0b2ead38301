"""Bits where they matter: every layer's format for a given number of stored bits a weight.

Each layer is coded at two bits and the effect of that on the UNet's output is estimated; how errors fall with more bits
is measured on the rows that the shared codebooks are trained on (`jobs.menu`). The budget then goes where a bit saves
most.
"""

from __future__ import annotations

import math
import re
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from vqdm.additive.allocate import allocate
from vqdm.additive.code import AdditiveCode, Bank
from vqdm.diffusion.blocks import Layer, weight_of
from vqdm.diffusion.hessians import passes
from vqdm.diffusion.sensitivity import output_effects, spread_over_noise
from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.jobs.banks import load_codebooks
from vqdm.jobs.job import Job
from vqdm.jobs.menu import error_falls, formats, usual_format
from vqdm.jobs.pieces import Tensors, read
from vqdm.jobs.plan import bank_bits, bank_users, layer_bits
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
    "row_bits",
)


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
    path = job.folder.work / PLAN
    if not job.ranks.agreed(path.is_file()):
        layers = divided(measured(job, store), job.config.target_bits)
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


# ------------------------------------------------------------------------------------------- measuring


def measured(job: Job, store: HessianStore) -> list[Choices]:
    """Every layer's choices; what it is now for those that an override speaks of."""
    free = [layer for layer in job.layers if not any(re.fullmatch(one, layer.name) for one in job.config.overrides)]
    usual = [usual_format(layer, job.config.share_codebooks) for layer in free]
    falls = {}
    for layers in bank_users(usual).values():
        falls |= error_falls(job, store, layers)
    effects = layer_effects(job, store, usual)
    return [
        _choices(formats(layer, job.config.share_codebooks), effects[layer.name], falls[layer.name])
        if layer.name in effects
        else _choices([layer], 0.0, [1.0])
        for layer in job.layers
    ]


def _choices(options: list[Layer], effect: float, falls: list[float]) -> Choices:
    return Choices(options, [layer_bits(option) for option in options], [effect * fall for fall in falls])


def layer_effects(job: Job, store: HessianStore, layers: list[Layer]) -> dict[str, float]:
    """By layer name, the UNet's relative output error when this layer alone is coded."""
    trajectories = teacher_trajectories(job)
    points = spread_over_noise(trajectories, job.config.sensitivity_points)
    say(f"effects of {len(layers)} layers on the output, at {len(points)} points")
    changes = coding_errors(job, store, layers)
    calls = [call for point in points for call in unet_calls(job, trajectories, [point])]
    generator = lambda index: layer_generator(job.config.seed, f"effects:{index}")  # noqa: E731
    with bar(total=len(job.ranks.share(calls)), what="effects of layers") as progress:
        return output_effects(job.unet, changes, calls, generator, progress.update, job.ranks)


def coding_errors(job: Job, store: HessianStore, layers: list[Layer]) -> dict[str, Tensor]:
    """By layer name, coded minus original weight, in the weight's shape and type; one pass of error feedback.

    Ranks share the layers, and find each other's codes in the run's folder.
    """
    banks = {name: Bank(load_codebooks(job, name), 1) for name in bank_users(layers)}
    solver, folder = replace(job.config.solver, max_epochs=1), job.folder.work / "coded"
    missing = job.ranks.agreed([layer for layer in layers if not (folder / f"{layer.name}.safetensors").is_file()])
    for groups in passes(store.groups(missing), job.config.hessian_memory_gb):
        some = [layer for group in groups for layer in group]
        for layer, code, _ in solve_share(job, store, some, solver, banks):
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
        raise UserError(_too_low(choices, banks, target_bits))
    decibels = 10 * math.log10(max(cost, 1e-12))
    say(f"plan: {_stored(layers):.3f} bits a weight, expected UNet-output error {decibels:.1f} dB")
    return layers


def _too_low(choices: list[Choices], banks: dict[str, int], target_bits: float) -> str:
    """Why a target cannot be met, and what to do: codes and scales take more, or the shared codebooks do."""
    weights = _weights([one.layers[0] for one in choices])

    def least(dropped: Set[str]) -> tuple[float, float]:
        """Bits of the cheapest formats, all together and those of the codebooks; infinite where a layer has none."""
        left = [one.without(dropped) for one in choices]
        paid = sum(bits for name, bits in banks.items() if name not in dropped)
        coded = sum(min(one.bits) for one in left) if all(one.layers for one in left) else math.inf
        return coded + paid, paid

    dropped: set[str] = set()
    while len(dropped) < len(banks):
        name = min((one for one in banks if one not in dropped), key=lambda one: least({*dropped, one}))
        if least({*dropped, name})[0] >= least(dropped)[0]:
            break
        dropped.add(name)
    whole, paid = (bits / weights for bits in least(dropped))
    alone = sum(min(one.bits) for one in choices) / weights
    words = f"--target_bits {target_bits} is too low:"
    if alone > target_bits:
        return f"{words} codes and scales alone take {alone:.3f} bits per weight; choose {whole:.3f} or more"
    sharing = "" if all(name.startswith("unet") for name in banks) else "--share_codebooks unet, "
    return (
        f"{words} shared codebooks take {paid:.3f} bits per weight of so few weights, "
        f"and codes and scales {whole - paid:.3f}; choose {sharing}more layers (--layer_filter), or {whole:.3f} or more"
    )


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
