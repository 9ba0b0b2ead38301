"""Whole runs of finetune.py on a tiny pipeline."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import finetune
import pytest
import recorded
import tiny_students
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from settings_read import settings_read, undeclared

from vqdm.cli import run_script
from vqdm.config import SamplingConfig
from vqdm.diffusion.sampling import (
    EVALUATION_SEED_OFFSET,
    error_spread,
    output_error,
    point_errors,
    record_evaluation,
)
from vqdm.errors import UserError
from vqdm.finetuning.config import FinetuneConfig
from vqdm.finetuning.trainer import Trainer
from vqdm.layers.quantized import quantized_layers
from vqdm.prompts import choose

FAST = shlex.split(
    "--finetune_nsamples 6 --held_out_nsamples 4 --held_out_points 8 --evaluation_nsamples 2 --visualize_nsamples 2 "
    "--num_inference_steps 2 --xtx_batch_size 3 --finetune_batch_size 4 --local_batch_size 2 --finetune_max_epochs 2 "
    "--finetune_lr 0.005 --lr_warmup_steps 1 --eval_step 2 --checkpointing_steps 2 --finetune_scope denoiser"
)  # two epochs of three steps
EXTRA = shlex.split(
    "--finetune_method student+teacher --timestep_sampling error --ema_decay 0.5 --finetune_keep_best "
    "--visualize_step 3"
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, pipelines) -> Path:
    """A pipeline folder with some layers quantized, to shared codebooks, and one in 8 bit."""
    folder = tmp_path_factory.mktemp("quantized") / "pipeline"
    shutil.copytree(pipelines["sdxl"], folder, ignore=shutil.ignore_patterns("unet"))
    tiny_students.student(tiny_students.FORMATS["shared"], rounded=True).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def run(pipelines, quantized, prompt_file):
    """Runs the script with FAST flags and others; gives its exit status."""

    def of(out: Path, *extra: str, source: Path = quantized) -> int:
        words = [pipelines["sdxl"], source, prompt_file, prompt_file, "--output_dir", out]
        return run_script(finetune.main, [*map(str, words), *FAST, *extra])

    return of


@pytest.fixture(scope="module")
def read() -> set[str]:
    """Settings that the finished run has read."""
    return set()


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory, read) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    with settings_read(FinetuneConfig, read):
        assert run(out, *EXTRA) == 0
    return out


def test_a_setting_that_a_run_ignores_says_so(finished, read):
    assert not undeclared(finetune.PARSER, ["model", "quantized", "c", "e", *FAST, *EXTRA], read)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def hashes(folder: Path) -> dict[str, str]:
    """Digest of every file of the pipeline's parts."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if path.parent != folder]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_the_result_is_the_same_pipeline_with_other_numbers(finished, quantized):
    before, after = weights(quantized), weights(finished)
    assert {name: (one.shape, one.dtype) for name, one in before.items()} == {
        name: (one.shape, one.dtype) for name, one in after.items()
    }
    fixed = [name for name, tensor in before.items() if not tensor.is_floating_point()]
    assert len(fixed) > 3 and all(torch.equal(before[name], after[name]) for name in fixed)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.9 * (len(before) - len(fixed))
    configs = [json.loads((folder / "unet" / "config.json").read_text()) for folder in (quantized, finished)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert {name: one for name, one in hashes(quantized).items() if "unet" not in name}.items() <= hashes(
        finished
    ).items()
    pipeline = DiffusionPipeline.from_pretrained(finished)
    assert len(quantized_layers(pipeline.unet)) == len(tiny_students.NAMES)
    assert pipeline("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_summary_measures_what_was_saved(finished, quantized, pipelines, prompt_file):
    summary = json.loads((finished / "summary.json").read_text())
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    prompts = choose(prompt_file.read_text().splitlines(), 2, 0, "", "")
    settings = SamplingConfig(num_inference_steps=2).call()
    points, _ = record_evaluation(pipeline, prompts, EVALUATION_SEED_OFFSET, settings, 3)
    for folder, when, key in ((quantized, "before", "_before"), (finished, "after", "")):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        assert summary[f"unet_output_error_db_{when}"] == pytest.approx(output_error(unet, points, 4), abs=0.01)
        spread = error_spread(*point_errors(unet, points, 4))
        assert summary[f"unet_output_error_db_by_point{key}"] == pytest.approx(spread, abs=0.01)
        prompts = [recorded.some(points, slice(n, n + 1)) for n in (0, 1)]
        median = sum(output_error(unet, one, 4) for one in prompts) / 2
        assert summary[f"unet_output_error_median_db_{when}"] == pytest.approx(median, abs=0.01)
    assert summary["unet_output_error_db"] == summary["unet_output_error_db_after"]
    assert summary["learning_rate"] == 0.005 and summary["step_kept"] == summary["best"]["step"] > 0
    assert summary["unet_output_error_db"] < summary["unet_output_error_db_before"] - 0.3
    size = sum(path.stat().st_size for path in finished.glob("unet/*.safetensors"))
    assert summary["bytes_of_unet"] == size and summary["steps"] == 6 and summary["layers_in_8_bit"] == 1
    assert summary["seconds"]["training"] > 0


def test_what_is_left_behind(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"README.md", "run.json", "training.jsonl", "loss.png", "image_pairs.png", "images"} <= names
    assert not names & {"work", "best"} and not list(finished.glob("checkpoint*"))
    assert "import vqdm" in (finished / "README.md").read_text()
    with Image.open(finished / "image_pairs.png") as sheet:
        assert sheet.width > 2 * 128
    assert sorted(path.name for path in (finished / "images").iterdir()) == ["step-000003.png", "step-000006.png"]
    rows = log(finished)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out_db" in row] == [0, 2, 3, 4, 6]
    assert all(row["points_per_second"] > 0 and row["seconds_left"] >= 0 for row in rows if "loss" in row)


class Stopped(KeyboardInterrupt):
    pass


def stopping_after(steps: int):
    """Return a `Trainer.step` that is interrupted after `steps` steps."""
    real = Trainer.step

    def step(self, points, chosen):
        if self.steps_done == steps:
            raise Stopped
        return real(self, points, chosen)

    return step


def test_a_resumed_run_gives_the_same_bytes(finished, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping_after(5))
        assert run(tmp_path / "out", *EXTRA) == 130
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert run(tmp_path / "out", *EXTRA, "--resume") == 0
    assert hashes(tmp_path / "out") == hashes(finished)
    left, right = log(tmp_path / "out"), log(finished)
    assert [row["step"] for row in left] == [row["step"] for row in right]
    assert [row.get("loss") for row in left] == [row.get("loss") for row in right]


@pytest.mark.parametrize("cache", ["0", "32"])
def test_a_run_is_resumed_with_less_memory(finished, run, tmp_path, monkeypatch, cache):
    """Its losses are those of one go but for rounding, though the rest of an epoch is recorded in other batches."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping_after(3))
        assert run(out, *EXTRA, "--target_cache_gb", "32" if cache == "0" else "0") == 130
    for epoch in out.glob("work/epoch-*"):
        next(epoch.glob("000*-0003.safetensors")).unlink()
    less = ["--xtx_batch_size", "2", "--local_batch_size", "1", "--visualize_nsamples", "1", "--target_cache_gb", cache]
    assert run(out, *EXTRA, *less, "--resume") == 0
    left, right = ([row["loss"] for row in log(folder) if "loss" in row] for folder in (out, finished))
    assert left == pytest.approx(right, rel=1e-3)
    assert run(out, *EXTRA, "--finetune_batch_size", "3", "--resume") == 2


def test_a_finished_run_is_not_done_again(finished, run):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert run(finished, *EXTRA, "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_rising_loss_ends_training_and_the_best_is_kept(run, quantized, tmp_path, capsys):
    assert run(tmp_path / "out", "--finetune_lr", "0.9", "--lr_warmup_steps", "0") == 1
    complaint = capsys.readouterr().err.strip().splitlines()
    assert (
        len(complaint) == 1
        and ": step 0, the best by held-out error" in complaint[0]
        and "lower --finetune_lr" in complaint[0]
    )
    before, after = weights(quantized), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "summary.json").is_file()


def test_not_a_number_ends_training_and_the_best_is_kept(run, tmp_path, capsys, monkeypatch):
    real = Trainer.compute_gradients
    monkeypatch.setattr(
        Trainer, "compute_gradients", lambda self, *rest: real(self, *rest) if self.steps_done < 4 else float("nan")
    )
    assert run(tmp_path / "out") == 1
    assert "the loss is nan at step 5" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["best"]["step"] == 4
    best = next(row["held_out_db"] for row in log(tmp_path / "out") if row["step"] == 4 and "held_out_db" in row)
    assert summary["best"]["db"] == best
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values() if tensor.is_floating_point())


def test_a_student_that_gives_infinity_is_refused_before_training(run, quantized, tmp_path, capsys):
    large = tmp_path / "large"
    shutil.copytree(quantized, large)
    tensors = weights(large)
    tensors["conv_out.weight"].fill_(torch.finfo(tensors["conv_out.weight"].dtype).max)
    save_file(tensors, large / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert run(tmp_path / "out", "--finetune_lr", "auto", source=large) == 1
    assert "large gives NaN or infinity before training; use another --dtype" in capsys.readouterr().err


def test_keep_best_takes_the_best_and_not_the_last(run, tmp_path, monkeypatch):
    """The last step does harm: it makes the noise that random codes are larger."""
    real, seen = Trainer.step, {}

    def step(self, points, chosen):
        found = real(self, points, chosen)
        if self.steps_done == 6:
            for name in tiny_students.NAMES:
                self.trained.tensors[f"{name}.scales"].data.mul_(1.2)
        seen[self.steps_done] = {name: tensor.detach().clone() for name, tensor in self.trained.tensors.items()}
        return found

    monkeypatch.setattr(Trainer, "step", step)
    assert run(tmp_path / "out") == 0
    best = json.loads((tmp_path / "out" / "summary.json").read_text())["best"]
    losses = {row["step"]: row["held_out_loss"] for row in log(tmp_path / "out") if "held_out_loss" in row}
    assert best["loss"] == min(losses.values()) == losses[best["step"]] and 0 < best["step"] < 6
    saved = weights(tmp_path / "out")
    assert all(torch.equal(saved[name], tensor.to(saved[name].dtype)) for name, tensor in seen[best["step"]].items())


def ruined(real):
    """`Trainer.step` that makes the noise that random codes are larger."""

    def step(self, points, chosen):
        found = real(self, points, chosen)
        for name in tiny_students.NAMES:
            self.trained.tensors[f"{name}.scales"].data.mul_(1.05)
        return found

    return step


@pytest.mark.parametrize("extra", ["", "--ema_decay 0.5", "--update_codes --code_lr 0.3 --code_fraction 0.5"])
def test_steps_that_do_harm_leave_the_model_as_it_was(run, quantized, tmp_path, capsys, monkeypatch, extra):
    """By default, to the byte; training ends early, and the last line says that nothing was gained."""
    monkeypatch.setattr(Trainer, "step", ruined(Trainer.step))
    flags = f"--eval_step 1 --early_stopping_patience 2 --finetune_lr 1e-5 {extra}"
    assert run(tmp_path / "out", *shlex.split(flags)) == 0
    before, after = weights(quantized), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["step_kept"], summary["steps"], summary["groups_changed"]) == (0, 2, 0)
    for key in ("unet_output_error_db", "unet_output_error_median_db"):
        assert summary[f"{key}_after"] == pytest.approx(summary[f"{key}_before"], abs=1e-6)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("UNet-output error on evaluation prompts") and "kept step 0: nothing gained" in last


def test_the_last_step_is_kept_on_request(run, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "step", ruined(Trainer.step))
    assert run(tmp_path / "out", "--no-finetune_keep_best", "--max_steps", "2", "--finetune_lr", "1e-5") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["step_kept"], summary["best"]["step"]) == (2, 0)
    name = f"{tiny_students.NAMES[0]}.scales"
    assert not torch.equal(weights(quantized)[name], weights(tmp_path / "out")[name])


def test_an_epoch_that_gains_little_is_the_last(run, tmp_path):
    assert run(tmp_path / "out", "--finetune_relative_mse_tolerance", "0.99") == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 3


def test_real_images(run, tmp_path, finished):
    folder = tmp_path / "real"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (20 + k, 16), (60 * k, 100, 200)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("a red circle")
    extra = ["--finetune_method", "real", "--real_images", str(folder), "--max_steps", "2", "--target_cache_gb", "0"]
    assert run(tmp_path / "out", *extra) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--finetune_method", "dreams"], "--finetune_method is 'dreams'; allowed are teacher, student, real"),
        (["--finetune_method", "real"], "--real_images FOLDER are given together"),
        (["--held_out_nsamples", "12"], "--held_out_nsamples is 12, but"),
        (["--finetune_nsamples", "9"], "--finetune_nsamples is 9, but"),
        (["--evaluation_nsamples", "12"], "holds 0 prompts besides 12 evaluation prompts"),
        (["--finetune_batch_size", "13"], "--finetune_batch_size is 13, but an epoch has 12 points"),
        (["--visualize_nsamples", "3"], "--visualize_nsamples 3 is more"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, flags, words):
    assert run(tmp_path / "out", *flags) == 2
    complaint = capsys.readouterr().err.strip().splitlines()
    assert len(complaint) == 1 and words in complaint[0]


def test_a_quantized_teacher_is_refused(quantized, prompt_file, tmp_path, capsys):
    words = [quantized, quantized, prompt_file, prompt_file, "--output_dir", tmp_path / "out", "--dry_run"]
    assert run_script(finetune.main, [*map(str, words), *FAST]) == 2
    assert "which is the teacher" in capsys.readouterr().err


def test_a_dry_run_checks_the_output_folder_as_a_run_does(run, tmp_path, capsys):
    file, foreign = tmp_path / "file", tmp_path / "foreign"
    file.write_text("text")
    foreign.mkdir()
    (foreign / "mine.txt").write_text("text")
    for out, words in ((file, "is not a run"), (foreign, "is not a run"), (file / "below", "cannot be written")):
        assert run(out, "--dry_run") == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: --output_dir ") and words in line
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "run.json").write_text('{"settings": {}, "versions": {}}')
    assert run(run_folder, "--dry_run") == 2 and "holds a run already; add --resume" in capsys.readouterr().err
    assert run(run_folder, "--dry_run", "--resume") == 2 and "other settings" in capsys.readouterr().err
    assert run(tmp_path / "new", "--dry_run") == 0 and not (tmp_path / "new").exists()


def test_a_student_that_is_not_quantized_is_refused_without_advice_to_leave_it_out(
    pipelines, prompt_file, tmp_path, capsys
):
    model = str(pipelines["sdxl"])
    words = [model, model, str(prompt_file), str(prompt_file), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert run_script(finetune.main, [*words, *FAST]) == 2
    error = capsys.readouterr().err
    assert "is not quantized" in error and error.endswith("; give the folder that quantizing wrote\n")


def test_every_flag_reaches_the_settings():
    flags = "--finetune_lr 0.1 --ema_decay 0.9 --codebook_lr 2 --decode call --guidance_scale 0 --use_checkpointing"
    config = finetune.PARSER.parse(["a", "b", "c", "d", *shlex.split(flags)])
    assert (config.optimizer.finetune_lr, config.optimizer.ema_decay, config.optimizer.codebook_lr) == (0.1, 0.9, 2.0)
    assert (
        config.finetune_keep_best
        and not finetune.PARSER.parse(["a", "b", "c", "d", "--no-finetune_keep_best"]).finetune_keep_best
    )
    assert (config.decode, config.sampling.guidance_scale, config.use_checkpointing) == ("call", 0.0, True)
    with pytest.raises(UserError, match="--lr is not a flag here: it is called --finetune_lr"):
        finetune.PARSER.parse(["a", "b", "c", "d", "--lr", "1e-6"])
    with pytest.raises(UserError, match="'fast' is not a number; allowed are numbers above 0 up to 1, and auto"):
        finetune.PARSER.parse(["a", "b", "c", "d", "--finetune_lr", "fast"])
    with pytest.raises(UserError, match="invalid choice"):
        finetune.PARSER.parse(["a", "b", "c", "d", "--lr_scheduler", "sawtooth"])


def reported(**changes) -> str:
    """The last line of a run that began at -30 dB, -35 dB of the median prompt, and took seven steps."""
    config = finetune.PARSER.parse(["m", "q", "c", "e", "--update_codes"])
    summary = {
        "steps": 7,
        "step_kept": 7,
        "learning_rate": 5e-4,
        "learning_rate_reductions": 0,
        "groups": 200,
        "groups_changed": 3,
    }
    summary |= {"unet_output_error_db_before": -30.0, "unet_output_error_median_db_before": -35.0}
    lines = finetune.report(config, summary | changes).splitlines()
    assert any("python generate.py m out/finetuned e" in line for line in lines)
    return lines[-1]


def test_the_last_line_says_what_was_gained():
    line = reported(unet_output_error_db_after=-31.5, unet_output_error_median_db_after=-36.25)
    assert line == (
        "UNet-output error on evaluation prompts: sum -30.00 dB before, -31.50 dB after; median -35.00 dB before, "
        "-36.25 dB after; learning rate 0.0005; kept step 7 of 7, 1.50 % of the groups have other codes"
    )


@pytest.mark.parametrize(
    ("db", "median", "words"),
    [
        (-29.5, -36.0, "the sum got worse"),
        (-31.0, -34.0, "the median got worse"),
        (-29.0, -34.0, "the sum and the med"),
    ],
)
def test_a_result_that_is_worse_is_called_so(db, median, words):
    line = reported(unet_output_error_db_after=db, unet_output_error_median_db_after=median)
    assert words in line and "try a lower --finetune_lr" in line


def test_a_run_that_gained_nothing_is_called_so():
    errors = {"unet_output_error_db_after": -30.0, "unet_output_error_median_db_after": -35.0}
    line = reported(step_kept=0, learning_rate_reductions=3, **errors)
    assert "learning rate 0.0005, reduced 3×; kept step 0: nothing gained" in line and "worse" not in line


def test_codes_learn_and_their_packing_stays(run, quantized, tmp_path, capsys):
    extra, read = ["--update_codes", "--code_lr", "0.3", "--code_fraction", "0.5", "--max_steps", "3"], set()
    with settings_read(FinetuneConfig, read):
        assert run(tmp_path / "out", *extra) == 0
    assert not undeclared(finetune.PARSER, ["model", "quantized", "c", "e", *FAST, *extra], read)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    before, after = weights(quantized), weights(tmp_path / "out")
    changed = [name for name in before if name.endswith(".codes") and not torch.equal(before[name], after[name])]
    assert changed and 0 < summary["groups_changed"] < summary["groups"]
    assert all(before[name].shape == after[name].shape for name in before)
    assert "of the groups have other codes" in capsys.readouterr().out
    assert all(row["groups_tried"] > 0 for row in log(tmp_path / "out") if "loss" in row)
