"""Memory and time of Fréchet moments as images stream in, and of the distance, at Inception's 2048 features.

python benchmarks/bench_moments.py --counts 1000 10000
"""

from __future__ import annotations

import argparse
import time

import torch

from vqdm.devices import peak_memory
from vqdm.metrics.frechet import FeatureMoments, FeatureStatistics, frechet_distance

WIDTH, BATCH = 2048, 64


def streamed(count: int, seed: int) -> FeatureStatistics:
    """Statistics of `count` random feature vectors that are never all in memory."""
    generator, moments = torch.Generator().manual_seed(seed), FeatureMoments(WIDTH)
    for start in range(0, count, BATCH):
        moments.add(torch.randn(min(BATCH, count - start), WIDTH, generator=generator).relu())
    return FeatureStatistics(moments.mean(), moments.covariance(), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000])
    counts = parser.parse_args().counts
    reference = streamed(counts[0], seed=1)
    print(f"| images | peak memory | ms per image | distance to {counts[0]:,} others | seconds for the distance |")
    print("|---|---|---|---|---|")
    for count in counts:
        began = time.perf_counter()
        statistics = streamed(count, seed=0)
        middle = time.perf_counter()
        distance = frechet_distance(statistics, reference)
        seconds, memory = time.perf_counter() - middle, peak_memory()["host"] / 1e9
        milliseconds = 1000 * (middle - began) / count
        print(f"| {count:,} | {memory:.2f} GB | {milliseconds:.2f} | {distance:.3f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
