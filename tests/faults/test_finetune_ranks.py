"""Fine-tuning on two processes, with shares of a batch of different sizes, is fine-tuning on one up to rounding."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import tiny_students
from safetensors.torch import load_file

FLAGS = shlex.split(
    "--finetune_nsamples 6 --held_out_nsamples 4 --held_out_points 7 --evaluation_nsamples 2 --visualize_nsamples 0 "
    "--num_inference_steps 2 --xtx_batch_size 2 --finetune_batch_size 5 --local_batch_size 2 --finetune_max_epochs 2 "
    "--finetune_lr 0.005 --lr_warmup_steps 1 --eval_step 2 --finetune_method student+teacher --timestep_sampling error "
    "--ema_decay 0.5 --no-finetune_keep_best --device cpu"
)  # two epochs of two steps


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, pipelines) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "pipeline"
    shutil.copytree(pipelines["sdxl"], folder, ignore=shutil.ignore_patterns("unet"))
    tiny_students.student(tiny_students.FORMATS["shared"]).save_pretrained(folder / "unet")
    return folder


def weights(folder: Path) -> dict:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], id="codes stay", marks=pytest.mark.long),
        pytest.param(["--update_codes", "--decode", "call"], id="codes learn"),
    ],
)
def test_two_processes_give_what_one_gives(launcher, pipelines, prompt_file, quantized, tmp_path, extra):
    """Parameters agree to a thousandth of how far they have moved: sums are in another order."""
    words = ["finetune", pipelines["sdxl"], quantized, prompt_file, prompt_file, *FLAGS, *extra, "--output_dir"]
    for world in (1, 2):
        ranks = launcher.launch([*words, tmp_path / f"{world}"], world)
        assert [rank.wait() for rank in ranks] == [0] * world, ranks[0].said()
    before, one, two = (weights(folder) for folder in (quantized, tmp_path / "1", tmp_path / "2"))
    apart = sum((one[name].float() - two[name].float()).square().sum() for name in one)
    moved = sum((one[name].float() - before[name].float()).square().sum() for name in one)
    assert moved > 0 and apart.sqrt() < 1e-3 * moved.sqrt()
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "training.jsonl").read_text().splitlines()] for name in "12"
    )
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for key in ("loss", "held_out_loss"):
        left, right = ([row[key] for row in rows if key in row] for rows in (first, second))
        assert left == pytest.approx(right, rel=1e-4)
