"""Two processes never write into one folder."""

import os

import finetune
import generate
import main_text2image
import metrics
from test_hf import quantized_unet
from tiny_runs import command, write_folder

from vqdm.cli import run_script
from vqdm.storage.files import locked


def test_every_program_refuses_a_folder_in_use(tmp_path, pipelines, prompt_file, capsys):
    out, model, prompts = str(tmp_path / "out"), str(pipelines["sdxl"]), str(prompt_file)
    few = ["--finetune_nsamples", "2", "--held_out_nsamples", "2", "--num_inference_steps", "2"]
    few += ["--evaluation_nsamples", "1", "--visualize_nsamples", "1", "--finetune_batch_size", "2"]
    quantized, full, noisy = tmp_path / "quantized", tmp_path / "full", tmp_path / "noisy"
    quantized_unet().save_pretrained(quantized)
    write_folder(full, 0, True)
    write_folder(noisy, 9, True)
    runs = [
        (main_text2image.main, command(model, prompts, out), ""),
        (finetune.main, [model, str(quantized), prompts, prompts, "--output_dir", out, *few], ""),
        (generate.main, [model, prompts, "--output_dir", out, "--num_inference_steps", "1"], "-0of1"),
        (metrics.main, [str(noisy), "--reference", str(full), "--output_dir", out, "--metrics", "psnr"], ""),
    ]
    for program, words, part in runs:
        with locked(tmp_path / "out", part=part):
            assert run_script(program, words) == 2
            assert f"--output_dir {out} is in use by process {os.getpid()}" in capsys.readouterr().err
        assert not list((tmp_path / "out").iterdir())
