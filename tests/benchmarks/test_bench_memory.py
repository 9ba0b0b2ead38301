"""The figure of bench_memory.py, and what it measures on the tiny pipelines: memory stays flat over a long run."""

import threading

import pytest
from bench_memory import Sample, generate, growth, quantize_all, report, watched

FLAT = 24e6  # bytes: three times what the allocator's own ups and downs came to; a leaked UNet batch is more in 500

PROMPTS = [f"a big red circle number {k}" for k in range(12)]


def test_growth_is_that_of_the_second_half():
    samples = [Sample(float(k), level) for k, level in enumerate([0, 50, 90, 95, 92, 80, 97, 96])]
    assert growth(samples) == 97 - 95
    lines = report(samples, 4)
    assert [line["second"] for line in lines[:-1]] == [0.0, 2.0, 4.0, 6.0] and lines[-1]["samples"] == 8


def test_the_watch_ends_with_the_work():
    def fail():
        raise ValueError("broken")

    threads = threading.active_count()
    with pytest.raises(ValueError, match="broken"):
        watched(fail)
    assert threading.active_count() == threads


@pytest.mark.long
def test_five_hundred_batches_leave_memory_flat(pipelines, tmp_path):
    assert growth(watched(lambda: generate(str(pipelines["sdxl"]), PROMPTS, 500, tmp_path))) < FLAT


@pytest.mark.long
def test_all_layers_leave_memory_flat(pipelines, tmp_path):
    assert growth(watched(lambda: quantize_all(str(pipelines["sdxl"]), PROMPTS, tmp_path), interval=0.02)) < FLAT
