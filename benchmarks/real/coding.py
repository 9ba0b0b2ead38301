"""The layers of a trained model as vqdm codes them: at one rate, or with bits divided as by `--target_bits`.

Bits are all that is stored: codes, widths, scales, and shared tables over the weights that share them. Seconds are of
the processor.

Letters: O rows, I columns; L bits of a state.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from real.problems import Problem, decibels
from real.quantizers import Quantizer, matrix
from torch import Tensor

from vqdm.additive.code import CodeSpec, SharedCodebooks, stored_bits
from vqdm.additive.codebooks import weighted_error
from vqdm.additive.solve import SolverConfig, Task, solve_layers
from vqdm.additive.trellis_solve import LEAST_ERROR, Curve, layer_curves
from vqdm.diffusion.blocks import Layer, weight_of
from vqdm.quantization.allocation import FIRST_BITS, corrected, divide, trellis_layer, width_total
from vqdm.quantization.config import FAST_STATE_BITS
from vqdm.quantization.shared_codebooks import sample_layer, train_shared_codebooks, trellis_codebooks

ADDITIVE = {2: (8, 4), 3: (6, 2), 4: (8, 2)}  # bits per weight → bits of a code, columns of a group
BANK_GROUPS = 2**15  # that shared codebooks are trained on, and
GROUPS_PER_ENTRY = 32  # of them at least


def as_layer(name: str, W: Tensor, state_bits: int, bits: float) -> Layer:
    """A layer of W [O, I] as a trellis code of about `bits` per weight."""
    exponent = round(math.log2(W.square().mean().sqrt().item()))
    return trellis_layer(Layer(name, "", "linear", *W.shape, CodeSpec()), state_bits, bits, exponent)


def additive_config(bits: int) -> SolverConfig:
    """The format of constant rate with one shared codebook."""
    width, group = ADDITIVE[bits]
    return SolverConfig(CodeSpec(1, width, group, shared_codebooks="shared"))


def sampled_rows(spec: CodeSpec, columns: int) -> int:
    """Rows of each layer that a shared codebook is trained on, given the columns of all layers together."""
    return max(8, max(BANK_GROUPS, GROUPS_PER_ENTRY * spec.entries) * spec.in_group_size // columns)


@dataclass(frozen=True)
class Coded:
    """Layers as they are decoded.

    Attributes:
        weights: by layer name, [O, I].
        errors: by layer name, relative errors on H as the code was asked to judge them, with weights of rows.
        bits: stored bits of all layers with the tables that they share.
        seconds: CPU seconds.
    """

    weights: dict[str, Tensor]
    errors: dict[str, float]
    bits: int
    seconds: float


def coded_layers(
    problem: Problem, configs: dict[str, SolverConfig], codebooks: Tensor, roots: dict[str, Tensor], seed: int
) -> Coded:
    """All layers with one set of shared codebooks; `roots`: by layer name, what errors of its rows are scaled by."""
    weights, errors, bits, started = {}, {}, 16 * codebooks.numel(), time.process_time()
    for name, W in problem.weights.items():
        root = roots.get(name, torch.ones(len(W)))[:, None]
        generator = torch.Generator().manual_seed(seed)
        task = Task(W * root, problem.hessians[name], configs[name], generator, None, SharedCodebooks(codebooks, 1))
        [(code, report)] = solve_layers([task])
        weights[name], errors[name] = code.dequantize() / root, report.error
        bits += stored_bits(code.pack())
    return Coded(weights, errors, bits, time.process_time() - started)


def trellis_coded(problem: Problem, layers: list[Layer], roots: dict[str, Tensor], seed: int) -> Coded:
    """The layers as trellis codes of one number of state bits."""
    configs = {layer.name: SolverConfig(layer.spec) for layer in layers}
    return coded_layers(problem, configs, trellis_codebooks(layers[0].spec.nbits_per_codebook), roots, seed)


def additive_coded(problem: Problem, bits: int, seed: int) -> Coded:
    """All layers with a shared codebook of their own; its training is part of the seconds."""
    config, generator, started = additive_config(bits), torch.Generator().manual_seed(seed), time.process_time()
    columns = sum(W.shape[1] for W in problem.weights.values())
    rows = sampled_rows(config.spec, columns)
    samples = [sample_layer(W, problem.hessians[name], rows, config, generator) for name, W in problem.weights.items()]
    codebooks = train_shared_codebooks(samples, config, generator)
    found = coded_layers(problem, dict.fromkeys(problem.weights, config), codebooks, {}, seed)
    return replace(found, seconds=time.process_time() - started)


def published_coded(problem: Problem, spec: CodeSpec, seed: int) -> Coded:
    """All layers by the published procedure (arXiv 2409.00492): additive codes of their own codebooks, beam search."""
    config = SolverConfig(spec, encoder="beam")
    weights, errors, bits, started = {}, {}, 0, time.process_time()
    for name, W in problem.weights.items():
        task = Task(W, problem.hessians[name], config, torch.Generator().manual_seed(seed))
        with torch.enable_grad():  # of its Adam
            [(code, report)] = solve_layers([task])
        weights[name], errors[name] = code.dequantize(), report.error
        bits += stored_bits(code.pack())
    return Coded(weights, errors, bits, time.process_time() - started)


def quantizer_coded(problem: Problem, quantizer: Quantizer) -> Coded:
    """All layers by another method."""
    weights, bits, started = {}, 0, time.process_time()
    for name, W in problem.weights.items():
        shape = problem.model.get_submodule(name).weight.shape
        found, size = quantizer(weight_of(W, shape, True), problem.hessians[name])
        weights[name], bits = matrix(found), bits + size
    return Coded(weights, {}, bits, time.process_time() - started)


def error_row(problem: Problem, coded: Coded) -> dict:
    """Stored bits, errors on held-out inputs of the layers and of the model's output with these coded; seconds."""
    errors = []
    for name, W in problem.weights.items():
        H = problem.held_out[name]
        errors.append(weighted_error(W - coded.weights[name], H).item() / weighted_error(W, H).item())
    return {
        "stored_bits": round(coded.bits / problem.count, 4),
        "layers": len(errors),
        "held_out_db_median": decibels(median(errors)),
        "held_out_db_worst": decibels(max(errors)),
        **problem.output_errors(coded.weights),
        "cpu_seconds": round(coded.seconds, 1),
    }


def prediction_row(layers: list[Layer], curves: dict[str, Curve], coded: Coded) -> dict:
    """How far predicted errors are from those that coding gave."""
    return off_row([off_db(curves[layer.name], layer, coded.errors[layer.name]) for layer in layers])


def off_db(curve: Curve, layer: Layer, error: float) -> float:
    """By how much the predicted error is above that of coding."""
    return decibels(curve.at(np.array([width_total(layer)])).item()) - decibels(error)


def off_row(off: list[float]) -> dict:
    return {
        "prediction_within_half_db": round(sum(abs(one) <= 0.5 for one in off) / len(off), 3),
        "prediction_off_db_median": round(median(off), 2),
        "prediction_off_db_worst": round(max(off, key=abs), 2),
    }


@dataclass(frozen=True)
class Divider:
    """Bits divided among layers as `--target_bits` divides them: effects at two bits, and again at those found.

    Attributes:
        curves: by layer name, errors expected at any bits, corrected by the first coding.
        fast_curves: those expected with `FAST_STATE_BITS`, as they are.
        first: the layers coded at `FIRST_BITS`.
        effects: of these, by layer name.
        seconds: CPU seconds of all that.
    """

    problem: Problem
    state_bits: int
    roots: dict[str, Tensor]
    seed: int
    curves: dict[str, Curve]
    fast_curves: dict[str, Curve]
    first: Coded
    effects: dict[str, float]
    seconds: float

    @classmethod
    def of(cls, problem: Problem, state_bits: int, roots: dict[str, Tensor], seed: int) -> Divider:
        started = time.process_time()
        curves, fast_curves = trellis_curves(problem, state_bits, roots)
        fast = [as_layer(name, W, FAST_STATE_BITS, FIRST_BITS) for name, W in problem.weights.items()]
        first = trellis_coded(problem, fast, roots, seed)
        effects = problem.effects(first.weights, seed)
        curves = corrected(curves, fast_curves, fast, first.errors)
        seconds = time.process_time() - started
        return cls(problem, state_bits, roots, seed, curves, fast_curves, first, effects, seconds)

    def rows(self, target: float) -> tuple[Coded, dict]:
        """The layers at a target, and a row about them."""
        problem, started = self.problem, time.process_time()
        chosen, _ = self._divided(target, self.curves, self.first, self.effects)
        bits = {layer.name: layer.spec.code_bits_per_weight(layer.columns) for layer in chosen}
        fast = [as_layer(name, W, FAST_STATE_BITS, bits[name]) for name, W in problem.weights.items()]
        again = trellis_coded(problem, fast, self.roots, self.seed)
        curves = corrected(self.curves, self.fast_curves, fast, again.errors)
        chosen, expected = self._divided(target, curves, again, problem.effects(again.weights, self.seed))
        coded = trellis_coded(problem, chosen, self.roots, self.seed)
        coded = replace(coded, seconds=self.seconds + time.process_time() - started)
        bits = [layer.spec.code_bits_per_weight(layer.columns) for layer in chosen]
        row = error_row(problem, coded) | spread(bits)
        return coded, row | {"expected_db": decibels(expected)} | prediction_row(chosen, curves, coded)

    def _divided(
        self, target: float, curves: dict[str, Curve], coded: Coded, effects: dict[str, float]
    ) -> tuple[list[Layer], float]:
        full = [as_layer(name, W, self.state_bits, FIRST_BITS) for name, W in self.problem.weights.items()]
        costs = {name: effect / max(coded.errors[name], LEAST_ERROR) for name, effect in effects.items()}
        job = SimpleNamespace(layers=full, config=SimpleNamespace(target_bits=target))
        return divide(job, full, curves, costs)


def spread(bits: list[float]) -> dict:
    """The least and most bits per weight of a layer, and the deciles at both ends."""
    ends = np.quantile(bits, [0, 0.1, 0.9, 1]).round(2).tolist()
    return {"layer_bits": ends[::3], "layer_bits_deciles": ends[1:3]}


def trellis_curves(
    problem: Problem, state_bits: int, roots: dict[str, Tensor]
) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """By layer name, the errors expected at any bits, and those expected with `FAST_STATE_BITS`."""
    full, fast = {}, {}
    for name, W in problem.weights.items():
        spec, other = (as_layer(name, W, L, FIRST_BITS).spec for L in (state_bits, FAST_STATE_BITS))
        weighted = W * roots.get(name, torch.ones(len(W)))[:, None]
        full[name], fast[name] = layer_curves(weighted, problem.hessians[name], spec, [other])
    return full, fast
