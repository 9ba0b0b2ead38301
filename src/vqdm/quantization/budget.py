"""Memory and disk of a quantization, phase by phase, from shapes alone: before it starts, within seconds.

Counted are tensors that are alive at once. Workspaces of libraries, and what an allocator wastes, are not.

Letters: O rows and I columns of a layer, A guidance branches.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import groupby

from vqdm.additive.solve import GAP_COLUMNS
from vqdm.devices import MatmulRates, Need
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import ROWS_PER_PRODUCT, VALUES_PER_PRODUCT, passes
from vqdm.diffusion.shapes import Shapes
from vqdm.quantization.allocation import FAST_STATE_BITS
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.plan import hessian_bytes

SUM, MEAN = 8, 4  # bytes of an entry of a Hessian: while it is accumulated, and as it is kept
SQUARES = 4  # matrices [I, I] that the solver makes at once in float32, beside two Hessians
GAP_SQUARES = 6  # that the gap to the bound takes instead, where a layer has one
WEIGHTS = {False: 6, True: 20}  # matrices [O, I] that it makes in float32: of additive codes, of trellis codes

# What takes as long as so many operations of matrix products, fitted to times on a CPU (benchmarks/RESULTS.md).
UNET_SHARE = 0.5  # of the rate of matrix products that a UNet reaches
ADDITIVE_SWEEPS = 200  # products with H that additive codes take
STATE_OPERATIONS = 20  # per weight and state of a trellis
TRELLIS_SWEEPS = 16  # products with H that trellis codes take
CUBES = 3  # I³ operations of factorizations per layer
PER_BACKWARD = 4  # calls' operations of a call with a backward pass and recomputed activations


def plan(
    config: QuantizeConfig,
    shapes: Shapes,
    groups: list[list[Layer]],
    all_kept: bool,
    prompts: tuple[int, int],
    rates: MatmulRates,
) -> list[Need]:
    """Return what every phase needs.

    Args:
        groups: layers by the input that they share.
        all_kept: whether the Hessians of all layers are recorded first, and kept.
        prompts: numbers of those for calibration and for evaluation.
    """
    layers = [layer for group in groups for layer in group]
    by_block = [list(some) for _, some in groupby(groups, key=lambda group: group[0].block)]
    in_block = [part for some in by_block for part in passes(some, config.hessian_memory_gb)]
    recorded = passes(groups, config.hessian_memory_gb) if all_kept else in_block
    batch = config.xtx_batch_size * shapes.step
    rows = max(sample_bytes(config, shapes, group[0].columns) for group in groups)
    sampling = max(shapes.text, shapes.vae + batch, shapes.decode)
    hessians = max(map(squares, recorded)) * (SUM + MEAN) + batch + rows
    hardest = max(solver_bytes(layer, config.code == "trellis") for layer in layers)
    solving = max(map(squares, in_block)) * 2 * MEAN + hardest
    changes = shapes.itemsize * sum(layer.rows * layer.columns for layer in layers)
    rest, kept = shapes.text + shapes.vae, hessian_bytes(groups, config.hessian_memory_gb, all_kept)
    times = seconds(config, shapes, groups, len(recorded), prompts, rates)
    needs = [
        Need("teacher", shapes.unet + sampling, rest + shapes.points, shapes.points),
        Need("hessians", shapes.unet + hessians, rest + shapes.points, shapes.points + kept),
        Need("layers", shapes.unet + solving, rest, shapes.points + kept),
        Need("evaluation", shapes.unet + sampling, rest + shapes.points, shapes.points + kept),
        Need("saving", shapes.unet, rest + shapes.unet, 2 * shapes.pipeline + shapes.points + kept),
    ]
    if config.target_bits is not None:
        # Backward with checkpointing: about one call's activations again, and a gradient.
        widest = max(layer.rows * layer.columns for layer in layers)
        effects = max(2 * (shapes.step + shapes.itemsize * widest), solving)
        needs.insert(2, Need("allocation", shapes.unet + effects, rest + changes + shapes.points, shapes.points + kept))
    return [replace(need, seconds=times.get(need.phase, 0.0)) for need in needs]


def seconds(
    config: QuantizeConfig,
    shapes: Shapes,
    groups: list[list[Layer]],
    recordings: int,
    prompts: tuple[int, int],
    rates: MatmulRates,
) -> dict[str, float]:
    """Return a guess of the seconds of each phase, at measured rates; reading and writing are left out.

    Args:
        recordings: passes over the calibration points in which Hessians are recorded.
    """
    calibration, evaluation = prompts
    steps = config.sampling.num_inference_steps or 50
    points = calibration * min(config.calibration_nsteps or steps, steps)
    call, decoding = shapes.step_flops / (UNET_SHARE * rates.model), shapes.decode_flops / (UNET_SHARE * rates.single)
    sampled = evaluation * (steps * call + decoding)
    products = sum(
        min(config.hessian_samples_per_input or math.inf, points * shapes.positions / group[0].columns)
        * group[0].columns ** 3
        for group in groups
    )
    layers = [layer for group in groups for layer in group]
    trellis = config.code == "trellis"
    coding = sum(coding_operations(layer, config.state_bits if trellis else None) for layer in layers)
    found = {
        "teacher": sampled,
        "hessians": (calibration * steps + recordings * points) * call + products / rates.single,
        "layers": coding / rates.single,
        "evaluation": sampled + evaluation * steps * call,
    }
    if trellis:  # effects are measured twice, with fast codes
        fast = sum(coding_operations(layer, FAST_STATE_BITS) for layer in layers)
        found["allocation"] = 2 * (config.sensitivity_points * PER_BACKWARD * call + fast / rates.single)
    return found


def coding_operations(layer: Layer, state_bits: int | None) -> float:
    """Return the operations, of matrix products that take as long, to quantize a layer; None for additive codes."""
    O, I = layer.rows, layer.columns  # noqa: E741
    if state_bits is None:
        return ADDITIVE_SWEEPS * O * I**2 + CUBES * I**3
    return STATE_OPERATIONS * 2**state_bits * O * I + TRELLIS_SWEEPS * O * I**2 + CUBES * I**3


def sample_bytes(config: QuantizeConfig, shapes: Shapes, columns: int) -> int:
    """Return the bytes of the samples of one batch that are multiplied at once, and of a strip of their product."""
    steps = config.sampling.num_inference_steps or 50
    points = 0.9 * (config.calibration_nsamples or 256) * min(config.calibration_nsteps or steps, steps)
    share = min(1.0, config.xtx_batch_size / points)
    rows = config.xtx_batch_size * shapes.positions
    if config.hessian_samples_per_input:
        rows = min(rows, int(config.hessian_samples_per_input * share * columns))
    values = min(rows * columns, VALUES_PER_PRODUCT)
    return (4 + shapes.itemsize) * values + 2 * 4 * columns * min(columns, ROWS_PER_PRODUCT)


def squares(groups: list[list[Layer]]) -> int:
    """Return the sum of I² over the inputs of a pass."""
    return sum(group[0].columns ** 2 for group in groups)


def solver_bytes(layer: Layer, trellis: bool) -> int:
    """Return the bytes that quantizing one layer takes beside its Hessians, with trellis or additive codes."""
    solver = SQUARES * layer.columns**2 + WEIGHTS[trellis] * layer.rows * layer.columns
    gap = GAP_SQUARES * layer.columns**2 if layer.columns <= GAP_COLUMNS else 0
    return 4 * max(solver, gap)


def smaller(config: QuantizeConfig) -> list[QuantizeConfig]:
    """Return the settings with smaller batches, then with less memory for Hessians too; the closest come first."""
    found, size, memory = [], config.xtx_batch_size, config.hessian_memory_gb
    while size > 1:
        size //= 2
        found.append(replace(config, xtx_batch_size=size))
    for k in range(1, 7):
        found.append(replace(config, xtx_batch_size=size, hessian_memory_gb=memory / 2**k))
    return found
