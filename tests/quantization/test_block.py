import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from main_text2image import main
from tiny_runs import command

from vqdm.additive.code import CodeSpec
from vqdm.cli import run_script
from vqdm.diffusion.blocks import Layer
from vqdm.quantization import block as solving
from vqdm.quantization.block import threads as side_by_side


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def code_hashes(out: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("unet/*.safetensors"))]


def test_layers_solved_side_by_side_give_the_same_bytes(pipelines, prompt_file, tmp_path, threads):
    found = []
    for count in (1, 3):
        threads(count)
        out, only = tmp_path / str(count), ["--layer_filter", "mid_block.*attn"]
        assert run_script(main, command(pipelines["sdxl"], prompt_file, out, *only)) == 0
        assert torch.get_num_threads() == count
        found.append(code_hashes(out))
    assert found[0] == found[1] and found[0]


def test_a_failing_layer_is_named_and_threads_are_restored(
    pipelines, prompt_file, tmp_path, monkeypatch, capsys, threads
):
    def fail(*_):
        raise ValueError("cannot be solved")

    threads(2)
    monkeypatch.setattr("vqdm.quantization.block.Task", fail)
    only = ["--layer_filter", r"mid_block.*attn1\.to_q"]
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "out", *only)) == 1
    assert "layer mid_block.attentions.0.transformer_blocks.0.attn1.to_q: cannot be solved" in capsys.readouterr().err
    assert torch.get_num_threads() == 2


def layers(*shapes: tuple[int, int, int]) -> list[Layer]:
    return [Layer(str(k), "mid_block", "linear", *shape, CodeSpec(M, 4, 4)) for k, (*shape, M) in enumerate(shapes)]


def names(batches: list[list[Layer]]) -> list[str]:
    return ["".join(layer.name for layer in some) for some in batches]


def test_layers_of_one_shape_and_format_are_solved_together():
    some = layers((64, 64, 1), (64, 32, 1), (64, 64, 1), (64, 64, 2), (64, 32, 1), (64, 64, 1))
    assert names(solving.batches(some, 10**9)) == ["025", "14", "3"]
    assert names(solving.batches(some, 0)) == list("012345")
    assert names(solving.batches(some, 2 * 4 * 22 * 64 * 64)) == ["02", "5", "14", "3"]  # two of 64 x 64 fit


def test_no_more_layers_than_keep_a_gpu_busy():
    assert solving.layers_at_once(1280, 1280, 10**15) == 25
    assert solving.layers_at_once(2**16, 64, 10**15) == solving.layers_at_once(64, 64, 1) == 1


def test_on_a_cpu_each_layer_is_solved_by_itself():
    assert solving.batch_memory(torch.device("cpu")) == 0


def errors(out: Path) -> dict[str, float]:
    rows = map(json.loads, (out / "layers.jsonl").read_text().splitlines())
    return {row["name"]: row["error"] for row in rows}


@pytest.fixture
def batched(monkeypatch):
    """The sizes of the batches that are solved while layers are taken together."""
    sizes, solve = [], solving.solve_layers
    monkeypatch.setattr(solving, "batch_memory", lambda _: 10**9)
    monkeypatch.setattr(solving, "solve_layers", lambda tasks: sizes.append(len(tasks)) or solve(tasks))
    return sizes


ONLY = ["--layer_filter", "mid_block.*attn"]


def test_a_model_solved_in_batches_has_the_same_errors(pipelines, prompt_file, tmp_path, threads, batched, monkeypatch):
    threads(1)
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "together", *ONLY)) == 0
    assert max(batched) > 1 and sum(batched) == len(errors(tmp_path / "together"))
    monkeypatch.setattr(solving, "batch_memory", lambda _: 0)
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "alone", *ONLY)) == 0
    assert errors(tmp_path / "together") == pytest.approx(errors(tmp_path / "alone"), rel=0.05)


def test_an_interrupted_run_solves_one_batch_again(pipelines, prompt_file, tmp_path, threads, batched, monkeypatch):
    threads(1)
    line, solve = command(pipelines["sdxl"], prompt_file, tmp_path / "out", *ONLY), solving.solve_layers

    def interrupted(tasks):
        if batched:
            raise KeyboardInterrupt
        return solve(tasks)

    monkeypatch.setattr(solving, "solve_layers", interrupted)
    assert run_script(main, line) == 130
    done = list((tmp_path / "out" / "work" / "layers").iterdir())
    assert len(done) == sum(batched)
    monkeypatch.setattr(solving, "solve_layers", solve)
    assert run_script(main, [*line, "--resume"]) == 0
    assert sum(batched) == len(errors(tmp_path / "out"))


@pytest.fixture
def ctrl_c():
    """SIGINT means what it does in a program, also where the tests are run by a process that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_does_not_wait_for_layers_under_way(ctrl_c):
    going, done = threading.Event(), []

    def work(_):
        os.kill(os.getpid(), signal.SIGINT)
        done.append(going.wait(60))

    with pytest.raises(KeyboardInterrupt), side_by_side(2) as mapped:
        list(mapped(work, range(4)))
    assert not done
    going.set()
