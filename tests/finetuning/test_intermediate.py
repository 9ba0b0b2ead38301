"""Fine-tuning between the blocks of a quantization."""

import shlex

import pytest
import tiny_students
import torch
from main_text2image import main
from safetensors.torch import load_file

from vqdm.cli import run_script
from vqdm.finetuning import intermediate
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.data import split_held_out
from vqdm.finetuning.evaluation import evaluate
from vqdm.finetuning.trainer import DistillationLoss, Trainer, stored_types, trainable

FAST = shlex.split(
    "--num_codebooks 2 --nbits_per_codebook 3 --in_group_size 4 --calibration_nsamples 6 --evaluation_nsamples 2 "
    "--visualize_nsamples 0 --num_inference_steps 2 --max_epochs 1 --beam_size 1 --init_max_iter 1 --xtx_batch_size 6 "
    "--layer_filter (down_blocks.0.resnets.0|mid_block.resnets.0|up_blocks.1.resnets.0).conv1"
)
TWICE = shlex.split("--num_intermediate_finetunes 2 --finetune_batch_size 4 --finetune_lr 0.02")


def test_blocks_that_are_done_move_and_their_codes_stay(pipelines, prompt_file, tmp_path, monkeypatch):
    """Also that an interrupted run takes over what was trained. Evaluates on all points, which twelve can lower."""
    done, real = [], intermediate.train

    def train(loss_fn, trained, config, points, steps, _, types):
        before = {name: tensor.detach().clone() for name, tensor in trained.tensors.items()}
        loss = evaluate(loss_fn, points, points.all()).loss
        real(loss_fn, trained, config, points, steps, points.all(), types)
        assert evaluate(loss_fn, points, points.all()).loss < loss
        done.append([name for name, tensor in trained.tensors.items() if not torch.equal(before[name], tensor)])

    def interrupt(*_):
        raise KeyboardInterrupt

    def run(out, *extra: str) -> int:
        words = [pipelines["sdxl"], prompt_file, prompt_file, "--output_dir", out]
        return run_script(main, [*map(str, words), *FAST, *extra])

    monkeypatch.setattr(intermediate, "train", train)
    assert run(tmp_path / "plain") == 0
    with monkeypatch.context() as patch:
        patch.setattr("vqdm.quantization.job.finish", interrupt)
        assert run(tmp_path / "out", *TWICE) == 130
    assert len(done) == 2
    assert run(tmp_path / "out", *TWICE, "--resume") == 0
    assert len(done) == 2
    first, second = ({name.partition(".")[0] for name in moved} for moved in done)
    assert first == {"down_blocks"} and second == {"down_blocks", "mid_block"}
    assert "down_blocks.0.resnets.0.conv1.codebooks" in done[0] and "mid_block.resnets.0.conv1.scales" in done[1]
    plain, tuned = (
        load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("plain", "out")
    )
    key = "down_blocks.0.resnets.0.conv1"
    assert torch.equal(plain[f"{key}.codes"], tuned[f"{key}.codes"])
    assert not torch.equal(plain[f"{key}.codebooks"], tuned[f"{key}.codebooks"])
    assert {name: one.dtype for name, one in plain.items()} == {name: one.dtype for name, one in tuned.items()}


@pytest.mark.parametrize("harm", ["larger error", "not a number"])
def test_a_fine_tuning_that_raises_the_held_out_error_is_undone(harm, monkeypatch, caplog):
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    types, real = stored_types(unet), Trainer.step

    def step(self, points, chosen):
        found = real(self, points, chosen)
        for name in tiny_students.NAMES:
            self.trained.tensors[f"{name}.scales"].data.mul_(3.0 if harm == "larger error" else float("nan"))
        return found

    monkeypatch.setattr(Trainer, "step", step)
    config = OptimizerConfig()
    trained = trainable(unet, config)
    before = {name: tensor.detach().clone() for name, tensor in trained.tensors.items()}
    training, held_out = split_held_out(points)
    loss_fn = DistillationLoss(unet, None, torch.float32, 8, tiny_students.ALONE)
    with caplog.at_level("INFO"):
        intermediate.train(loss_fn, trained, config, points, [training[:4]] * 3, held_out, types)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.tensors.items())
    assert "undone: no gain" in caplog.text
