"""Error and time of the layer solver: one JSON line per row.

    OMP_NUM_THREADS=1 python benchmarks/bench_solver.py --shapes 256x256 --codes 2x8g8 3x8g8 --encoders ldl beam
    OMP_NUM_THREADS=1 python benchmarks/bench_solver.py --model assets/shapes-xl --codes 3x8g8 --encoders ldl beam plain
    python benchmarks/bench_solver.py --shapes 1280x1280 10240x1280 1280x5120 1280x11520 --codes 1x8g4s --extrapolate
    python benchmarks/bench_solver.py --device cuda --shapes 1280x1280 --codes 1x12g4s 3x8g8 --batch 16

Without --model: the synthetic problem, from a CPU generator seeded `--seed`, for O rows and I columns:
W = randn(O, I) · 0.02, its columns times 0.5 + rand(1, I); A = randn(I, I) / √I; N = 8192 inputs
X = (randn(N, I) · logspace(0, −2, I)) Aᵀ · 8 + 0.1 · randn(N, I); one channel in a hundred times 10; H = XᵀX / N. The
held-out H is that of another X, drawn after all of this. With --model: all layers that are quantized by default, on
Hessians of its own sampling, which stay in --hessian_cache.

The encoder `plain` is the published procedure as it is written down, `beam` the same codes in less time. A whole run of
`plain` takes hours: one layer of every shape is timed for an epoch, for as many epochs as `beam` takes.

With --batch L: L synthetic layers of every shape, of the seeds from --seed on, first one by one and then all at once;
a row has the mean over the layers of seconds, errors and epochs. Both are run for an epoch before they are timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from statistics import fmean

import plain
import torch
from layer_problems import model_layers, synthetic_layer
from sdxl import extrapolate
from torch import Tensor

from vqdm.additive.code import CodeSpec, SharedCodebooks
from vqdm.additive.solve import (
    ENCODERS,
    LayerReport,
    Problem,
    SolverConfig,
    Task,
    initial_code,
    solve_layer,
    solve_layers,
    without_feedback,
)
from vqdm.devices import peak_memory
from vqdm.quantization.shared_codebooks import sample_layer, train_shared_codebooks

SHARED_GROUPS = 2**15  # column groups that shared codebooks are trained on here
SDXL_WEIGHTS = 2_540_953_600  # that share codebooks


def solver_config(code: str, encoder: str, arguments: argparse.Namespace) -> SolverConfig:
    """`code` is like 3x8g8: codebooks x bits, group size; an s at its end stands for shared codebooks."""
    M, b, g = map(int, code.rstrip("s").replace("g", "x").split("x"))
    spec = CodeSpec(M, b, g, shared_codebooks="shared" if code.endswith("s") else "")
    return SolverConfig(spec, encoder, arguments.beam_size, max_epochs=arguments.max_epochs)


def solved(W: Tensor, H: Tensor, held_out: Tensor | None, config: SolverConfig, seed: int) -> dict:
    """One solved layer, as it is printed."""
    generator = torch.Generator().manual_seed(seed)
    _, report = solve_layer(W, H, config, generator, held_out, shared_codebooks_of(W, H, config, generator))
    return report.to_dict()


def shared_codebooks_of(
    W: Tensor, H: Tensor, config: SolverConfig, generator: torch.Generator
) -> SharedCodebooks | None:
    """Codebooks trained on the layer itself, in place of shared ones; None where none are shared."""
    if not config.spec.shared_codebooks:
        return None
    rows = max(8, SHARED_GROUPS * config.spec.in_group_size // W.shape[1])
    return SharedCodebooks(
        train_shared_codebooks([sample_layer(W, H, rows, config, generator)], config, generator), SDXL_WEIGHTS
    )


def batch_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """Layers of one shape, solved one by one and all at once."""
    for code, shape in product(arguments.codes, arguments.shapes):
        config, layers = solver_config(code, "ldl", arguments), alike(shape, arguments)
        shared = shared_codebooks_of(*layers[0][:2], config, torch.Generator().manual_seed(arguments.seed))
        about = {"code": code, "beam": config.beam_size, "problem": shape, "layers": len(layers)}
        for at_once in (1, len(layers)):
            solved_at_once(layers[:at_once], replace(config, max_epochs=1), shared, at_once)
            reports = solved_at_once(layers, config, shared, at_once)
            names = ("error", "held_out_error", "epochs", "seconds")
            means = {name: fmean(getattr(report, name) for report in reports) for name in names}
            yield about | {"at_once": at_once} | means | {"peak_memory_bytes": peak_memory()}


def alike(shape: str, arguments: argparse.Namespace) -> list[tuple[Tensor, Tensor, Tensor]]:
    """As many synthetic layers of a shape as --batch says."""
    rows, columns = map(int, shape.split("x"))
    made = [synthetic_layer(rows, columns, arguments.seed + k) for k in range(arguments.batch)]
    return [tuple(tensor.to(arguments.device) for tensor in layer) for layer in made]


def solved_at_once(
    layers: list[tuple[Tensor, Tensor, Tensor]], config: SolverConfig, shared: SharedCodebooks | None, at_once: int
) -> list[LayerReport]:
    """Reports of the layers, so many of which are solved at a time."""
    tasks = [
        Task(W, H, config, torch.Generator().manual_seed(k), held_out, shared)
        for k, (W, H, held_out) in enumerate(layers)
    ]
    runs = [tasks[start : start + at_once] for start in range(0, len(tasks), at_once)]
    return [report for run in runs for _, report in solve_layers(run)]


def plain_epoch(W: Tensor, H: Tensor, config: SolverConfig, seed: int) -> float:
    """Seconds of one round of the published procedure."""
    generator = torch.Generator().manual_seed(seed)
    problem = Problem.of(W, H, config.spec)
    code = without_feedback(problem.W, initial_code(problem.W, config, generator))
    started = time.perf_counter()
    plain.epoch(problem.W, problem.H, code, config.steps_per_epoch, config.lr, config.beam_size, generator)
    return time.perf_counter() - started


def rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """Every problem with every code and encoder; after a model's layers, their totals."""
    for code, encoder in product(arguments.codes, arguments.encoders):
        config = solver_config(code, "beam" if encoder == "plain" else encoder, arguments)
        about = {"code": code, "encoder": encoder, "beam": config.beam_size}
        timed: set[torch.Size] = set()
        for name, W, H, held_out in problems(arguments):
            W, H = W.to(arguments.device), H.to(arguments.device)
            held_out = None if held_out is None else held_out.to(arguments.device)
            about |= {"problem": name, "rows": len(W), "columns": W.shape[1]}
            if encoder != "plain":
                yield about | solved(W, H, held_out, config, arguments.seed) | {"peak_memory_bytes": peak_memory()}
            elif W.shape not in timed:
                timed.add(W.shape)
                yield about | {"seconds_an_epoch": plain_epoch(W, H, config, arguments.seed)}


def problems(arguments: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """(name, W [O, I], H [I, I], held-out H)"""
    if arguments.model:
        yield from model_layers(arguments.model, arguments.hessian_cache, arguments.device)
        return
    for shape in arguments.shapes:
        yield shape, *synthetic_layer(*map(int, shape.split("x")), arguments.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["64x64", "128x128", "256x256"], metavar="OxI")
    parser.add_argument("--model", metavar="FOLDER", help="a pipeline's layers instead of synthetic ones")
    parser.add_argument("--hessian_cache", default="build/hessians", metavar="FOLDER")
    parser.add_argument("--codes", nargs="+", default=["2x8g8", "3x8g8", "2x6g4"], metavar="MxbgG")
    parser.add_argument("--encoders", nargs="+", default=["ldl"], choices=[*ENCODERS, "plain"])
    parser.add_argument("--beam_size", type=int, default=SolverConfig.beam_size)
    parser.add_argument("--max_epochs", type=int, default=SolverConfig.max_epochs)
    parser.add_argument("--batch", type=int, default=0, metavar="L", help="time L layers one by one and all at once")
    parser.add_argument("--extrapolate", action="store_true", help="from the solved shapes to all layers of SDXL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    found = []
    for row in batch_rows(arguments) if arguments.batch else rows(arguments):
        found.append(row)
        print(json.dumps(row), flush=True)
    if arguments.extrapolate:
        measured = [(row["rows"], row["columns"], row["seconds"]) for row in found]
        print(json.dumps({"problem": "SDXL, extrapolated"} | extrapolate(measured)))


if __name__ == "__main__":
    main()
