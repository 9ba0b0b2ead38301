"""What the scale search is worth: the layers of a run with shared codebooks solved again without and with it.

    OMP_NUM_THREADS=1 python benchmarks/bench_scale_search.py assets/shapes-xl out/shared --hessian_cache FOLDER

RUN is of `main_text2image.py --share_codebooks unet`, and gives formats and shared codebooks. Errors are on Hessians of
other prompts than those that the codes were found on. A line of JSON a layer, the last one over all.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from layer_problems import model_layers

from vqdm.additive import encode
from vqdm.additive.code import SharedCodebooks
from vqdm.additive.solve import SolverConfig, Task, solve_layers
from vqdm.diffusion.model_folders import find_denoiser, load_denoiser
from vqdm.layers.quantized import quantized_layers


def compared(task: Task, trials: int) -> dict:
    """Held-out errors, searches and seconds of one layer, with the first scales alone and with `trials` larger ones."""
    row = {}
    for name, count in (("first", 0), ("searched", trials)):
        encode.TRIALS = count
        [(_, report)] = solve_layers([task])
        row |= {name: report.held_out_error, f"{name}_epochs": report.epochs, f"{name}_seconds": report.seconds}
        row["bits"] = report.code_bits_per_weight
    return row | {"gain_db": 10 * math.log10(row["first"] / row["searched"])}


def overall(rows: list[dict]) -> dict:
    """Over all layers."""
    gains = sorted(row["gain_db"] for row in rows)
    summary = {"layers": len(rows), "least_db": gains[0], "median_db": gains[len(rows) // 2], "most_db": gains[-1]}
    return summary | {f"{name}_seconds": sum(row[f"{name}_seconds"] for row in rows) for name in ("first", "searched")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("run", metavar="RUN", help="a folder of main_text2image.py --share_codebooks")
    parser.add_argument("--hessian_cache", required=True, metavar="FOLDER")
    parser.add_argument("--limit", type=int, help="layers at most")
    arguments = parser.parse_args()
    unet = load_denoiser(find_denoiser(str(Path(arguments.run))), torch.float32)
    specs = {name: layer.spec for name, layer in quantized_layers(unet).items()}
    shared = {
        name: SharedCodebooks(values.detach().float(), 1) for name, values in unet.codebook_banks.named_parameters()
    }
    rows, trials = [], encode.TRIALS
    with torch.no_grad():
        for name, W, H, held_out in model_layers(arguments.model, arguments.hessian_cache, "cpu"):
            if len(rows) == arguments.limit:
                break
            config, generator = SolverConfig(specs[name]), torch.Generator().manual_seed(0)
            task = Task(W, H, config, generator, held_out, shared[specs[name].shared_codebooks])
            rows.append({"layer": name} | compared(task, trials))
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps(overall(rows)))


if __name__ == "__main__":
    main()
