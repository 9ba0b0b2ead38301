import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import DiffusionPipeline
from generate import PARSER, main
from PIL import Image
from settings_read import settings_read, undeclared
from torch import nn

from vqdm.additive.code import CodeSpec
from vqdm.additive.solve import SolverConfig, solve_layer
from vqdm.cli import run_script
from vqdm.diffusion.blocks import matrix_of, select_layers
from vqdm.generation.config import GenerateConfig
from vqdm.generation.requests import seed_of
from vqdm.images import key_of, read_rows
from vqdm.layers.quantized import swap
from vqdm.storage.hf import mark_quantized

FAST = ["--num_inference_steps", "2"]
PROMPTS = [f"a big red circle number {i}" for i in range(5)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """A folder with a `unet` of which a single layer is quantized."""
    spec, unet = CodeSpec(2, 4, 4), tiny_unet("sdxl")
    for layer in select_layers(unet, r"mid_block\.resnets\.0\.conv1", 0, spec, {}):
        weight = matrix_of(unet.get_submodule(layer.name), True).float()
        config = SolverConfig(spec=spec, max_epochs=1, init_max_iter=1)
        code, _ = solve_layer(weight, torch.eye(layer.columns), config, torch.Generator().manual_seed(0))
        swap(unet, layer.name, spec).set_code(code)
    mark_quantized(unet)
    folder = tmp_path_factory.mktemp("quantized")
    unet.save_pretrained(folder / "unet")
    return folder


def run(*words, out: Path) -> int:
    return run_script(main, [*map(str, words), "--output_dir", str(out), *FAST])


def pixels(folder: Path) -> dict[str, np.ndarray]:
    """Relative path → image."""
    found = {}
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:
            found[path.relative_to(folder).as_posix()] = np.asarray(image).astype(int)
    return found


def gap(first: Path, second: Path) -> int:
    """Largest difference of two folders' images, in grey levels; the folders must hold the same files."""
    ours, theirs = pixels(first), pixels(second)
    assert ours.keys() == theirs.keys()
    return max(np.abs(ours[name] - theirs[name]).max() for name in ours)


def rows_of(folder: Path) -> dict[tuple[int, int], dict]:
    return {key_of(row): row for row in read_rows(folder / "manifest.jsonl")}


@pytest.fixture(scope="module")
def finished(pipelines, prompts, tmp_path_factory) -> Path:
    """Two images of each prompt, generated one at a time."""
    out, read = tmp_path_factory.mktemp("finished") / "out", set()
    with settings_read(GenerateConfig, read):
        assert run(pipelines["sdxl"], prompts, "--num_samples_per_prompt", 2, "--bs", 1, out=out) == 0
    assert not undeclared(PARSER, ["model", "prompts"], read)
    return out


def test_images_are_those_of_the_plain_pipeline(finished, pipelines):
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    for (index, sample), row in rows_of(finished).items():
        generator = torch.Generator().manual_seed(seed_of(0, str(index), sample))
        plain = pipeline(PROMPTS[index], num_inference_steps=2, generator=generator).images[0]
        with Image.open(finished / row["file"]) as generated:
            assert np.abs(np.asarray(plain).astype(int) - np.asarray(generated)).max() <= 1


def test_manifest_and_run_say_how_to_repeat(finished, pipelines):
    rows = rows_of(finished)
    assert list(rows) == [(i, k) for i in range(5) for k in range(2)]
    row = rows[3, 1]
    assert (row["file"], row["prompt"], row["seed"]) == ("000003_01.png", PROMPTS[3], seed_of(0, "3", 1))
    assert row["settings"] == {
        "guidance_scale": 5.0,
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
        "scheduler": "EulerDiscreteScheduler",
    }
    with Image.open(finished / row["file"]) as image:
        about = json.loads(image.text["parameters"])
    assert about["vqdm"] and {name: about[name] for name in ("prompt", "seed")} == {
        name: row[name] for name in ("prompt", "seed")
    }
    run_json = json.loads((finished / "run.json").read_text())
    assert run_json["full_precision"] is True and run_json["settings"]["model"] == str(pipelines["sdxl"])
    assert {"versions", "command", "options", "scheduler", "device"} <= run_json.keys()


def test_batches_shards_and_limits_generate_the_same(finished, pipelines, prompts, tmp_path):
    out = tmp_path / "out"
    words = [pipelines["sdxl"], prompts, "--num_samples_per_prompt", 2, "--bs", 3, "--resume"]
    assert run(*words, "--shard", "1/2", "--limit", 4, out=out) == 0
    assert {key[0] for key in rows_of(out)} == {1, 3}
    assert run(*words, "--shard", "0/2", out=out) == 0
    assert run(*words, out=out) == 0
    assert gap(out, finished) <= 1
    assert rows_of(out).keys() == rows_of(finished).keys()


def test_two_processes_generate_the_same_bytes(finished, pipelines, prompts, tmp_path):
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "generate.py"]
    words = [pipelines["sdxl"], prompts, "--num_samples_per_prompt", "2", "--bs", "1", "--device", "cpu", *FAST]
    subprocess.run([*launch, *map(str, words), "--output_dir", str(out)], check=True, capture_output=True, timeout=900)
    rows, expected = read_rows(out / "manifest.jsonl"), read_rows(finished / "manifest.jsonl")
    assert rows == expected
    assert all((out / row["file"]).read_bytes() == (finished / row["file"]).read_bytes() for row in rows)
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    assert not list(out.glob("manifest.*.jsonl"))


def test_interrupted_run_resumes_where_it_was(finished, pipelines, prompts, tmp_path, monkeypatch, capsys):
    import vqdm.generation.job as job

    out, generated = tmp_path / "out", []
    words = [pipelines["sdxl"], prompts, "--num_samples_per_prompt", 2, "--bs", 1]

    def tired(pipeline, batch, generate=job.generate):
        if len(generated) == 4:
            raise KeyboardInterrupt
        generated.extend(batch)
        return generate(pipeline, batch)

    with monkeypatch.context() as patch:
        patch.setattr(job, "generate", tired)
        assert run(*words, out=out) == 130
    assert "--resume continues" in capsys.readouterr().err
    part = next(out.glob("manifest.*.jsonl"))
    part.write_text(part.read_text()[:-20])
    (out / "000000_00.png").write_bytes(b"damaged")
    assert run(*words, "--resume", out=out) == 0
    assert "2 of 10 images exist already" in capsys.readouterr().out
    assert rows_of(out) == rows_of(finished) and gap(out, finished) == 0


def test_resume_names_what_changed(finished, pipelines, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert run(pipelines["sdxl"], prompts, out=out) == 2
    assert "add --resume" in capsys.readouterr().err
    assert run(pipelines["sdxl"], prompts, "--resume", "--seed", 3, "--guidance_scale", 2, out=out) == 2
    assert "other settings: seed was 0, now 3; guidance_scale was None, now 2.0" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("a star")
    assert run(pipelines["sdxl"], other, "--resume", out=out) == 2
    assert "with other settings: PROMPTS differ from those of the run\n" in capsys.readouterr().err
    assert run(pipelines["sd15"], prompts, "--resume", out=out) == 2
    assert "MODEL differs from that of the run" in capsys.readouterr().err


def test_quantized_unet_is_used_and_is_recorded(finished, quantized, pipelines, prompts, tmp_path):
    for number, folder in enumerate((quantized, quantized / "unet")):
        out = tmp_path / str(number)
        assert run(pipelines["sdxl"], folder, prompts, "--limit", 2, "--seed", 0, out=out) == 0
        run_json = json.loads((out / "run.json").read_text())
        assert (run_json["full_precision"], run_json["quantized_layers"]) == (False, 1)
    assert gap(tmp_path / "0", tmp_path / "1") == 0
    ours, teacher = pixels(out), pixels(finished)
    assert any((ours[name] != teacher[name]).any() for name in ours)


def test_quantized_model_uses_its_own_unet_and_is_no_teacher(quantized, pipelines, prompts, tmp_path, capsys):
    whole = tmp_path / "whole"
    shutil.copytree(pipelines["sdxl"], whole)
    shutil.rmtree(whole / "unet")
    shutil.copytree(quantized / "unet", whole / "unet")
    assert run(whole, prompts, "--teacher", out=tmp_path / "teacher") == 2
    assert "is quantized itself" in capsys.readouterr().err and not (tmp_path / "teacher").exists()
    assert run(whole, prompts, "--limit", 2, out=tmp_path / "own") == 0
    assert json.loads((tmp_path / "own" / "run.json").read_text())["full_precision"] is False
    assert run(pipelines["sdxl"], quantized, prompts, "--limit", 2, out=tmp_path / "given") == 0
    assert gap(tmp_path / "own", tmp_path / "given") == 0


def test_columns_overrule_flags(pipelines, tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text("caption,seed,height,negative_prompt\na red star,5,24,\na blue star,,,blurry\n")
    assert run(pipelines["sd15"], table, "--negative_prompt", "dark", out=tmp_path / "out") == 0
    first, second = rows_of(tmp_path / "out").values()
    assert (first["seed"], first["settings"]["height"], first["negative_prompt"]) == (5, 24, "dark")
    assert (second["seed"], second["settings"]["height"], second["negative_prompt"]) == (
        seed_of(0, "1", 0),
        16,
        "blurry",
    )
    with Image.open(tmp_path / "out" / "000000_00.png") as image:
        assert image.size == (16, 24)


def test_layouts_of_benchmarks(pipelines, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"item_id": "x7", "prompt": "a red star", "tag": "colors"}\n')
    for layout in ("geneval", "dpg"):
        words = ["--layout", layout, "--num_samples_per_prompt", 3]
        assert run(pipelines["sdxl"], lines, *words, out=tmp_path / layout) == 0
    assert json.loads((tmp_path / "geneval" / "00000" / "metadata.jsonl").read_text())["tag"] == "colors"
    assert sorted(path.name for path in (tmp_path / "geneval" / "00000" / "samples").iterdir())[-1] == "00002.png"
    with Image.open(tmp_path / "dpg" / "grids" / "x7.png") as sheet:
        assert sheet.size == (32, 32)


def spoil(folder: Path, target: Path, value: float) -> Path:
    """A copy of a pipeline whose decoder gives `value` everywhere."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.vae.decoder.conv_out.weight.data.zero_()
    pipeline.vae.decoder.conv_out.bias.data.fill_(value)
    pipeline.save_pretrained(target)
    return target


def test_black_images_are_a_warning(pipelines, prompts, tmp_path, capsys):
    model = spoil(pipelines["sdxl"], tmp_path / "black", -5.0)
    assert run(model, prompts, out=tmp_path / "out") == 0
    assert "warning: images with problems (problem in manifest.jsonl): 5 black" in capsys.readouterr().out
    assert {row["problem"] for row in rows_of(tmp_path / "out").values()} == {"black"}


def test_nan_from_the_first_image_on_stops_the_run(pipelines, prompts, tmp_path, capsys):
    model = spoil(pipelines["sdxl"], tmp_path / "nan", float("nan"))
    assert run(model, prompts, out=tmp_path / "out") == 1
    assert "every image of the first batch holds NaN" in capsys.readouterr().err
    assert not pixels(tmp_path / "out")


def test_some_nan_is_marked_and_fails_at_the_end(pipelines, prompts, tmp_path, monkeypatch, capsys):
    import vqdm.generation.job as job

    def spoiled(pipeline, batch, generate=job.generate):
        images = generate(pipeline, batch)
        return [job.GeneratedImage(images[0].image, "nan"), *images[1:]] if batch[0].index == 2 else images

    monkeypatch.setattr(job, "generate", spoiled)
    assert run(pipelines["sdxl"], prompts, "--bs", 2, out=tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "5 images, 5 of them new" in captured.out and "1 of 5 images hold NaN" in captured.err
    assert [row["index"] for row in rows_of(tmp_path / "out").values() if row["problem"]] == [2]


def test_dry_run_writes_nothing(pipelines, quantized, prompts, tmp_path, capsys):
    words = [pipelines["sdxl"], quantized, prompts, "--dry_run", "--num_samples_per_prompt", 3]
    assert run(*words, out=tmp_path / "out") == 0
    assert f"15 images of 5 prompts, denoiser of {quantized}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_flags_reach_the_settings():
    words = "M Q --seed 4 P --shard 2/3 --bs 5 --limit 7 --layout dpg --offload model --compile --scheduler DDPM"
    config = PARSER.parse(shlex.split(words))
    assert (config.model, config.quantized, config.prompts) == ("M", "Q", "P")
    assert (config.seed, config.shard, config.bs, config.limit) == (4, (2, 3), 5, 7)
    assert (config.layout, config.offload, config.compile, config.sampling.scheduler) == ("dpg", "model", True, "ddpm")
    assert PARSER.parse(["M", "P"]).shard == (0, 1)


def test_compile_and_offload_are_handed_to_diffusers():
    from unittest.mock import MagicMock

    from vqdm.generation.job import placed

    device = torch.device("cuda")
    for words, wanted in {
        "--compile": ["unet.compile", "to"],
        "--offload model": ["enable_model_cpu_offload"],
        "--offload sequential": ["enable_sequential_cpu_offload"],
    }.items():
        pipeline = MagicMock()
        pipeline.unet = MagicMock(spec=nn.Module)
        pipeline.attach_mock(pipeline.unet, "unet")
        placed(pipeline, PARSER.parse(["M", "P", *words.split()]), device)
        assert [call[0] for call in pipeline.mock_calls] == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sdxl PROMPTS --shard 3/3", "'3/3' is not I/N"),
        ("sdxl PROMPTS --shard 7/8", "--shard 7/8 holds none of the 5 prompts"),
        ("sdxl PROMPTS --height 20", "--height is 20; allowed are multiples of 8"),
        ("sdxl PROMPTS --offload model --device cpu", "--offload model moves weights between CPU and GPU"),
        ("sdxl PROMPTS --compile --offload sequential", "--compile does not go with --offload sequential"),
        ("sdxl PROMPTS --layout dpg --num_samples_per_prompt 5", "--layout dpg holds 4 at most"),
        ("sdxl PROMPTS --lim 3", "unrecognized arguments: --lim 3"),
        ("sdxl nowhere.txt", "PROMPTS: nowhere.txt is not found"),
        ("nowhere PROMPTS", "MODEL nowhere is not found"),
        ("sdxl nowhere PROMPTS", "QUANTIZED nowhere holds neither"),
        ("sdxl sdxl PROMPTS", "no quantization_config of vqdm; for full precision leave QUANTIZED out"),
        ("sdxl PROMPTS PROMPTS", "prompts.txt is a file; give the folder that quantizing wrote"),
        ("sdxl QUANTIZED PROMPTS --teacher", "--teacher is full precision, but QUANTIZED"),
        ("sd15 QUANTIZED PROMPTS", "does not fit MODEL"),
        ("sdxl PROMPTS --save tests", "is not a run of vqdm"),
    ],
)
def test_bad_input_is_one_line(pipelines, quantized, prompts, tmp_path, capsys, words, message):
    known = pipelines | {"PROMPTS": prompts, "QUANTIZED": quantized}
    line = ["--output_dir", str(tmp_path / "out"), *(str(known.get(word, word)) for word in shlex.split(words))]
    assert run_script(main, line) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_reads(capsys):
    with pytest.raises(SystemExit) as caught:
        PARSER.parse(["--help_all"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "MODEL [QUANTIZED] PROMPTS" in text and "(default: 0/1)" in text
    assert max(map(len, text.splitlines())) <= 120
