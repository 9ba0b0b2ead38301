"""How many calibration prompts and steps are enough: errors of layers on other prompts. A line of JSON per pair.

    OMP_NUM_THREADS=1 python benchmarks/bench_calibration.py assets/shapes-xl --work out/calibration

Every layer is coded at `--bits` code bits per weight (trellis, 8 state bits) under Hessians recorded from so many
prompts and steps, and judged under those of the evaluation prompts at all of their 20 steps, where all samples count.
Errors are relative, of the median layer and of the worst; `lost_db` is the median over layers of what the pair loses to
the last pair, the largest.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import median

import torch
from bench_trellis import as_layer, decibels
from layer_problems import EVALUATION_PROMPTS, model_layers
from torch import Tensor

from vqdm.additive.code import SharedCodebooks
from vqdm.additive.solve import SolverConfig, Task, relative_error, solve_layers
from vqdm.quantization.config import FAST_STATE_BITS
from vqdm.quantization.shared_codebooks import trellis_codebooks

SHARED_BY = 2**30  # weights that are taken to share the table, which then costs nothing


def coded_error(name: str, W: Tensor, H: Tensor, judge: Tensor, bits: float) -> float:
    """The relative error under `judge` [I, I] of W [O, I] coded under H [I, I]."""
    shared = SharedCodebooks(trellis_codebooks(FAST_STATE_BITS), SHARED_BY)
    config = SolverConfig(as_layer(name, W, FAST_STATE_BITS, bits).spec)
    [(code, _)] = solve_layers([Task(W, H, config, torch.Generator().manual_seed(0), None, shared)])
    return max(relative_error(W, code, judge), 1e-12)


def summarized(prompts: int, steps: int, errors: dict[str, float], best: dict[str, float]) -> dict:
    """The row of a pair, from the errors of its layers and of the largest pair's."""
    lost = [10 * math.log10(errors[name] / best[name]) for name in errors]
    return {
        "prompts": prompts,
        "steps": steps,
        "points": prompts * steps,
        "median_layer_db": decibels(median(errors.values())),
        "worst_layer_db": decibels(max(errors.values())),
        "lost_db": round(median(lost), 3),
        "most_lost_db": round(max(lost), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--work", type=Path, required=True, help="folder of trajectories and Hessians")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64, 192], help="in rising order")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 5, 10], help="in rising order")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--every", type=int, default=3, help="of the layers every so many-th")
    options = parser.parse_args()

    def problems(name: str, **settings) -> list[tuple]:
        found = list(model_layers(options.model, str(options.work / name), "cpu", **settings))
        return [one[:3] for one in found[:: options.every]]

    given = {"calibration_prompts": EVALUATION_PROMPTS, "calibration_nsamples": 64, "calibration_nsteps": 0}
    judges = {name: H for name, _, H in problems("judge", hessian_samples_per_input=0, **given)}
    pairs = [(count, steps) for count in options.prompts for steps in options.steps]
    errors = {}
    for count, steps in pairs:
        layers = problems(
            f"{count}x{steps}",
            output_dir=str(options.work / f"trajectories-{count}"),
            calibration_nsamples=count,
            calibration_nsteps=steps,
        )
        errors[count, steps] = {name: coded_error(name, W, H, judges[name], options.bits) for name, W, H in layers}
    for (count, steps), found in errors.items():
        print(json.dumps(summarized(count, steps, found, errors[pairs[-1]])), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
