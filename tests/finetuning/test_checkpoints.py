import pytest
import torch

from vqdm.errors import RunError
from vqdm.finetuning.checkpoints import Checkpoints

STATE = {"best": {"step": 1, "loss": 0.5}, "scaler": {}}


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "parameters": {"a.b": torch.full((2, 3), value)},
        "optimizer": {"step.a.b": torch.tensor(value)},
        "average": {},
    }


def test_what_was_saved_comes_back(tmp_path):
    held = Checkpoints(tmp_path, 2)
    held.save(7, tensors(0.1), STATE)
    numbers = torch.rand(3)
    assert held.steps() == [7] and held.load_state(7) == STATE | {"step": 7}
    found = held.load(7)
    assert torch.equal(found["parameters"]["a.b"], torch.full((2, 3), 0.1)) and found["average"] == {}
    assert found["optimizer"]["step.a.b"].shape == ()
    assert torch.equal(torch.rand(3), numbers)  # the generator was restored


def test_the_last_ones_are_kept_with_the_best_that_they_name(tmp_path):
    held = Checkpoints(tmp_path, 2)
    for step, best in ((10, 1), (20, 2), (30, 3)):
        held.save_best(best, {"a": torch.tensor(float(best))})
        held.save(step, tensors(0.0), STATE | {"best": {"step": best}})
    assert held.steps() == [20, 30]
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["step-2.safetensors", "step-3.safetensors"]
    assert held.load_best(3)["a"] == 3
    held.clear()
    assert not list(tmp_path.iterdir())


def test_a_half_written_checkpoint_is_none(tmp_path, monkeypatch):
    held = Checkpoints(tmp_path, 2)
    held.save(1, tensors(0.0), STATE)
    with monkeypatch.context() as patch:
        patch.setattr("vqdm.finetuning.checkpoints.save_checked_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            held.save(2, tensors(0.0), STATE)
    assert held.steps() == [1]
    held.save(2, tensors(0.0), STATE)
    assert held.steps() == [1, 2] and not (tmp_path / "checkpoint-partial").exists()


def test_a_damaged_file_is_named(tmp_path):
    held = Checkpoints(tmp_path, 2)
    held.save(1, tensors(0.0), STATE)
    path = tmp_path / "checkpoint-1" / "parameters.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match=r"parameters.safetensors is missing or damaged"):
        held.load(1)
