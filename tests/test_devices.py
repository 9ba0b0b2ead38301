"""Batches that are halved where memory ends; devices and types: diffusion/test_pipelines.py."""

from itertools import accumulate, chain, repeat
from types import SimpleNamespace

import pytest
import torch

from vqdm import devices
from vqdm.devices import BatchSize, matmul_rate, use_device
from vqdm.errors import RunError

ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not enough memory")]


@pytest.mark.parametrize("error", ERRORS)
def test_a_batch_size_is_halved_for_good(error, caplog):
    tried, size = [], BatchSize(8)

    def limited(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise error
        return sum(batch)

    with caplog.at_level("INFO", "vqdm"):
        found = list(size.batches(limited, range(7))) + list(size.batches(limited, [7, 8]))
    assert [item for batch, _ in found for item in batch] == list(range(9))
    assert all(total == sum(batch) for batch, total in found)
    assert tried == [7, 3, 3, 1, 2] and size.value == 3
    assert "out of memory at batch size 7; continuing with 3" in caplog.text


def test_a_result_may_be_none_and_other_errors_pass_through():
    assert [found for _, found in BatchSize(2).batches(lambda _: None, [1, 2, 3])] == [None, None]

    def fail(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(BatchSize(2).batches(fail, [1, 2]))


def test_out_of_memory_at_batch_size_1_is_an_error_with_advice():
    def fail(_):
        raise ERRORS[0]

    with pytest.raises(RunError, match="out of memory at batch size 1; try less"):
        list(BatchSize(4, "try less").batches(fail, [1, 2, 3]))


@pytest.mark.parametrize(("tick", "size"), [(0.001, 1024), (1.0, 256)])
def test_the_rate_of_matrix_products_is_their_operations_over_the_time(tick, size, monkeypatch):
    """By a clock that moves a tick at each reading, ten from the tenth on; sizes double until a product takes long."""
    readings = accumulate(chain([tick] * 9, repeat(10 * tick)))
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    elapsed = 10 * tick if size == 1024 else tick
    assert matmul_rate(torch.device("cpu"), torch.float32) == pytest.approx(2 * size**3 / elapsed)


def test_the_cpu_has_no_number_so_that_weights_stay_where_they_are():
    """Tensors on "cpu" are copied where they are moved to the "cpu:0" of a launch of several processes."""
    weight = torch.zeros(3)
    assert weight.to(use_device(torch.device("cpu:0"))) is weight


def test_mapped_files_do_not_count_twice_as_free(monkeypatch):
    """The system can have their pages at any time, and counts them as available."""
    texts = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   5 kB\n", "/proc/self/statm": "90 30 20 1 0 2 0"}
    monkeypatch.setattr(devices.Path, "read_text", lambda path: texts[str(path)])
    monkeypatch.setattr(devices.resource, "getpagesize", lambda: 4096)
    assert devices.free_memory(torch.device("cpu")) == (None, 5 * 1024 + 10 * 4096)
