"""Images per second of generate.py against a bare diffusers loop, at the same batch size, loading left out.

    python benchmarks/bench_generate.py assets/shapes-xl prompts/shapes_test.csv --num_inference_steps 10
    python benchmarks/bench_generate.py stabilityai/stable-diffusion-xl-base-1.0 prompts/evaluation.csv --bs 8

Both save PNG files. They take turns, since other work on the machine slows either; the median of the rounds counts.
On a CPU the processor's own seconds are shown beside those of the clock: they do not see that other work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from vqdm.config import SamplingConfig
from vqdm.devices import pick_device, pick_dtype
from vqdm.diffusion.pipelines import generators, load_pipeline
from vqdm.generation.config import GenerateConfig
from vqdm.generation.job import requests_of_shard, run
from vqdm.generation.requests import call_settings
from vqdm.images import ImageFolder
from vqdm.parallel import launched
from vqdm.prompts import load_prompts, load_rows

Seconds = tuple[float, float]


def clocked(action: Callable[[], object]) -> Seconds:
    """Seconds that an action takes: by the clock, and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor


def bare_loop(pipeline, prompts: list[str], size: int, settings: dict, folder: Path) -> None:
    """What one writes without a tool: batches, seeds by number, files."""
    folder.mkdir()
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        noise = generators(0, list(range(start, start + len(batch))))
        for number, image in enumerate(pipeline(prompt=batch, generator=noise, **settings).images, start):
            image.save(folder / f"{number:06d}.png")


def tool(pipeline, config: GenerateConfig) -> None:
    """All that generate.py does after loading."""
    rows, folder = load_rows(config.prompts, "PROMPTS"), ImageFolder(Path(config.output_dir))
    folder.path.mkdir()
    with launched(config.device) as ranks:
        run(config, ranks, folder, pipeline, rows, requests_of_shard(config, rows))


def rounds(config: GenerateConfig, count: int) -> tuple[list[Seconds], list[Seconds]]:
    """Seconds of each round of the bare loop, and of generate.py, with the same pipeline."""
    device = pick_device(config.device)
    pipeline = load_pipeline(config.model, device, pick_dtype(config.dtype, device))
    prompts = load_prompts(config.prompts, "PROMPTS")[: config.limit]
    settings, home = call_settings(pipeline, config.sampling.call(), config.bs), Path(config.output_dir)
    bare_loop(pipeline, prompts[: config.bs], config.bs, settings, home / "warm")
    loops, tools = [], []
    for number in range(count):
        loops.append(clocked(partial(bare_loop, pipeline, prompts, config.bs, settings, home / f"loop-{number}")))
        tools.append(clocked(partial(tool, pipeline, replace(config, output_dir=str(home / f"tool-{number}")))))
    return loops, tools


def table(count: int, loops: list[Seconds], tools: list[Seconds]) -> str:
    """Images per second of both, and the median of the rounds' ratios."""
    lines = ["| | images per second | images per processor second |", "|---|---|---|"]
    for name, seconds in (("bare diffusers loop", loops), ("generate.py", tools)):
        rates = [count / statistics.median(kind) for kind in zip(*seconds, strict=True)]
        lines.append(f"| {name} | {rates[0]:.3f} | {rates[1]:.3f} |")
    pairs = list(zip(loops, tools, strict=True))
    ratios = [statistics.median(loop[kind] / tool[kind] for loop, tool in pairs) for kind in (0, 1)]
    return "\n".join([*lines, f"| ratio, median of {len(pairs)} rounds | {ratios[0]:.3f} | {ratios[1]:.3f} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--count", type=int, default=64, help="images per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bs", type=int, default=16)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    sampling = SamplingConfig(guidance_scale=options.guidance_scale, num_inference_steps=options.num_inference_steps)
    with tempfile.TemporaryDirectory() as home, torch.no_grad():
        config = GenerateConfig(
            model=options.model,
            prompts=options.prompts,
            output_dir=home,
            sampling=sampling,
            bs=options.bs,
            limit=options.count,
            device=options.device,
            dtype=options.dtype,
        )
        print(table(options.count, *rounds(config, options.rounds)))


if __name__ == "__main__":
    main()
