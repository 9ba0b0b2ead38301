"""Variable rate inside a layer: is it worth an order of columns and a table of rates that must be stored too?

    OMP_NUM_THREADS=1 python benchmarks/bench_variable.py --model assets/shapes-xl --bits 2 3

All layers are coded by one pass of error feedback with shared codebooks of 4..12 bits for groups of four columns, and
scales are fitted. `constant` gives every group the same number of bits; `variable` gives it what reverse water-filling
over the groups' metrics asks for; `sorted` orders the columns by importance first, so that groups differ more. The
table of rates (4 bits a group) and the order of columns are paid for out of the same budget. A line of JSON a row.

Letters: O rows, I columns; g = group size; G = I/g groups; F_j the factor of group j's metric [g, g].
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator

import torch
from layer_problems import model_layers
from torch import Tensor

from vqdm.additive.code import CodeSpec, group_columns
from vqdm.additive.config import SolverConfig
from vqdm.additive.encode import column_blocks, encode_group, feedback_factors
from vqdm.additive.refit import weighted_error
from vqdm.additive.shared import sample_layer, train_bank
from vqdm.additive.solve import descending_groups, fold_input_scales, input_scales

GROUP = 4
WIDTHS = range(4, 13)
TABLE_BITS = 4  # a group, to say which of the widths it has
METHODS = ("constant", "variable", "sorted")
Layers = list[tuple[str, Tensor, Tensor, Tensor]]


def solver_config(width: int) -> SolverConfig:
    spec = CodeSpec(1, width, GROUP, shared_codebooks="bank")
    return SolverConfig(spec, init_max_points_per_centroid=60)


def trained_banks(layers: Layers, rows: int, seed: int) -> dict[int, Tensor]:
    """Width → codebook [1, 2^width, 1, g], each trained on rows of the same layers."""
    generator = torch.Generator().manual_seed(seed)
    picked = [layers[k] for k in torch.randperm(len(layers), generator=generator)[:32].tolist()]
    samples = [sample_layer(W, H, rows, solver_config(8), generator) for _, W, H, _ in picked]
    return {width: train_bank(samples, solver_config(width), generator) for width in WIDTHS}


def water_filled(demand: Tensor, total: int) -> list[int]:
    """Widths of groups near `demand` [G] bits plus a common level, within the widths there are and `total` in all."""
    low, high = -200.0, 200.0
    for _ in range(60):
        level = (low + high) / 2
        widths = (demand + level).round().clamp(WIDTHS[0], WIDTHS[-1])
        low, high = (low, level) if widths.sum() > total else (level, high)
    return (demand + low).round().clamp(WIDTHS[0], WIDTHS[-1]).int().tolist()


def demand(W: Tensor, scales: Tensor, factors: Tensor) -> Tensor:
    """Bits [G] by which groups differ: half the log2 of what each of a group's columns weighs in the error, times g."""
    metric = 2 * factors.diagonal(dim1=1, dim2=2).abs().log2().mean(1)  # log2 |F_jᵀ F_j|^(1/g), [G]
    energy = (W / scales.clamp(min=1e-12)[:, None]).square().mean(0).view(-1, GROUP).mean(1)  # [I] → [G]
    return (metric + energy.clamp(min=1e-12).log2()) * GROUP / 2


def coded(W: Tensor, H: Tensor, method: str, width: int, banks: dict[int, Tensor], beam: int) -> tuple[Tensor, float]:
    """Coded weight [O, I], and stored bits a weight without the banks and the row scales, which all methods share."""
    (O, I), G = W.shape, W.shape[1] // GROUP  # noqa: E741
    by_column = H.diagonal().argsort(descending=True)
    order = by_column if method == "sorted" else group_columns(descending_groups(H, GROUP), GROUP)
    W, H = W[:, order], H[order][:, order]
    factors, feedback = feedback_factors(H, GROUP, 0.01)
    scales = W.square().mean(1).sqrt()  # [O]
    side = 0 if method == "constant" else TABLE_BITS * G
    side += I * math.ceil(math.log2(I)) if method == "sorted" else 0
    budget = width * G - math.ceil(side / O)  # of bits a row
    widths = [width] * G if method == "constant" else water_filled(demand(W, scales, factors), budget)
    found = feedback_pass(W, scales, factors, feedback, [banks[w] for w in widths], beam)
    fit = ((W @ H) * found).sum(1) / ((found @ H) * found).sum(1).clamp(min=1e-20)  # [O]
    back = torch.empty_like(found)
    back[:, order] = found * fit[:, None]
    return back, (sum(widths) + side / O) / I


def coded_with_scales(
    W: Tensor, H: Tensor, method: str, width: int, banks: dict[int, Tensor], arguments: argparse.Namespace
) -> tuple[Tensor, float]:
    """`coded`, with a 16-bit scale for every column where `--input_channel_scales` asks for it."""
    if not arguments.input_channel_scales:
        return coded(W, H, method, width, banks, arguments.beam_size)
    columns = input_scales(W)
    found, bits = coded(*fold_input_scales(W, H, columns), method, width, banks, arguments.beam_size)
    return found * columns, bits + 16 / len(W)


def feedback_pass(
    W: Tensor, scales: Tensor, factors: Tensor, feedback: Tensor, banks: list[Tensor], beam: int
) -> Tensor:
    """Error feedback as in `encode.feedback_encode`, with a codebook of its own for every group; the coded weight."""
    difference, target, found = torch.zeros_like(W), W.clone(), torch.zeros_like(W)
    for block in column_blocks(W.shape[1], GROUP):
        for j in range(block.start // GROUP, block.stop // GROUP):
            done, columns = slice(block.start, j * GROUP), slice(j * GROUP, (j + 1) * GROUP)
            wanted = target[:, columns] + difference[:, done] @ feedback[done, columns]
            _, found[:, columns] = encode_group(wanted, scales, banks[j], factors[j], beam)
            difference[:, columns] = W[:, columns] - found[:, columns]
        target[:, block.stop :] += difference[:, block] @ feedback[block, block.stop :]
    return found


def rows(layers: Layers, arguments: argparse.Namespace) -> Iterator[dict]:
    """For every number of bits and method: means over the layers, each weighing as many weights as it has."""
    banks = trained_banks(layers, arguments.rows, arguments.seed)
    usable = [layer for layer in layers if layer[1].shape[1] % GROUP == 0]
    total = sum(W.numel() for _, W, _, _ in usable)
    for bits in arguments.bits:
        constant: list[float] = []
        for method in METHODS:
            started, logs, stored = time.perf_counter(), [], 0.0
            for _, W, H, held_out in usable:
                H = H / H.diagonal().mean()
                found, used = coded_with_scales(W, H, method, round(bits * GROUP), banks, arguments)
                errors = [weighted_error(W - found, m).item() / weighted_error(W, m).item() for m in (H, held_out)]
                logs.append([math.log(max(error, 1e-30)) for error in errors])
                stored += used * W.numel() / total
            share = [W.numel() / total for _, W, _, _ in usable]
            error, unseen = (math.exp(sum(w * log[k] for w, log in zip(share, logs, strict=True))) for k in (0, 1))
            constant = constant or [log[1] for log in logs]
            better = sum(log[1] < before for log, before in zip(logs, constant, strict=True))
            yield {
                "method": method,
                "stored_bits": round(stored, 4),
                "error_geometric_mean": error,
                "held_out_geometric_mean": unseen,
                "layers_better_than_constant": better,
                "layers": len(usable),
                "seconds": round(time.perf_counter() - started, 1),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/shapes-xl", metavar="FOLDER")
    parser.add_argument("--hessian_cache", default="build/hessians", metavar="FOLDER")
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0, 3.0], help="a weight; at most 3")
    parser.add_argument("--rows", type=int, default=24, help="of each of 32 layers that the codebooks are trained on")
    parser.add_argument("--input_channel_scales", action="store_true")
    parser.add_argument("--beam_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with torch.no_grad():
        layers = list(model_layers(arguments.model, arguments.hessian_cache, "cpu"))
        for row in rows(layers, arguments):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
