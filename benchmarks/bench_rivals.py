"""Error of a denoiser's output, quantized by other packages and by vqdm, against stored bits: a JSON line each, a plot.

    SDNQ_USE_TORCH_COMPILE=0 python benchmarks/bench_rivals.py assets/shapes-xl prompts/shapes_evaluation.csv \\
        --quantized out/bits/ours-* --plot out/rivals.png

The full-precision model samples the prompts; its inputs and outputs are recorded, and every quantized one is
asked the same. Packages leave different layers alone, so bits are given twice: those of the quantized weights over
their number, and those of the whole denoiser over its parameters, where what is left in floating point counts as 16
bit. Packages that are not installed say so in their row.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rivals import RIVALS, bits_on_disk
from torch import nn

from vqdm.diffusion.denoisers import denoiser_of
from vqdm.diffusion.model_folders import find_denoiser, load_denoiser
from vqdm.diffusion.pipelines import load_pipeline
from vqdm.diffusion.sampling import EVALUATION_SEED_OFFSET, error_spread, point_errors, record_evaluation
from vqdm.diffusion.trajectories import Trajectories
from vqdm.documents import first_line
from vqdm.fidelity import decibels
from vqdm.layers.quantized import decoded_once
from vqdm.prompts import choose, load_prompts


def changed_weights(model: nn.Module, plain: nn.Module) -> int:
    """Weights of the layers of `plain` that `model` holds in another form."""
    held = dict(model.named_modules())
    layers = [(held[name], layer) for name, layer in plain.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    changed = [
        now for now in layers if type(now[0]) is not type(now[1]) or type(now[0].weight.data) is not torch.Tensor
    ]
    return sum(layer.weight.numel() for _, layer in changed)


def bits_of(model: nn.Module, plain: nn.Module) -> dict[str, float | None]:
    """Stored bits, of a quantized weight (None where none is) and of a parameter of the whole denoiser."""
    bits, parameters = bits_on_disk(model), sum(tensor.numel() for tensor in plain.parameters())
    quantized = changed_weights(model, plain)
    alone = (bits - 16 * (parameters - quantized)) / quantized if quantized else None
    return {"bits_of_quantized_weights": alone, "bits_of_model": bits / parameters}


def rows(plain: nn.Module, recorded: Trajectories, arguments: argparse.Namespace) -> Iterator[dict]:
    """Of weights rounded to bfloat16, of every package that can, and of the quantized folders."""

    def row(name: str, model: nn.Module) -> dict:
        errors, energies = point_errors(model, recorded, arguments.bs)
        error = {"output_error_db": decibels(sum(errors), sum(energies)), **error_spread(errors, energies)}
        return {"model": name, **bits_of(model, plain), **error}

    yield row("bfloat16", copy.deepcopy(plain).to(torch.bfloat16).float())
    for name in arguments.backends:
        try:
            yield row(name, RIVALS[name](copy.deepcopy(plain)))
        except Exception as error:  # whatever a package raises where it cannot
            yield {"model": name, "unable": f"{type(error).__name__}: {first_line(error)}"}
    for folder in arguments.quantized:
        model = load_denoiser(find_denoiser(folder), torch.float32).to(arguments.device)
        with decoded_once(model):
            yield row(f"vqdm {Path(folder).name}", model)


def plot(found: list[dict], path: str) -> None:
    """Error over bits: a line for ours, a mark for each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    able = [
        (row["model"], row["bits_of_quantized_weights"], row["output_error_db"])
        for row in found
        if row.get("bits_of_quantized_weights")
    ]
    ours = sorted((bits, error) for name, bits, error in able if name.startswith("vqdm "))
    if ours:
        axes.plot(*zip(*ours, strict=True), "o-", color="black", label="vqdm --target_bits")
    for marker, (name, bits, error) in zip("sD^v<>PX*hpd", [one for one in able if one[0] in RIVALS], strict=False):
        axes.plot(bits, error, marker, linestyle="none", label=name)
    axes.axhline(found[0]["output_error_db"], color="grey", linestyle=":", label="weights rounded to bfloat16")
    axes.set_xlabel("stored bits a quantized weight, scales and codebooks included")
    axes.set_ylabel("output error on held-out prompts, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("prompts", metavar="PROMPTS")
    parser.add_argument("--quantized", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--backends", nargs="*", choices=RIVALS, default=list(RIVALS), metavar="NAME")
    parser.add_argument("--nsamples", type=int, default=24, help="prompts")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--bs", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", metavar="PNG")
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.model, torch.device(arguments.device), torch.float32)
    settings = {"num_inference_steps": arguments.num_inference_steps, "guidance_scale": arguments.guidance_scale}
    prompts = choose(load_prompts(arguments.prompts, "PROMPTS"), arguments.nsamples, 0, arguments.prompts, "--nsamples")
    recorded, _ = record_evaluation(pipeline, prompts, EVALUATION_SEED_OFFSET, settings, arguments.bs)
    found = []
    for row in rows(denoiser_of(pipeline), recorded, arguments):
        found.append(row)
        print(json.dumps(row), flush=True)
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
