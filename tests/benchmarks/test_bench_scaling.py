"""The simulation of many GPUs on problems whose answer is known."""

import bench_scaling
import pytest
from bench_scaling import Machine, block_passes, layer_seconds, played, reached, slowest
from sdxl import sdxl_layers

FREE = Machine(unet_seconds=0.0, batches=1, reduce_gbs=1e30, disk_gbs=1e30, memory_gb=1e9)


@pytest.fixture(scope="module")
def seconds():
    return {layer: 1.0 + layer.columns / 1e4 for layer in sdxl_layers()}


def test_one_gpu_needs_the_sum_and_many_the_largest_of_each_block(seconds):
    total = sum(seconds.values())
    assert played(1, seconds, FREE)["hours"] * 3600 == pytest.approx(total, abs=0.02)
    largest: dict[str, float] = {}
    for layer, value in seconds.items():
        largest[layer.block] = max(largest.get(layer.block, 0.0), value)
    row = played(10_000, seconds, FREE)
    assert row["hours"] * 3600 == pytest.approx(sum(largest.values()), abs=0.02)
    assert row["bound_by"] == "block order"


def test_losses_and_the_perfect_share_make_the_whole(seconds):
    machine = Machine(unet_seconds=1.0, batches=100, reduce_gbs=20.0, disk_gbs=1.0, memory_gb=8.0)
    for world in (1, 3, 16):
        row = played(world, seconds, machine)
        parts = block_passes(list(seconds), 8.0)
        recorded = sum(reached(block, list(seconds)) for block, _ in parts) * 100
        perfect = (sum(seconds.values()) + recorded) / world / 3600
        assert row["hours"] * (1 - sum(row["lost"].values())) == pytest.approx(perfect, rel=2e-3)


def test_passes_hold_all_layers_once(seconds):
    found = [layer for _, groups in block_passes(list(seconds), 8.0) for group in groups for layer in group]
    assert len(found) == len(set(found)) == 771
    assert reached("up_blocks.2", list(seconds)) == 1.0 > reached("mid_block", list(seconds)) > 0


def test_rows_of_a_shape_count_before_the_fit():
    rows = [(64, 64, 1.0), (1280, 1280, 7.0), (1280, 1280, 9.0)]
    found = layer_seconds(rows, 2.0)
    own = [value for layer, value in found.items() if (layer.rows, layer.columns) == (1280, 1280)]
    assert set(own) == {4.0}
    assert slowest(list(found)[:3], found, 1) == pytest.approx(sum(list(found.values())[:3]))


def test_layers_with_one_input_are_known_by_name():
    names = ["a.attn1.to_q", "a.attn1.to_v", "b.attn2.to_k", "c.attn2.to_v", "b.attn2.to_q"]
    found = [bench_scaling.shared_input(name) for name in names]
    assert found[0] == found[1] != found[2] == found[3] != found[4]
