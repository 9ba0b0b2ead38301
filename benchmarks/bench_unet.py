"""A UNet step's time and peak memory: full precision, ours by each decode backend, and other packages. JSON lines.

    python benchmarks/bench_unet.py --model sdxl-random                        # a GPU: 1024², guidance batch 2
    python benchmarks/bench_unet.py --model out/demo --threads 2               # a CPU, the small pipeline
    python benchmarks/bench_unet.py --model sdxl-random --compile --plot out/unet.png

MODEL is a UNet's or a pipeline's folder, quantized or not, or sdxl-random: the UNet of Stable Diffusion XL from its
configuration, with random weights, and with random codes of --code in layers that share codebooks. A quantized folder
is compared with its own decoded weights. Variants take turns in every repetition; a ratio is the median of those
within a repetition, to full precision; `processor_ratio` is that of the processors' time, which on a busy machine and
one thread says more than the clock. Peak memory is that of the variant's weights and of what a step holds
beside them: as the device counts on CUDA, tensors alone on the CPU. Packages that are missing or unable are skipped
with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import diffusers
import torch
from bench_decode import forced, spec_of, unet_inputs
from diffusers import UNet2DConditionModel
from random_unets import random_coded, random_plain, stored_bits
from rivals import RIVALS, held_bytes
from sdxl import CONFIG
from torch import nn

from vqdm.diffusion.shapes import LiveBytes
from vqdm.layers.decode import BACKENDS, CANDIDATES
from vqdm.layers.functional import free_scratch
from vqdm.layers.quantized import cast_plain, quantized_layers

RANDOM = "sdxl-random"
PLAIN = "full precision"


@dataclass
class Variant:
    """One row: a step to run, the bytes of its weights, and what is measured."""

    run: Callable[[], object]
    weights: int
    facts: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    working: int = 0

    def row(self, name: str, plain: Variant) -> dict:
        return {
            "variant": name,
            "ms": round(1e3 * median(self.seconds), 2),
            "least_ms": round(1e3 * min(self.seconds), 2),
            "ratio": ratio(self.seconds, plain.seconds),
            "ratio_of_least": round(min(self.seconds) / min(plain.seconds), 3),
            "processor_ratio": ratio(self.processor, plain.processor),
            "weights_mb": round(self.weights / 1e6, 2),
            "peak_mb": round((self.weights + self.working) / 1e6, 2),
        } | self.facts


def ratio(own: list[float], other: list[float]) -> float:
    """Median of the ratios within a repetition."""
    return round(median(a / b for a, b in zip(own, other, strict=True)), 3)


# ------------------------------------------------------------------------------------------------ models


def load(arguments: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """The UNet in full precision, and ours."""
    dtype, device, spec = getattr(torch, arguments.dtype), arguments.device, spec_of(arguments.code)
    if arguments.model == RANDOM:
        return random_plain(CONFIG, dtype, device), random_coded(CONFIG, spec, dtype, device)
    folder = Path(arguments.model)
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    unet = UNet2DConditionModel.from_pretrained(folder, dtype=dtype).to(device).requires_grad_(False)
    if not quantized_layers(unet):
        return unet, random_coded(dict(unet.config), spec, dtype, device)
    plain = copy.deepcopy(unet)
    plain.dequantize()
    cast_plain(plain, dtype)
    return plain, unet


def decode_backends(arguments: argparse.Namespace) -> list[str]:
    """The decode backends that the command line asks for, or all of the device; the compiler's own with --compile."""
    return arguments.paths or [*CANDIDATES.get(arguments.device.split(":")[0], ("torch",)), "auto"]


def variants(arguments: argparse.Namespace) -> Iterator[tuple[str, Variant | str]]:
    """Names, each with what to run or the reason why not."""
    plain, ours = load(arguments)
    step = unet_inputs(plain, arguments.batch, arguments.height, arguments.width, arguments.tokens)
    yield PLAIN, attempt(arguments, plain, step)
    facts = {"stored_bits": round(stored_bits(ours), 3)}
    for path in ["auto"] if arguments.compile else decode_backends(arguments):
        yield f"ours {path}", attempt(arguments, ours, step, partial(forced, path), facts)
    if arguments.group_offload:
        for name, unet in ((PLAIN, plain), ("ours auto", ours)):
            yield f"{name}, group offload", attempt(arguments, offloaded(unet, arguments.device), step, weights=0)
    for name in arguments.backends:
        try:
            rival = RIVALS[name](copy.deepcopy(plain))
        except Exception as error:  # what other packages raise is not known
            yield name, reason(error)
        else:
            yield name, attempt(arguments, rival, step)


def offloaded(unet: nn.Module, device: str) -> nn.Module:
    """A copy whose weights wait in RAM, and come to the device layer by layer; on CUDA while others compute."""
    unet, streams = copy.deepcopy(unet).to("cpu"), device.startswith("cuda")
    unet.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=streams)
    return unet


def attempt(
    arguments: argparse.Namespace,
    unet: nn.Module,
    step: dict,
    around: Callable | None = None,
    facts: dict | None = None,
    weights: int | None = None,
) -> Variant | str:
    """A variant that has run once and has been weighed; the reason where it fails.

    `weights`: bytes on the device between steps (default: of all tensors).
    """
    call = partial(torch.compile(unet, dynamic=False) if arguments.compile else unet, **step)
    held = held_bytes(unet) if weights is None else weights
    variant = Variant(partial(around, call) if around else call, held, facts or {})
    try:
        variant.run()  # compiles, and measures decode backends
        variant.working = working_bytes(variant.run, arguments.device)
    except Exception as error:
        return reason(error)
    return variant


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# ------------------------------------------------------------------------------------------------ measuring


def working_bytes(run: Callable[[], object], device: str) -> int:
    """The most that a step holds beside the weights."""
    free_scratch()
    if not device.startswith("cuda"):
        with LiveBytes() as live:
            run()
        return live.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(found: dict[str, Variant], steps: int, device: str) -> None:
    """Seconds of every variant, which take turns, after one turn that does not count."""
    for step in range(steps + 1):
        for variant in found.values():
            seconds, processor = timed(variant.run, device)
            if step:
                variant.seconds.append(seconds)
                variant.processor.append(processor)


def timed(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds by the clock and of this process on all processors."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start, processor = time.perf_counter(), time.process_time()
    run()
    wait()
    return time.perf_counter() - start, time.process_time() - processor


def plot(rows: list[dict], path: str) -> None:
    """Time against the bytes of the weights, a point a variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot(row["weights_mb"], row["ratio"], "o", color="C0" if row["variant"].startswith("ours") else "C7")
        axes.annotate(row["variant"], (row["weights_mb"], row["ratio"]), (5, 3), textcoords="offset points", size=8)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xlabel="weights, MB", ylabel="time of a UNet step, full precision = 1", xlim=(0, None))
    figure.savefig(path, dpi=150)


def machine(arguments: argparse.Namespace) -> dict:
    cuda = arguments.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    } | {name: getattr(arguments, name) for name in ("model", "code", "height", "width", "batch", "dtype", "compile")}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=RANDOM, metavar=f"DIR|{RANDOM}")
    parser.add_argument(
        "--code", default="1x12g4", metavar="MxbgG", help="of random codes: M codebooks, b bits, groups"
    )
    parser.add_argument("--height", type=int, help="of the image, in pixels (default: the model's own)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch", type=int, default=2, help="2: one image with guidance")
    parser.add_argument("--tokens", type=int, default=77, help="of the text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float16 on CUDA)")
    parser.add_argument("--threads", type=int, help="on the CPU")
    parser.add_argument("--steps", type=int, default=10, help="repetitions")
    parser.add_argument("--compile", action="store_true", help="every UNet by torch.compile")
    parser.add_argument("--group_offload", action="store_true", help="also with weights in RAM, on CUDA by streams")
    parser.add_argument(
        "--paths", nargs="+", choices=BACKENDS, help="decode backends (default: all that the device has)"
    )
    parser.add_argument("--backends", nargs="*", choices=RIVALS, default=list(RIVALS), metavar="NAME")
    parser.add_argument("--plot", metavar="FILE.png")
    return parser


def main(words: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(words)
    arguments.dtype = arguments.dtype or ("float16" if arguments.device.startswith("cuda") else "float32")
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    print(json.dumps(machine(arguments)), flush=True)
    found = {}
    with torch.no_grad():
        for name, variant in variants(arguments):
            if isinstance(variant, Variant):
                found[name] = variant
            else:
                print(json.dumps({"variant": name, "skipped": variant}), flush=True)
        measure(found, arguments.steps, arguments.device)
    rows = [variant.row(name, found[PLAIN]) for name, variant in found.items()]
    print("\n".join(map(json.dumps, rows)))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
