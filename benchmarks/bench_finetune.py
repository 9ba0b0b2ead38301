"""Output error before and after fine-tuning, with codes as they are and changing: one JSON line per row.

    OMP_NUM_THREADS=2 python benchmarks/bench_finetune.py assets/shapes-xl out/bits/ours-2 out/bits/ours-3
    python benchmarks/bench_finetune.py assets/shapes-xl out/bits/ours-2 --steps 60 --batch 8 --methods codebooks codes

The teacher is sampled once, on training prompts and on held-out ones; errors are on the held-out ones. Ways to train:

    codebooks          everything but codes
    codes              codes too, in as many steps
    codebooks_as_long  everything but codes, for as long as `codes` took
    unquantized        three steps of the full-precision denoiser, for their time

Each runs in a process of its own, so that its peak of memory is its own. Times are of the steps alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from vqdm.devices import peak_memory
from vqdm.diffusion.denoisers import denoiser_of
from vqdm.diffusion.model_folders import find_denoiser, load_denoiser
from vqdm.diffusion.pipelines import load_pipeline
from vqdm.diffusion.sampling import EVALUATION_SEED_OFFSET, error_spread, point_errors, record_evaluation
from vqdm.diffusion.trajectories import Trajectories
from vqdm.documents import read_json
from vqdm.fidelity import decibels
from vqdm.finetuning.code_updates import CodeUpdates, CodeUpdateSettings
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.data import Points, shuffled, spread
from vqdm.finetuning.evaluation import evaluate
from vqdm.finetuning.trainer import (
    DistillationLoss,
    Trainer,
    choose_learning_rate,
    trainable,
    types_on_disk,
    write_back,
)
from vqdm.layers.quantized import decoded_once
from vqdm.parallel import launched
from vqdm.prompts import choose, load_prompts
from vqdm.storage.files import save_json

METHODS = ("codebooks", "codes", "codebooks_as_long", "unquantized")
PROMPTS = {"learned": ("prompts/shapes_calibration.csv", 192, 0)}
PROMPTS["held_out"] = ("prompts/shapes_evaluation.csv", 24, EVALUATION_SEED_OFFSET)


def record(arguments: argparse.Namespace, folder: Path) -> None:
    """Outputs of the teacher on training and held-out prompts, as files."""
    pipeline = load_pipeline(arguments.model, torch.device(arguments.device), torch.float32)
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "latent"}
    for name, (file, count, seed) in PROMPTS.items():
        prompts = choose(load_prompts(file, name), count, 0, file, name)
        record_evaluation(pipeline, prompts, seed, settings, 16)[0].save(folder / f"{name}.safetensors")


def train(method: str, quantized: str, steps: int, arguments: argparse.Namespace, folder: Path) -> dict:
    """The row of `steps` steps by one method."""
    learned, held_out = (Points([Trajectories.load(folder / f"{name}.safetensors")]) for name in PROMPTS)
    with launched(arguments.device) as ranks:
        model = starting_model(method, quantized, arguments).to(ranks.device)
        loss_fn = DistillationLoss(model, None, torch.float32, arguments.local_batch, ranks)
        before = errors(model, held_out.parts[0], "before")
        trainer = make_trainer(loss_fn, steps, method == "codes", arguments)
        found = evaluate(loss_fn, learned, spread(learned, 128))
        trainer.learning_rate = choose_learning_rate(trainer.config, found.median_db)
        order = [point for epoch in range(steps) for point in shuffled(learned, None, str(epoch))]
        began, changed = time.perf_counter(), 0
        for chosen in (order[k * arguments.batch : (k + 1) * arguments.batch] for k in range(steps)):
            changed += trainer.step(learned, chosen).codes.get("groups_changed", 0)
        seconds = time.perf_counter() - began
        after = errors(model, held_out.parts[0], "after")
    if arguments.keep and method != "unquantized":
        keep(model, quantized, Path(arguments.keep) / f"{Path(quantized).name}-{method}")
    row = {"quantized": quantized, "method": method, "steps": steps, **before, **after}
    row["learning_rate"] = trainer.learning_rate
    return row | {"seconds": seconds, "step_seconds": seconds / steps, "changed": changed, "peak": peak_memory()}


def errors(model: nn.Module, recorded: Trajectories, when: str) -> dict[str, float]:
    """Output error over all points, and that of the median point: a few points of one prompt may rule the sum."""
    with decoded_once(model):
        found, energies = point_errors(model, recorded, 16)
    median = error_spread(found, energies)["median"]
    return {f"{when}_db": decibels(sum(found), sum(energies)), f"{when}_median_db": median}


def starting_model(method: str, quantized: str, arguments: argparse.Namespace) -> nn.Module:
    if method == "unquantized":
        return denoiser_of(load_pipeline(arguments.model, torch.device("cpu"), torch.float32))
    return load_denoiser(find_denoiser(quantized), torch.float32)


def keep(model: nn.Module, quantized: str, folder: Path) -> None:
    """The denoiser in the types it is stored in, as `generate.py MODEL FOLDER` takes it, and its size as it was."""
    write_back(model, types_on_disk(find_denoiser(quantized)))
    model.save_pretrained(folder)
    if (summary := Path(quantized) / "summary.json").is_file():
        sizes = {
            name: value for name, value in read_json(summary).items() if name.startswith(("effective_bits", "bytes"))
        }
        save_json(sizes, folder / "summary.json")


def make_trainer(loss_fn: DistillationLoss, steps: int, change_codes: bool, arguments: argparse.Namespace) -> Trainer:
    given = {} if arguments.finetune_lr is None else {"finetune_lr": arguments.finetune_lr}
    optimizer = OptimizerConfig(**given)  # without one the learning rate is chosen by the error, as finetune.py does
    given = {} if arguments.code_lr is None else {"code_lr": arguments.code_lr}
    updates = CodeUpdates(loss_fn.student, CodeUpdateSettings(**given)) if change_codes else None
    return Trainer(loss_fn, trainable(loss_fn.student, optimizer), optimizer, steps, arguments.decode, updates)


def rows(quantized: str, arguments: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """A row for each of the methods."""
    took = {}
    for method in arguments.methods:
        steps = arguments.steps
        if method == "unquantized":
            steps = 3
        elif method == "codebooks_as_long":
            steps = round(steps * took["codes"] / took["codebooks"])
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            row = process.submit(train, method, quantized, steps, arguments, folder).result()
        took[method] = row["step_seconds"]
        yield row | {"batch": arguments.batch, "step_ratio": ratio(took, method)}


def ratio(took: dict[str, float], method: str) -> float | None:
    """Of the time of a step to that of the unquantized UNet; None where that was not measured before."""
    return took[method] / took["unquantized"] if "unquantized" in took else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("quantized", nargs="+", metavar="QUANTIZED")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["unquantized", *METHODS[:3]])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--local_batch", type=int, default=8)
    parser.add_argument("--decode", choices=("step", "call"), default="step")
    parser.add_argument("--finetune_lr", type=float)
    parser.add_argument("--code_lr", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--points", metavar="FOLDER", help="keep the teacher outputs here, or find them here")
    parser.add_argument("--keep", metavar="FOLDER", help="save the trained UNets below it")
    arguments = parser.parse_args()
    missing = {"codes", "codebooks"} - set(arguments.methods)
    if "codebooks_as_long" in arguments.methods and missing:
        parser.error("--methods codebooks_as_long needs codebooks and codes before it")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.points or temporary)
        if not all((folder / f"{name}.safetensors").is_file() for name in PROMPTS):
            record(arguments, folder)
        for quantized in arguments.quantized:
            for row in rows(quantized, arguments, folder):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
