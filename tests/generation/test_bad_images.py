"""Images that hold NaN or are black in the evaluations of quantizing and fine-tuning: counted, and not scored."""

import json
import shlex
import shutil
from pathlib import Path

import finetune
import main_text2image
import pytest
import tiny_students
from diffusers import DiffusionPipeline

from vqdm.cli import run_script

SAMPLING = shlex.split("--evaluation_nsamples 2 --visualize_nsamples 2 --num_inference_steps 1")
QUANTIZE = shlex.split(
    "--num_codebooks 1 --nbits_per_codebook 4 --in_group_size 4 --calibration_nsamples 2 --max_epochs 1 "
    r"--layer_filter mid_block\.resnets\.0\.conv1"
)
FINETUNE = shlex.split(
    "--finetune_nsamples 4 --held_out_nsamples 2 --finetune_batch_size 4 --local_batch_size 4 --finetune_max_epochs 1"
)


@pytest.fixture(scope="module", params=[("nan", float("nan")), ("black", -5.0)], ids=["nan", "black"])
def spoiled(request, pipelines, tmp_path_factory) -> tuple[Path, str]:
    """A pipeline whose VAE decodes everything to one value, and the name of the problem."""
    name, value = request.param
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    pipeline.vae.decoder.conv_out.weight.data.zero_()
    pipeline.vae.decoder.conv_out.bias.data.fill_(value)
    folder = tmp_path_factory.mktemp("spoiled") / name
    pipeline.save_pretrained(folder)
    return folder, name


def check(out: Path, problem: str, whose: str, said: str):
    found = json.loads((out / "summary.json").read_text())["images"]
    assert found["psnr_db"] is None and found["count"] == 0
    assert found["problems"] == {"full_precision": {problem: 2}, whose.replace("-", "_"): {problem: 2}}
    assert f"warning: 2 of 2 images of the {whose} model" in said and "--dtype bfloat16 or float32" in said
    assert "all images have problems" in (out / "README.md").read_text()


def test_quantizing(spoiled, prompt_file, tmp_path, capfd):
    words = [spoiled[0], prompt_file, prompt_file, "--output_dir", tmp_path / "out"]
    assert run_script(main_text2image.main, [*map(str, words), *SAMPLING, *QUANTIZE]) == 0
    said = capfd.readouterr()
    check(tmp_path / "out", spoiled[1], "quantized", said.out)
    assert said.err == ""


def test_fine_tuning(spoiled, prompt_file, tmp_path, capfd):
    quantized = tmp_path / "quantized"
    shutil.copytree(spoiled[0], quantized, ignore=shutil.ignore_patterns("unet"))
    tiny_students.student(tiny_students.FORMATS["shared"]).save_pretrained(quantized / "unet")
    words = [spoiled[0], quantized, prompt_file, prompt_file, "--output_dir", tmp_path / "out"]
    assert run_script(finetune.main, [*map(str, words), *SAMPLING, *FINETUNE]) == 0
    check(tmp_path / "out", spoiled[1], "fine-tuned", capfd.readouterr().out)


def test_a_teacher_whose_unet_gives_nan_is_the_end(pipelines, prompt_file, tmp_path, capfd):
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "model")
    words = [tmp_path / "model", prompt_file, prompt_file, "--output_dir", tmp_path / "out"]
    assert run_script(main_text2image.main, [*map(str, words), *SAMPLING, *QUANTIZE]) == 1
    assert "the denoiser gave NaN or infinity while sampling" in capfd.readouterr().err
