"""Memory of this process over a long run: one JSON line per sample, then one with the growth.

    python benchmarks/bench_memory.py generate assets/shapes-xl prompts/shapes_test.csv --batches 500
    python benchmarks/bench_memory.py quantize assets/shapes-xl prompts/shapes_test.csv

`generate` makes one image per batch, of one sampling step; `quantize` solves every default layer, at settings that take
little time a layer. Memory is the resident set; the growth compares the largest of the last quarter of the run with the
largest of the second quarter, since caches fill and libraries are loaded in the first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from vqdm.additive.code import CodeSpec
from vqdm.additive.solve import SolverConfig
from vqdm.config import SamplingConfig
from vqdm.generation.config import GenerateConfig
from vqdm.generation.job import generate_images
from vqdm.prompts import load_prompts
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.job import quantize


@dataclass(frozen=True)
class Sample:
    """Resident bytes, so many seconds after the start."""

    seconds: float
    resident: int


def watched(work: Callable[[], object], interval: float = 0.1) -> list[Sample]:
    """Do the work, and look at this process's memory every `interval` seconds meanwhile."""
    process, done, samples, began = psutil.Process(), threading.Event(), [], time.perf_counter()

    def look() -> None:
        while not done.wait(interval):
            samples.append(Sample(time.perf_counter() - began, process.memory_info().rss))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return samples


def growth(samples: list[Sample]) -> int:
    """Bytes by which the last quarter's largest sample exceeds the second quarter's; negative where memory shrank."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    return max(one.resident for one in late) - max(one.resident for one in early)


def generate(model: str, prompts: list[str], batches: int, folder: Path) -> None:
    """Generate `batches` images, one per batch, of the prompts in turn."""
    file = folder / "prompts.txt"
    file.write_text("".join(f"{prompts[k % len(prompts)]}\n" for k in range(batches)), encoding="utf-8")
    sampling = SamplingConfig(num_inference_steps=1)
    out = str(folder / "out")
    shared = dict(model=model, output_dir=out, sampling=sampling, device="cpu")
    generate_images(GenerateConfig(prompts=str(file), bs=1, **shared))


def quantize_all(model: str, prompts: list[str], folder: Path) -> None:
    """Quantize every default layer, with little work a layer."""
    file = folder / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    config = QuantizeConfig(
        model=model, calibration_prompts=str(file), evaluation_prompts=str(file), output_dir=str(folder / "out"),
        device="cpu", sampling=SamplingConfig(num_inference_steps=2),
        solver=SolverConfig(CodeSpec(2, 4, 4), max_epochs=1, beam_size=2, init_max_iter=3),
        calibration_nsamples=min(10, len(prompts)), evaluation_nsamples=2, visualize_nsamples=1, xtx_batch_size=2,
    )  # fmt: skip
    quantize(config)


def report(samples: list[Sample], rows: int) -> list[dict]:
    """About `rows` samples, evenly spread, and the growth, as they are printed."""
    step = max(1, len(samples) // rows)
    lines = [{"second": round(one.seconds, 1), "MB": round(one.resident / 1e6, 1)} for one in samples[::step]]
    return [*lines, {"samples": len(samples), "growth_MB": round(growth(samples) / 1e6, 2)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("generate", "quantize"))
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--rows", type=int, default=20)
    arguments = parser.parse_args()
    prompts = load_prompts(arguments.prompts, "prompts")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "generate":
            samples = watched(lambda: generate(arguments.model, prompts, arguments.batches, Path(folder)))
        else:
            samples = watched(lambda: quantize_all(arguments.model, prompts, Path(folder)))
    for row in report(samples, arguments.rows):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
