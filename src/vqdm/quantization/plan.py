"""Plan a quantization before it starts, within seconds: layers and bits; memory, disk and time, phase by phase.

Counted are tensors that are alive at once. Workspaces of libraries, and what an allocator wastes, are not.

Letters: O rows and I columns of a layer, A guidance branches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import nn

from vqdm.additive.solve import GAP_COLUMNS
from vqdm.devices import MatmulRates, Need
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.denoisers import compute_dtype
from vqdm.diffusion.hessians import ROWS_PER_PRODUCT, VALUES_PER_PRODUCT, passes
from vqdm.diffusion.shapes import Shapes
from vqdm.errors import UserError
from vqdm.quantization.config import FAST_STATE_BITS, QuantizeConfig

SUM, MEAN = 8, 4  # bytes of an entry of a Hessian: while it is accumulated, and as it is kept
SQUARES = 4  # matrices [I, I] that the solver makes at once in float32, beside two Hessians
GAP_SQUARES = 6  # that the gap to the bound takes instead, where a layer has one
WEIGHTS = {False: 6, True: 20}  # matrices [O, I] that it makes in float32: of additive codes, of trellis codes

# What takes as long as so many operations of matrix products, fitted to times on a CPU (benchmarks/RESULTS.md).
ADDITIVE_SWEEPS = 200  # products with H that additive codes take
STATE_OPERATIONS = 20  # per weight and state of a trellis
TRELLIS_SWEEPS = 16  # products with H that trellis codes take
CUBES = 3  # I³ operations of factorizations per layer
PER_BACKWARD = 4  # calls' operations of a call with a backward pass and recomputed activations


# ------------------------------------------------------------------------------------------------------ layers and bits


def shared_codebook_users(layers: list[Layer]) -> dict[str, list[Layer]]:
    """Return by name of shared codebooks the layers that use them, in their order."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.spec.shared_codebooks:
            found.setdefault(layer.spec.shared_codebooks, []).append(layer)
    return found


def shared_codebook_bits(layers: list[Layer]) -> int:
    """Return the bits of all shared codebooks of the layers."""
    return sum(16 * torch.Size(of[0].spec.codebooks_shape).numel() for of in shared_codebook_users(layers).values())


def layer_bits(layer: Layer) -> int:
    """Return the bits that a layer will take, without its bias."""
    shapes = layer.spec.tensor_shapes(layer.rows, layer.columns).values()
    return sum(8 * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes)


@dataclass(frozen=True)
class Int8Totals:
    """The layers that become int8: how many, their weights, and the bits of these."""

    layers: int = 0
    weights: int = 0
    bits: int = 0

    @classmethod
    def of(cls, denoiser: nn.Module, names: list[str]) -> Int8Totals:
        weights = [denoiser.get_submodule(name).weight for name in names]
        sizes = [weight.numel() for weight in weights]
        return cls(len(names), sum(sizes), 8 * sum(sizes) + 16 * sum(map(len, weights)))


def plain_bits(denoiser: nn.Module, stored: torch.dtype | None) -> int:
    """Return the bits of a value that stays plain: of the type computed in, or of a narrower one of its files."""
    computed = compute_dtype(denoiser).itemsize
    return 8 * (min(computed, stored.itemsize) if stored else computed)


def layer_table(layers: list[Layer], parameters: int, int8: Int8Totals, plain: int) -> str:
    """Format one line per layer: shape, code and stored bits per weight; then the totals and the predicted size.

    Args:
        parameters: number of those of the whole model.
        int8: what becomes int8.
        plain: bits of every other value.
    """
    width = max(len(layer.name) for layer in layers)
    lines = [f"{'layer':{width}}  kind    rows × columns    code      stored bits per weight"]
    for layer in layers:
        spec, weights = layer.spec, layer.rows * layer.columns
        code = f"{spec.num_codebooks}x{spec.nbits_per_codebook} g{spec.in_group_size}"
        if spec.is_trellis:
            code = f"trellis {spec.nbits_per_codebook}"
        shape = f"{layer.rows:5d} × {layer.columns:<7d}"
        lines.append(f"{layer.name:{width}}  {layer.kind:6s} {shape}  {code:10s} {layer_bits(layer) / weights:6.3f}")
    if int8.layers:
        each = int8.bits / int8.weights
        lines.append(f"{int8.layers} other layers, {int8.weights / 1e6:.2f} M weights: {each:.3f} bits each")
    lines.append(totals(layers, parameters, int8, plain, sum(map(layer_bits, layers)) + shared_codebook_bits(layers)))
    return "\n".join(lines)


def totals(layers: list[Layer], parameters: int, int8: Int8Totals, plain: int, bits: float) -> str:
    """Format the last line of the table, for layers that take `bits` together; also before bits are allocated."""
    weights, whole = (
        sum(layer.rows * layer.columns for layer in layers),
        whole_bits(layers, parameters, int8, plain, bits),
    )
    return (
        f"{len(layers)} layers, {weights / 1e6:.2f} M of {parameters / 1e6:.2f} M parameters: "
        f"{bits / weights:.3f} stored bits per weight, {whole / parameters:.3f} over the whole model, "
        f"about {whole / 8e6:.2f} MB instead of {parameters / 5e5:.2f} MB in 16 bit"
    )


def planned_size(
    config: QuantizeConfig, layers: list[Layer], parameters: int, int8: Int8Totals, plain: int
) -> tuple[str, int]:
    """Return the table of layers, or its totals if `target_bits` are still to be allocated, and bytes of the whole."""
    if config.target_bits is None:
        bits = sum(map(layer_bits, layers)) + shared_codebook_bits(layers)
        text = layer_table(layers, parameters, int8, plain)
    else:
        bits = config.target_bits * sum(layer.rows * layer.columns for layer in layers)
        text = totals(layers, parameters, int8, plain, bits) + "; allocated after calibration"
    return text, int(whole_bits(layers, parameters, int8, plain, bits)) // 8


def whole_bits(layers: list[Layer], parameters: int, int8: Int8Totals, plain: int, bits: float) -> float:
    """Return the bits of a whole model whose layers take `bits` together; other arguments as of `layer_table`."""
    weights = sum(layer.rows * layer.columns for layer in layers)
    return bits + int8.bits + plain * (parameters - weights - int8.weights)


def layer_line(row: dict) -> str:
    """Format the log line of a quantized layer, from its row of the table."""
    held_out = "" if row.get("held_out_error") is None else f" (held-out {row['held_out_error']:.5f})"
    gap = "" if row["gap_db"] is None else f", {row['gap_db']:.1f} dB above the bound"
    bits, seconds = row["bits_per_weight"], row["seconds"]
    return f"{row['name']}: relative error {row['error']:.5f}{held_out}, {bits:.3f} bits{gap}, {seconds:.1f} s"


def blocks_before_finetuning(count: int, blocks: int) -> list[int]:
    """Return after how many blocks each of `count` fine-tunings takes place: evenly spread, none after the last block.

    Raises:
        UserError: there are not as many places between `blocks` blocks.
    """
    if count >= max(1, blocks):
        raise UserError(
            f"--num_intermediate_finetunes is {count}; between {blocks} blocks allowed are 0 to {blocks - 1}"
        )
    return [round(k * blocks / (count + 1)) for k in range(1, count + 1)]


def keeps_hessians(config: QuantizeConfig, layers: list[Layer]) -> bool:
    """Return whether the full-precision model's Hessians of all layers are kept, and not those of a block."""
    return bool(config.hessian_cache or config.target_bits is not None or shared_codebook_users(layers))


def hessian_bytes(groups: list[list[Layer]], memory_gb: float, all_kept: bool, sets: int = 2) -> int:
    """Return the bytes of disk for Hessians: a triangle in float32 per shared input, and a held-out one.

    Args:
        groups: layers that share an input.
        memory_gb: for the Hessians of one recording pass.
        all_kept: whether those of all layers are kept, and not only those of one pass.
        sets: 1 if there are no held-out ones.
    """
    parts = [groups]
    if not all_kept:
        by_block = [list(some) for _, some in groupby(groups, key=lambda group: group[0].block)]
        parts = [part for some in by_block for part in passes(some, memory_gb)]
    return max(sum(sets * 4 * group[0].columns * (group[0].columns + 1) // 2 for group in part) for part in parts)


# ------------------------------------------------------------------------------------------------ memory, disk and time


def plan(
    config: QuantizeConfig,
    shapes: Shapes,
    groups: list[list[Layer]],
    all_kept: bool,
    prompts: tuple[int, int],
    rates: MatmulRates,
    beside: list[list[list[Layer]]] = (),
) -> list[Need]:
    """Return what every phase needs.

    Args:
        groups: layers by the input that they share.
        all_kept: whether the Hessians of all layers are recorded first, and kept.
        prompts: numbers of those for calibration and for evaluation.
        beside: the same as `groups` of other experts that the run quantizes.
    """
    own, every = (
        [layer for groups in some for group in groups for layer in group] for some in ([groups], [groups, *beside])
    )
    recorded = recording_passes(config, groups, all_kept)
    whole = config.offload in ("none", "auto")
    # Weights on the device, and in RAM beside it.
    blocks = shapes.experts * (shapes.outside + shapes.block)
    on_device, in_ram = (shapes.denoiser, shapes.others) if whole else (blocks, shapes.denoisers_in_ram)
    waiting = 0 if whole else recorded_points(config, shapes, prompts[0]) * shapes.waiting
    in_files = waiting if config.offload == "disk" else 0
    work = working_bytes(config, shapes, groups, recorded)
    weights, codes = sum(layer.rows * layer.columns for layer in every), code_bytes(config, every)
    sets = 1 if all_kept and not whole else 2
    stored = [groups, *(beside if config.hessian_cache else ())]  # else one's are dropped before the next's are made
    kept = sum(hessian_bytes(some, config.hessian_memory_gb, all_kept, sets) for some in stored)
    others = shapes.others_in_ram + in_ram
    decoded = code_bytes(config, own) if whole else 0
    # Others are read from codes when they are needed.
    changes = shapes.itemsize * sum(layer.rows * layer.columns for layer in own) if whole else 0
    in_layers, saved = 0, 2 * shapes.pipeline + kept
    if not whole:  # Hessians are dropped before the pipeline is saved
        cached = kept if config.hessian_cache else 0
        in_layers, saved = codes, shapes.pipeline - shapes.itemsize * weights + 2 * codes + cached
    ram, disk = others + shapes.points, shapes.points + kept
    coded = 0 if whole else max(0, codes - in_ram)  # more than what they replace, which may have been in files
    in_blocks = coded + (0 if all_kept else waiting - in_files)
    needs = [
        Need("teacher", on_device + work["sampling"], ram, shapes.points),
        Need("hessians", on_device + work["hessians"], ram + waiting - in_files, disk + in_files),
        Need("allocation", on_device + work["allocation"], ram + changes, disk + in_layers),
        Need("layers", on_device + work["layers"], others + in_blocks, disk + in_layers),
        Need("evaluation", on_device + decoded + work["sampling"], ram + coded, disk + in_layers),
        Need("saving", on_device, others + (shapes.denoiser if whole else coded), shapes.points + saved),
    ]
    times = seconds(config, shapes, groups, len(recorded), prompts, rates)
    present = [need for need in needs if need.phase != "allocation" or config.target_bits is not None]
    return [replace(need, seconds=times.get(need.phase, 0.0)) for need in present]


def code_bytes(config: QuantizeConfig, layers: list[Layer]) -> int:
    """Return the bytes of the codes of layers."""
    weights = sum(layer.rows * layer.columns for layer in layers)
    return int(config.target_bits * weights if config.target_bits else sum(map(layer_bits, layers))) // 8


def in_turn(plans: list[list[Need]], sampling: float) -> list[Need]:
    """Return what every phase needs of experts that are quantized one after the other: the most of any, all their time.

    Args:
        plans: of each of them.
        sampling: seconds to sample the calibration prompts, which is in the "hessians" of each plan, and done once.
    """
    found = []
    for some in zip(*plans, strict=True):
        seconds = [need.seconds for need in some]
        once, first = max(seconds), sum(seconds) - (len(plans) - 1) * sampling
        total = {"teacher": once, "evaluation": once, "hessians": first}.get(some[0].phase, sum(seconds))
        sizes = (max(getattr(need, size) for need in some) for size in ("device", "ram", "disk"))
        found.append(Need(some[0].phase, *sizes, total))
    return found


def recording_passes(config: QuantizeConfig, groups: list[list[Layer]], all_kept: bool) -> list[list[list[Layer]]]:
    """Return the groups whose Hessians are recorded together, of all layers or within blocks."""
    if all_kept:
        return passes(groups, config.hessian_memory_gb)
    by_block = [list(some) for _, some in groupby(groups, key=lambda group: group[0].block)]
    return [part for some in by_block for part in passes(some, config.hessian_memory_gb)]


def working_bytes(
    config: QuantizeConfig, shapes: Shapes, groups: list[list[Layer]], recorded: list[list[list[Layer]]]
) -> dict[str, int]:
    """Return by phase the most bytes on the device beside the denoiser; `recorded` is of `recording_passes`."""
    layers, batch = [layer for group in groups for layer in group], config.xtx_batch_size * shapes.step
    together = batch if config.offload in ("none", "auto") else shapes.step  # points that are recorded at once
    rows = max(sample_bytes(config, shapes, group[0].columns) for group in groups)
    hardest = max(solver_bytes(layer, config.code == "trellis") for layer in layers)
    # A gradient in float32, its product with the layer's change, and that change.
    effects = shapes.backward + (shapes.itemsize + 8) * max(layer.rows * layer.columns for layer in layers)
    coding = max(map(squares, passes(groups, config.hessian_memory_gb))) * 2 * MEAN + hardest
    return {
        "sampling": max(shapes.encoded(config.xtx_batch_size), shapes.vae + batch, shapes.decode),
        "hessians": max(map(squares, recorded)) * (SUM + MEAN) + together + rows,
        "allocation": max(effects, coding),
        "layers": max(map(squares, recording_passes(config, groups, all_kept=False))) * 2 * MEAN + hardest,
    }


def seconds(
    config: QuantizeConfig,
    shapes: Shapes,
    groups: list[list[Layer]],
    recordings: int,
    prompts: tuple[int, int],
    rates: MatmulRates,
) -> dict[str, float]:
    """Return an estimate of the seconds of each phase, at measured rates; reading and writing are left out.

    Args:
        recordings: passes over the calibration points in which Hessians are recorded.
    """
    calibration, evaluation = prompts
    steps = shapes.steps * shapes.calls
    points = recorded_points(config, shapes, calibration)
    call = shapes.call_seconds(rates)
    sampled = evaluation * (steps * call + shapes.decode_seconds(rates))
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


def recorded_points(config: QuantizeConfig, shapes: Shapes, prompts: int) -> int:
    """Return the number of points that Hessians are recorded on."""
    calls = shapes.own_steps * shapes.calls
    return prompts * min(config.calibration_nsteps or calls, calls)


def sample_bytes(config: QuantizeConfig, shapes: Shapes, columns: int) -> int:
    """Return the bytes of the samples of one batch that are multiplied at once, and of a strip of their product."""
    steps = shapes.own_steps * shapes.calls
    points = 0.9 * (config.calibration_nsamples or 256) * min(config.calibration_nsteps or steps, steps)
    share = min(1.0, config.xtx_batch_size / points)
    rows = config.xtx_batch_size * shapes.positions
    if config.hessian_samples_per_input:
        rows = min(rows, int(config.hessian_samples_per_input * share * columns))
    values = min(rows * columns, VALUES_PER_PRODUCT)
    return (4 + shapes.itemsize) * values + 2 * 4 * columns * min(columns, ROWS_PER_PRODUCT)


def recorded_bytes(shapes: Shapes, calibration: int, evaluation: int) -> int:
    """Return the bytes of recorded points of so many prompts: latents, texts, and outputs on evaluation prompts."""
    latents = (calibration + evaluation) * (shapes.steps * shapes.latents + shapes.conditioning)
    return latents + evaluation * shapes.steps * shapes.calls * shapes.outputs


def squares(groups: list[list[Layer]]) -> int:
    """Return the sum of I² over the inputs of a pass."""
    return sum(group[0].columns ** 2 for group in groups)


def solver_bytes(layer: Layer, trellis: bool) -> int:
    """Return the bytes that quantizing one layer takes beside its Hessians, with trellis or additive codes."""
    solver = SQUARES * layer.columns**2 + WEIGHTS[trellis] * layer.rows * layer.columns
    gap = GAP_SQUARES * layer.columns**2 if layer.columns <= GAP_COLUMNS else 0
    return 4 * max(solver, gap)


def offloads(config: QuantizeConfig, on_gpu: bool) -> list[str]:
    """Return the values of `offload` to try in turn; on a CPU, where all is in RAM, "auto" is none."""
    if config.offload != "auto":
        return [config.offload]
    return ["none", "ram", "disk"] if on_gpu else ["none"]


def smaller(config: QuantizeConfig, calls: int = 50) -> list[QuantizeConfig]:
    """Return the settings with smaller batches, then with less memory for Hessians too; the closest come first.

    Block by block, all inputs of a block are kept: then also with fewer of the `calls` of a trajectory.
    """
    found, size, memory = [], config.xtx_batch_size, config.hessian_memory_gb
    if config.offload in ("ram", "disk"):
        steps = min(config.calibration_nsteps or calls, calls)
        while steps > 1:
            steps //= 2
            found.append(replace(config, calibration_nsteps=steps))
        config = replace(config, calibration_nsteps=1)
    while size > 1:
        size //= 2
        found.append(replace(config, xtx_batch_size=size))
    for k in range(1, 7):
        found.append(replace(config, xtx_batch_size=size, hessian_memory_gb=memory / 2**k))
    return found
