"""Trellis codes beside additive codes with shared codebooks: a line of JSON per row.

    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py gaussian
    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py rows
    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py predict --bits 1 1.5 2
    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py predict --model assets/shapes-xl --hessian_cache FOLDER
    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py cost

`gaussian`: unit Gaussian weights, H = I. `rows`: the linear layers of all-MiniLM-L6-v2, bits divided among them, with
and without rows that weigh as much as the output depends on them. `predict`: errors predicted and found, of those
layers or of a UNet's. `cost`: CPU seconds of layers of SDXL's shapes, extrapolated to all. Trained models beside other
methods are in bench_real.py; `real/problems.py` says what `--package_dir` is.

Bits are all that is stored: codes, widths, scales, and shared tables over the weights that share them. Seconds are of
the processor, one thread.

Letters: O rows, I columns; L bits of a state.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from layer_problems import model_layers
from real.coding import ADDITIVE, Divider, as_layer, off_db, off_row, sampled_rows
from real.problems import Problem, decibels, load_minilm, text_arguments
from sdxl import extrapolate, sdxl_layers
from torch import Tensor, nn

from vqdm.additive.code import CodeSpec, SharedCodebooks
from vqdm.additive.solve import SolverConfig, Task, relative_error, solve_layers
from vqdm.additive.trellis_solve import layer_curves, solve_trellis
from vqdm.quantization.allocation import FIRST_BITS
from vqdm.quantization.shared_codebooks import sample_layer, train_shared_codebooks, trellis_codebooks

SDXL_WEIGHTS = 2_540_953_600  # that share a table or a codebook
SDXL_SECONDS_ADDITIVE = 21_600  # of a shared codebook of 8 bits for groups of four, see RESULTS.md
LEAST_IMPORTANCE = 1e-3  # of a row, over the mean


# ------------------------------------------------------------------------------------------------ gaussian


def gaussian_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """Mean squared error of unit Gaussian weights, by code."""
    generator = torch.Generator().manual_seed(arguments.seed)
    W, other = (torch.randn(arguments.size, arguments.size, generator=generator) for _ in range(2))
    H = torch.eye(arguments.size)
    for bits in arguments.bits:
        for L in arguments.state_bits:
            config, shared = (
                SolverConfig(as_layer("", W, L, bits).spec),
                SharedCodebooks(trellis_codebooks(L), SDXL_WEIGHTS),
            )
            yield {"code": f"trellis, {L} state bits"} | gaussian_row(Task(W, H, config, generator, None, shared))
        formats = [ADDITIVE[bits], (12, 4)] if bits == 3 else [ADDITIVE[bits]]
        for width, group in formats:
            config = SolverConfig(CodeSpec(1, width, group, shared_codebooks="shared"))
            sample = sample_layer(other, H, sampled_rows(config.spec, arguments.size), config, generator)
            shared = SharedCodebooks(train_shared_codebooks([sample], config, generator), SDXL_WEIGHTS)
            code = f"shared codebook of {width} bits, groups of {group}"
            yield {"code": code} | gaussian_row(Task(W, H, config, generator, None, shared))


def gaussian_row(task: Task) -> dict:
    started = time.process_time()
    [(code, report)] = solve_layers([task])
    seconds = time.process_time() - started
    return {
        "stored_bits": round(report.bits_per_weight, 4),
        "mean_squared_error_db": decibels((task.W - code.dequantize()).square().mean().item()),
        "bound_db": decibels(4.0**-report.bits_per_weight),
        "cpu_seconds": round(seconds, 1),
    }


# ------------------------------------------------------------------------------------------------ rows


def row_importance(problem: Problem, seed: int) -> dict[str, Tensor]:
    """By layer name, the mean square over tokens of vᵀ ∂f/∂y of every output y, over its mean: [O]; v random signs."""
    sums: dict[str, Tensor | float] = dict.fromkeys(problem.weights, 0.0)
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        outputs[name] = output if output.requires_grad else output.requires_grad_()
        return outputs[name]

    hooks = [problem.model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in problem.weights]
    for k, batch in enumerate(problem.calibration):
        generator = torch.Generator().manual_seed(seed + k)
        with torch.enable_grad():
            pooled = problem.model(**batch).sample
            signs = torch.randint(2, pooled.shape, generator=generator) * 2.0 - 1
            gradients = torch.autograd.grad((pooled * signs).sum(), list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            sums[name] = sums[name] + gradient.double().square().flatten(0, 1).sum(0)
    for hook in hooks:
        hook.remove()
    return {name: (one / one.mean()).clamp(min=LEAST_IMPORTANCE).float() for name, one in sums.items()}


def scale_steps(importance: Tensor) -> Tensor:
    """The square roots of `importance`, in whole steps of the stored scales, 1/16 octave, so that these hold them."""
    return 2.0 ** ((importance.log2() * 8).round() / 16)


def rows_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """Bits divided among layers, with the errors of all rows alike, and weighted by the outputs' gradients."""
    problem = load_minilm(arguments)
    yield problem.about
    importance = row_importance(problem, arguments.seed)
    roots = {"alike": {}, "weighted": {name: scale_steps(one) for name, one in importance.items()}}
    for name in arguments.weights:
        divider = Divider.of(problem, arguments.state_bits, roots[name], arguments.seed)
        for target in arguments.targets:
            yield {"rows": name, "target_bits": target} | divider.rows(target)[1]


# ------------------------------------------------------------------------------------------------ prediction


def predict_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """Errors of single layers at some rates, as predicted before anything is coded and as found."""
    off, errors = ({bits: [] for bits in arguments.bits} for _ in range(2))
    for name, W, H in problems(arguments):
        curve = layer_curves(W, H, as_layer(name, W, arguments.state_bits, FIRST_BITS).spec)[0]
        for bits in arguments.bits:
            layer = as_layer(name, W, arguments.state_bits, bits)
            errors[bits].append(relative_error(W, solve_trellis([(W, H)], layer.spec)[0], H))
            off[bits].append(off_db(curve, layer, errors[bits][-1]))
    for bits in arguments.bits:
        row = {"code_bits": bits, "layers": len(off[bits]), "error_db_median": decibels(median(errors[bits]))}
        yield row | off_row(off[bits])


def problems(arguments: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, W [O, I] and H [I, I] of the layers of a UNet, or of the encoder where no model is named."""
    if arguments.model:
        yield from (one[:3] for one in model_layers(arguments.model, arguments.hessian_cache, "cpu"))
        return
    problem = load_minilm(arguments)
    yield from ((name, W, problem.hessians[name]) for name, W in problem.weights.items())


# ------------------------------------------------------------------------------------------------ cost


def cost_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """CPU seconds of layers of SDXL's shapes, the larger ones through some of their rows; and of all its layers."""
    measured, limit = [], arguments.rows
    shapes = sorted({(layer.rows, layer.columns) for layer in sdxl_layers()}, key=lambda shape: shape[::-1])
    for rows, columns in [tuple(map(int, one.split("x"))) for one in arguments.shapes] or shapes:
        if columns > arguments.most_columns:
            continue
        whole = as_layer("", torch.ones(rows, 1), arguments.state_bits, arguments.code_bits).spec.segment_rows
        taken = min(rows, max(1, limit // whole) * whole)  # whole segments of the layer
        seconds = coding_seconds(taken, columns, arguments)
        measured.append((taken, columns, seconds))
        each = {
            "microseconds_per_weight": round(1e6 * seconds / (taken * columns), 2),
            "cpu_seconds": round(seconds, 2),
        }
        yield {"rows": rows, "columns": columns, "rows_taken": taken} | each
    found = extrapolate(measured)
    yield {
        "problem": "all layers of SDXL, extrapolated",
        "cpu_seconds": round(found["seconds"]),
        "worst_relative_misfit": round(found["worst_relative_misfit"], 2),
        "additive_seconds": SDXL_SECONDS_ADDITIVE,
    }


def coding_seconds(rows: int, columns: int, arguments: argparse.Namespace) -> float:
    """CPU seconds of `solve_layers` for one layer of random weights and inputs."""
    generator = torch.Generator().manual_seed(arguments.seed)
    W = torch.randn(rows, columns, generator=generator) * 0.02
    X = torch.randn(min(512, columns), columns, generator=generator) * torch.logspace(0, -1, columns)
    H = (X.T @ X / len(X)).contiguous()
    H.diagonal().add_(0.01)
    layer, shared = as_layer("", W, arguments.state_bits, arguments.code_bits), trellis_codebooks(arguments.state_bits)
    task = Task(W, H, SolverConfig(layer.spec), generator, None, SharedCodebooks(shared, SDXL_WEIGHTS))
    started = time.process_time()
    solve_layers([task])
    return time.process_time() - started


# ------------------------------------------------------------------------------------------------ command line


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gaussian, rows, predict, cost = map(commands.add_parser, ("gaussian", "rows", "predict", "cost"))
    gaussian.add_argument("--size", type=int, default=1024, help="rows and columns")
    gaussian.add_argument("--state_bits", nargs="+", type=int, default=[8, 10, 12])
    gaussian.add_argument("--bits", nargs="*", type=int, default=[2, 3, 4], choices=ADDITIVE, help="per weight")
    rows.add_argument("--targets", nargs="+", type=float, default=[2.0, 3.0])
    rows.add_argument("--weights", nargs="+", choices=["alike", "weighted"], default=["alike", "weighted"])
    predict.add_argument("--bits", nargs="+", type=float, default=[1.0, 1.5, 2.0, 3.0], help="per weight, of codes")
    predict.add_argument("--model", help="a pipeline with a UNet, instead of the encoder")
    predict.add_argument("--hessian_cache", metavar="FOLDER", help="of that model's Hessians; those it lacks are made")
    for one in (rows, predict):
        text_arguments(one)
    cost.add_argument("--rows", type=int, default=640, help="of a layer at most")
    cost.add_argument("--most_columns", type=int, default=5760, help="wider layers are left to the extrapolation")
    cost.add_argument("--shapes", nargs="*", default=[], metavar="OxI", help="all shapes by default")
    cost.add_argument("--code_bits", type=float, default=2.0)
    for one in (rows, predict, cost):
        one.add_argument("--state_bits", type=int, default=12)
    for one in (gaussian, rows, predict, cost):
        one.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.command == "predict" and bool(arguments.model) != bool(arguments.hessian_cache):
        parser.error("--model and --hessian_cache go together")
    return arguments


def main() -> None:
    arguments = parsed()
    commands = {"gaussian": gaussian_rows, "rows": rows_rows, "predict": predict_rows}
    commands["cost"] = cost_rows
    torch.set_num_threads(1)
    with torch.no_grad():
        for row in commands[arguments.command](arguments):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
