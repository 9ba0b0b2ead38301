"""Error and time of the layer solver on the synthetic layer problem: one JSON line a row.

    OMP_NUM_THREADS=1 python benchmarks/bench_solver.py --shapes 256x256 --codes 2x8g8 3x8g8 --encoders ldl beam

The problem, from a CPU generator seeded `--seed`, for O rows and I columns: W = randn(O, I) · 0.02, its columns times
0.5 + rand(1, I); A = randn(I, I) / √I; X = (randn(N, I) · logspace(0, −2, I)) Aᵀ · 8 + 0.1 · randn(N, I), N = 8192;
one channel in a hundred times 10; H = XᵀX / N. The held-out H is that of another X, drawn after all of this.
"""

from __future__ import annotations

import argparse
import json
from itertools import product

import torch
from torch import Tensor

from vqdm.additive.code import CodeSpec
from vqdm.additive.config import ENCODERS, SolverConfig
from vqdm.additive.solve import solve_layer

SAMPLES = 8192


def synthetic_layer(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """W [O, I], H [I, I] and the held-out H [I, I] of the problem above, float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator) * 0.02
    W *= 0.5 + torch.rand(1, columns, generator=generator)
    A = torch.randn(columns, columns, generator=generator) / columns**0.5
    X = _inputs(A, generator)
    loud = torch.randperm(columns, generator=generator)[: max(1, columns // 100)]
    other = _inputs(A, generator)
    for inputs in (X, other):
        inputs[:, loud] *= 10
    return W, X.T @ X / SAMPLES, other.T @ other / SAMPLES


def _inputs(A: Tensor, generator: torch.Generator) -> Tensor:
    spread = torch.randn(SAMPLES, len(A), generator=generator) * torch.logspace(0, -2, len(A))
    return spread @ A.T * 8 + 0.1 * torch.randn(SAMPLES, len(A), generator=generator)


def row(shape: str, code: str, encoder: str, arguments: argparse.Namespace) -> dict:
    """One solved layer, as it is printed."""
    rows, columns = map(int, shape.split("x"))
    M, b, g = map(int, code.replace("g", "x").split("x"))
    W, H, held_out = (matrix.to(arguments.device) for matrix in synthetic_layer(rows, columns, arguments.seed))
    config = SolverConfig(CodeSpec(M, b, g), encoder, arguments.beam_size, max_epochs=arguments.max_epochs)
    generator = torch.Generator().manual_seed(arguments.seed)
    _, report = solve_layer(W, H, config, generator, held_out)
    return {"problem": shape, "encoder": encoder, "M": M, "b": b, "g": g, "beam": config.beam_size, **report.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["64x64", "128x128", "256x256"], metavar="OxI")
    parser.add_argument("--codes", nargs="+", default=["2x8g8", "3x8g8", "2x6g4"], metavar="MxbgG")
    parser.add_argument("--encoders", nargs="+", default=["ldl"], choices=ENCODERS)
    parser.add_argument("--beam_size", type=int, default=SolverConfig.beam_size)
    parser.add_argument("--max_epochs", type=int, default=SolverConfig.max_epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for shape, code, encoder in product(arguments.shapes, arguments.codes, arguments.encoders):
        print(json.dumps(row(shape, code, encoder, arguments)), flush=True)


if __name__ == "__main__":
    main()
