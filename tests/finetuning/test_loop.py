"""Which step is kept, and when training stops."""

from types import SimpleNamespace

import pytest
import tiny_students
import torch

from vqdm.errors import RunError
from vqdm.finetuning.code_updates import CodeUpdates, CodeUpdateSettings
from vqdm.finetuning.evaluation import evaluate
from vqdm.finetuning.loop import Checkpoints, EvaluationSchedule, Loop, TrainingSchedule, is_better
from vqdm.finetuning.trainer import Diverged, Trainer, stored_types, write_back
from vqdm.tracking import JsonLines, Tracker

NAN = float("nan")


def figures(db: float, median_db: float) -> dict[str, float]:
    return {"db": db, "median_db": median_db}


@pytest.mark.parametrize(
    ("found", "best", "better"),
    [
        ((-31.0, -41.0), (-30.0, -40.0), True),
        ((-35.0, -39.9), (-30.0, -40.0), False),  # the sum gains what most prompts lose
        ((-29.9, -45.0), (-30.0, -40.0), False),
        ((-30.0, -40.0), (-30.0, -40.0), False),
        ((-30.001, -40.001), (-30.0, -40.0), False),  # no gain that could be distinguished
        ((-31.5, -40.9), (-31.0, -41.0), True),  # the median may lose to the best, but not to step 0
        ((-31.0, -41.0), (-31.5, -41.5), False),
        ((NAN, -50.0), (-30.0, -40.0), False),
        ((-50.0, NAN), (-30.0, -40.0), False),
        ((float("inf"), float("inf")), (-30.0, -40.0), False),
    ],
)
def test_a_better_step_gains_and_has_neither_figure_above_step_0(found, best, better):
    errors = SimpleNamespace(figures=figures(*found))
    assert is_better(errors, figures(*best), figures(-30.0, -40.0)) == better


def loop(folder, unet, total: int = 12, patience: int = 0, **options) -> Loop:
    """A loop that evaluates after every step, on the training points."""
    types, points = stored_types(unet), tiny_students.points(tiny_students.teacher())
    trainer = tiny_students.trainer(unet, total, **options)
    schedule = TrainingSchedule(lambda epoch: points, 3, total, 8, "uniform", 0)
    evaluations = EvaluationSchedule(1, 2, 0, True, patience, 0.0, types, lambda step: None)
    checkpoints, log = Checkpoints(folder, 2), JsonLines(folder / "log.jsonl")
    tracker = Tracker("none", "", folder, {})
    return Loop(trainer, schedule, (points, points.all()), evaluations, checkpoints, log, tracker)


def harmful(monkeypatch, start: int, factor: float = 1.1) -> None:
    """Scale up the random codes, which are noise, at every step from `start` on."""
    real = Trainer.step

    def step(self, points, chosen):
        found = real(self, points, chosen)
        for name in tiny_students.NAMES if self.steps_done >= start else ():
            self.trained.tensors[f"{name}.scales"].data.mul_(factor)
        return found

    monkeypatch.setattr(Trainer, "step", step)


@pytest.mark.parametrize(("start", "best"), [(1, 0), (4, 3)])
def test_training_stops_after_evaluations_without_a_gain(start, best, tmp_path, monkeypatch, caplog):
    harmful(monkeypatch, start)
    held = loop(tmp_path, tiny_students.student(tiny_students.FORMATS["own"]), patience=2, finetune_lr=1e-3)
    with caplog.at_level("INFO"):
        held.run()
    assert (held.progress.best["step"], held.trainer.steps_done) == (best, best + 2)
    assert f"training stops at step {best + 2}: 2 evaluations without a gain over step {best}" in caplog.text
    held.save_checkpoint()
    again = loop(tmp_path, tiny_students.student(tiny_students.FORMATS["own"]), patience=2, finetune_lr=1e-3)
    again.resume(best + 2)
    again.run()
    assert again.trainer.steps_done == best + 2


def test_patience_of_zero_never_stops_training(tmp_path, monkeypatch):
    harmful(monkeypatch, 1, 1.001)
    held = loop(tmp_path, tiny_students.student(tiny_students.FORMATS["own"]), finetune_lr=1e-5)
    held.run()
    assert held.progress.best["step"] == 0 and held.trainer.steps_done == 12


def test_evaluated_is_what_would_be_stored(tmp_path):
    """Steps too short for float16 to keep gain nothing, though the exact parameters are better."""
    unet = tiny_students.student(tiny_students.FORMATS["own"])
    types = dict.fromkeys(stored_types(unet), torch.float16)
    write_back(unet, types, torch.float32)
    held = loop(tmp_path, unet, 3, finetune_lr=1e-6, lr_scheduler="constant")
    held.evaluations = held.evaluations._replace(stored_types=types)
    held.run()
    assert held.progress.best["step"] == 0
    assert evaluate(held.trainer.loss_fn, *held.held_out).loss < held.progress.first["loss"]


def test_a_learning_rate_by_the_error_is_chosen_once_and_resumed(tmp_path, caplog):
    spec = tiny_students.FORMATS["own"]
    with caplog.at_level("INFO"):
        held = loop(tmp_path, tiny_students.student(spec), 4, finetune_lr="auto")
        held.run()
    chosen = held.progress.learning_rate
    lines = [line for line in caplog.messages if line.startswith("learning rate")]
    assert len(lines) == 1 and f"learning rate {chosen:g}, chosen by the held-out error" in lines[0]
    again = loop(tmp_path, tiny_students.student(spec), 4, finetune_lr="auto")
    again.resume(2)
    assert again.trainer.learning_rate == again.progress.learning_rate == chosen
    again.run()
    for name, tensor in held.trainer.result_tensors().items():
        assert torch.equal(again.trainer.result_tensors()[name], tensor), name


def test_a_first_step_that_is_not_a_number_leaves_step_0_as_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "compute_gradients", lambda *_: NAN)
    unet = tiny_students.student(tiny_students.FORMATS["own"])
    before = {name: tensor.detach().float().clone() for name, tensor in unet.named_parameters()}
    held = loop(tmp_path, unet)
    with pytest.raises(Diverged):
        held.run()
    assert held.progress.best["step"] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in held.checkpoints.load_best(0).items())


def test_the_average_is_what_is_evaluated(tmp_path, monkeypatch):
    """One step that ruins the parameters hardly moves their average."""
    harmful(monkeypatch, 3, 1.5)
    held = loop(tmp_path, tiny_students.student(tiny_students.FORMATS["own"]), 3, ema_decay=0.999, finetune_lr=1e-3)
    held.trainer.average.update = lambda step: None
    held.run()
    rows = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if "held_out_db" in line]
    assert len({line.split("held_out_loss")[1] for line in rows}) == 1 and held.progress.best["step"] == 0


@pytest.mark.parametrize("trained", ["plain", "average", "codes"])
def test_a_learning_rate_that_does_harm_is_reduced(trained, tmp_path, monkeypatch):
    """Training goes back to the best step and gains with the smaller one; also from a checkpoint in between."""
    monkeypatch.setattr("vqdm.finetuning.loop.choose_learning_rate", lambda *_: 0.5)
    options = {"ema_decay": 0.5 if trained == "average" else 0.0, "finetune_lr": "auto", "lr_warmup_steps": 1}

    def learner() -> Loop:
        unet = tiny_students.student(tiny_students.FORMATS["own"])
        updates = CodeUpdates(unet, CodeUpdateSettings(code_lr=0.3, code_fraction=0.5)) if trained == "codes" else None
        return loop(tmp_path, unet, 10, updates=updates, **options)

    straight = learner()
    straight.run()
    progress = straight.progress
    assert progress.reductions > 1 and progress.best["step"] > 0 and straight.trainer.steps_done == 10
    assert progress.best["db"] < progress.first["db"] - 0.1
    assert straight.trainer.learning_rate == pytest.approx(0.5 / 3**progress.reductions)
    state = straight.checkpoints.load_state(8)
    assert state["reductions"] > 0
    again = learner()
    again.resume(8)
    again.run()
    assert again.progress == progress
    for name, tensor in straight.trainer.result_tensors().items():
        assert torch.equal(again.trainer.result_tensors()[name], tensor), name


def test_the_last_step_on_request_is_not_undone(tmp_path, monkeypatch):
    monkeypatch.setattr("vqdm.finetuning.loop.choose_learning_rate", lambda *_: 1e-5)
    harmful(monkeypatch, 1)
    held = loop(tmp_path, tiny_students.student(tiny_students.FORMATS["own"]), 3, finetune_lr="auto")
    held.evaluations = held.evaluations._replace(keep_best=False)
    held.run()
    assert (held.progress.reductions, held.progress.best["step"], held.trainer.steps_done) == (0, 0, 3)


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
        patch.setattr("vqdm.finetuning.loop.save_checked_json", lambda *_: 1 / 0)
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
