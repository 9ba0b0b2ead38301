import hashlib
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from main_text2image import main
from test_quantize import command

from vqdm.cli import run_script
from vqdm.jobs.solving import threads as side_by_side


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
    monkeypatch.setattr("vqdm.jobs.solving.solve_layer", fail)
    only = ["--layer_filter", r"mid_block.*attn1\.to_q"]
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "out", *only)) == 1
    assert "layer mid_block.attentions.0.transformer_blocks.0.attn1.to_q: cannot be solved" in capsys.readouterr().err
    assert torch.get_num_threads() == 2


def test_ctrl_c_does_not_wait_for_layers_under_way():
    going, done = threading.Event(), []

    def work(_):
        os.kill(os.getpid(), signal.SIGINT)
        done.append(going.wait(60))

    with pytest.raises(KeyboardInterrupt), side_by_side(2) as mapped:
        list(mapped(work, range(4)))
    assert not done
    going.set()
