"""How quantization scales with processes: measured here, and simulated for SDXL on 1 to 64 GPUs.

    python benchmarks/bench_scaling.py measure assets/shapes-xl --processes 1 2 --flags="--calibration_nsamples 32"
    python benchmarks/bench_solver.py --model assets/shapes-xl --codes 3x8g8 > times.jsonl
    python benchmarks/bench_scaling.py simulate times.jsonl --solver_speedup 50

`measure` starts main_text2image.py under torchrun with one thread per process, and prints a JSON line per run: seconds
by phase, the speed-up over the first, and whether the UNet's files are the same bytes.

`simulate` takes rows of `bench_solver.py` and fits seconds = a·O·I + b·O·I² + c·I³ to those (see `sdxl.py`), for SDXL's
layers without a row of their own shape. It then plays the work as `quantization/block.py` orders it: blocks in order,
passes of as many Hessians as memory takes, batches by stride, layers costliest first. Everything else is an assumption
that a flag states: seconds per batch, bandwidths, and how much faster than in the rows the solver runs. What is lost to
perfect scaling is split into

- largest layer: all layers at once would still wait for it
- block order: blocks and passes come one after another, each with its own slowest rank
- recording: batches do not divide evenly, and every rank makes one call of a single point in each pass
- exchange: Hessians are summed over the ranks, written and read; that does not get faster with more ranks
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sdxl import fitted, predicted, sdxl_layers

from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import passes
from vqdm.parallel import shares
from vqdm.quantization.block import cost
from vqdm.storage.files import file_sha256

PROMPTS = ("prompts/shapes_calibration.csv", "prompts/shapes_evaluation.csv")
# Output positions of an image of 1024 pixels in each block: what a UNet call costs there goes with them.
POSITIONS = {
    "down_blocks.0": 128**2,
    "down_blocks.1": 64**2,
    "down_blocks.2": 32**2,
    "mid_block": 32**2,
    "up_blocks.0": 32**2,
    "up_blocks.1": 64**2,
    "up_blocks.2": 128**2,
}

# --------------------------------------------------------------------------------------------- measured


def measure(arguments: argparse.Namespace) -> Iterator[dict]:
    """A row a number of processes."""
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.processes:
            out = Path(folder) / str(world)
            row = measured_run(arguments, world, out)
            result = row["seconds"]["total"], [file_sha256(path) for path in sorted(out.glob("unet/*.safetensors"))]
            first = first or result
            yield row | {"speed_up": round(first[0] / result[0], 3), "same_bytes": first[1] == result[1]}


def measured_run(arguments: argparse.Namespace, world: int, out: Path) -> dict:
    """One run of the whole program; seconds by its own clock, without imports."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), "main_text2image.py"]
    words = [arguments.model, *PROMPTS, "--output_dir", str(out), *shlex.split(arguments.flags)]
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, *words], check=True, stdout=subprocess.DEVNULL, env=environment)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {
        "processes": world,
        "seconds": summary["seconds"],
        "wall_seconds": round(time.perf_counter() - began, 1),
    }


# --------------------------------------------------------------------------------------------- simulated


@dataclass(frozen=True)
class Machine:
    """What the simulation assumes.

    Attributes:
        unet_seconds: of one batch of the whole UNet on one GPU.
        batches: of a recording.
        reduce_gbs: bytes per second, in 10⁹, that every rank adds up over all of them.
        disk_gbs: bytes per second, in 10⁹, that the run's folder takes from all ranks together.
        memory_gb: of Hessians in a pass.
    """

    unet_seconds: float
    batches: int
    reduce_gbs: float
    disk_gbs: float
    memory_gb: float


def simulate(arguments: argparse.Namespace) -> Iterator[dict]:
    """A row a number of GPUs."""
    with open(arguments.times, encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if "seconds" in row and "rows" in row]
    seconds = layer_seconds([(row["rows"], row["columns"], row["seconds"]) for row in rows], arguments.solver_speedup)
    machine = Machine(
        arguments.unet_seconds, arguments.batches, arguments.reduce_gbs, arguments.disk_gbs, arguments.hessian_memory_gb
    )
    single = None
    for world in arguments.gpus:
        row = played(world, seconds, machine)
        single = single or row | {"gpus": world}
        scale = single["hours"] * single["gpus"]
        yield row | {"speed_up": round(scale / row["hours"], 2), "efficiency": round(scale / row["hours"] / world, 3)}


def layer_seconds(measured: list[tuple[int, int, float]], speedup: float) -> dict[Layer, float]:
    """Seconds of each of SDXL's layers: the mean of rows of its shape, else by the fit."""
    coefficients, known = fitted(measured), {}
    for rows, columns, seconds in measured:
        known.setdefault((rows, columns), []).append(seconds)
    found = {}
    for layer in sdxl_layers():
        own = known.get((layer.rows, layer.columns))
        found[layer] = (sum(own) / len(own) if own else predicted(layer.rows, layer.columns, coefficients)) / speedup
    return found


def played(world: int, seconds: dict[Layer, float], machine: Machine) -> dict:
    """Hours of a run on `world` GPUs, and what the perfect share of one GPU's work would not need of them."""
    recording = exchange = solving = perfect = 0.0
    for block, groups in block_passes(list(seconds), machine.memory_gb):
        part = machine.unet_seconds * reached(block, list(seconds))
        recording += part * math.ceil(machine.batches / world)
        perfect += part * machine.batches / world
        exchange += exchange_seconds(groups, world, machine)
        solving += slowest([layer for group in groups for layer in group], seconds, world)
    together, fair = slowest(list(seconds), seconds, world), sum(seconds.values()) / world
    lost = {
        "largest layer": together - fair,
        "block order": solving - together,
        "recording": recording - perfect,
        "exchange": exchange,
    }
    total = recording + exchange + solving
    return {
        "gpus": world,
        "hours": round(total / 3600, 5),
        "solving_hours": round(solving / 3600, 4),
        "recording_hours": round(recording / 3600, 4),
        "lost": {name: round(value / total, 4) for name, value in lost.items()},
        "bound_by": max(lost, key=lost.get),
    }


def block_passes(layers: list[Layer], memory_gb: float) -> Iterator[tuple[str, list[list[Layer]]]]:
    """(block, layers by the input they share) of every pass, in order."""
    for block, some in groupby(layers, key=lambda layer: layer.block):
        found: dict[str, list[Layer]] = {}
        for layer in some:
            found.setdefault(shared_input(layer.name), []).append(layer)
        for groups in passes(list(found.values()), memory_gb):
            yield block, groups


def shared_input(name: str) -> str:
    """A name that layers with one input share: q, k and v of self-attention, k and v of all cross-attention."""
    if re.search(r"attn2\.to_[kv]$", name):
        return "text"
    return re.sub(r"attn1\.to_[qkv]$", "attn1", name)


def reached(block: str, layers: list[Layer]) -> float:
    """The share of a UNet call that is done when `block` is."""
    work = {name: 0 for name in POSITIONS}
    for layer in layers:
        work[layer.block] += layer.rows * layer.columns * POSITIONS[layer.block]
    names = list(POSITIONS)
    return sum(work[name] for name in names[: names.index(block) + 1]) / sum(work.values())


def exchange_seconds(groups: list[list[Layer]], world: int, machine: Machine) -> float:
    """Of adding up float64 sums twice, and of writing and reading two float32 Hessians."""
    values = sum(group[0].columns ** 2 for group in groups)
    added = 2 * 8 * values * 2 * (world - 1) / world / (machine.reduce_gbs * 1e9)
    return added + 2 * 2 * 4 * values / (machine.disk_gbs * 1e9)


def slowest(layers: list[Layer], seconds: dict[Layer, float], world: int) -> float:
    """Seconds of the rank that ends last, layers spread as the program spreads them."""
    parts = shares([cost(layer) for layer in layers], world)
    return max(sum(seconds[layers[index]] for index in part) for part in parts)


def table(rows: list[dict]) -> str:
    lines = ["  GPUs     hours  speed-up  efficiency  bound by"]
    for row in rows:
        lost = ", ".join(f"{name} {share:.1%}" for name, share in row["lost"].items() if share >= 0.0005)
        figures = f"{row['gpus']:6d} {row['hours']:9.3f} {row['speed_up']:9.2f} {row['efficiency']:11.1%}"
        lines.append(f"{figures}  {row['bound_by']} (lost: {lost})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    one = modes.add_parser("measure")
    one.add_argument("model")
    one.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    one.add_argument("--flags", default="", help="more flags of main_text2image.py, as one word")
    two = modes.add_parser("simulate")
    two.add_argument("times", metavar="FILE.jsonl", help="rows of bench_solver.py")
    two.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    two.add_argument("--solver_speedup", type=float, default=1.0, help="of a GPU over the machine of FILE")
    two.add_argument("--unet_seconds", type=float, default=1.0, help="a batch of the whole UNet")
    two.add_argument("--batches", type=int, default=800, help="of a recording: 256 prompts × 50 steps / 16")
    two.add_argument("--reduce_gbs", type=float, default=20.0, help="10⁹ bytes per second, over all ranks")
    two.add_argument("--disk_gbs", type=float, default=1.0, help="10⁹ bytes per second, of the run's folder")
    two.add_argument("--hessian_memory_gb", type=float, default=8.0, help="as of main_text2image.py")
    arguments = parser.parse_args()
    found = []
    for row in (measure if arguments.mode == "measure" else simulate)(arguments):
        found.append(row)
        print(json.dumps(row), flush=True)
    if arguments.mode == "simulate":
        print(table(found))


if __name__ == "__main__":
    main()
