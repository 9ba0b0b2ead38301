"""The shell scripts and the commands of the guides: every flag exists, every file that they name is there."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(Path("scripts").glob("*.sh"))
RECIPES = ("quantization", "finetuning_quantization", "eval_image_generation", "metric_calculation")
GUIDES = [Path("README.md"), *sorted(Path("docs").glob("*.md")), *sorted(Path("benchmarks").glob("*.sh"))]
PROGRAMS = ("main_text2image.py", "finetune.py", "generate.py", "metrics.py", "convert.py")
CALL = re.compile(rf"python ({'|'.join(map(re.escape, PROGRAMS))})((?:.*\\\n)*.*)")
# Stands in for python and accelerate: notes its arguments, runs nothing.
STUB = """#!/bin/sh
[ "$1" = -c ] && exit 0
printf '%s\\036' "$@" >>"$CALLS"
printf '\\035' >>"$CALLS"
"""


def parse(program: str, words: list[str]):
    """The settings as the program's own parser reads them."""
    module = importlib.import_module(program.removesuffix(".py"))
    if program == "metrics.py" and words[:1] == ["compare"]:
        return module.COMPARE_PARSER.parse(words[1:])
    return module.PARSER.parse(words)


def written_calls(text: str) -> list[tuple[str, list[str]]]:
    """(program, arguments) of every call in a script or guide; variables stand for their default or themselves."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    found = [(program, line.replace("\\\n", " ")) for program, line in CALL.findall(text)]
    return [(program, [word for word in shlex.split(line, comments=True) if word != "$@"]) for program, line in found]


@pytest.fixture
def calls_of(tmp_path):
    """Runs a script with stubs in place of its programs, and gives (program, arguments) of each call."""
    for name in ("python", "accelerate"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    out, log = tmp_path / "out", tmp_path / "calls"
    for name in ("images-full", "images-quantized"):
        (out / name / "metrics").mkdir(parents=True)
        (out / name / "metrics" / "metrics.json").write_text("{}")

    def run(script: Path, *arguments: str, **variables: str) -> list[tuple[str, list[str]]]:
        log.write_text("")
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "CALLS": str(log), "OUT": str(out)} | variables
        subprocess.run(["bash", str(script), *arguments], check=True, env=environment, capture_output=True)
        calls = [call.split("\036")[:-1] for call in log.read_text().split("\035")[:-1]]
        return [(call[0], call[1:]) for call in calls]

    return run


SMALL = {"MODEL": "assets/shapes-xl", "PROFILE": "small"}


@pytest.mark.parametrize("variables", [{}, SMALL], ids=["sdxl", "small"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_pass_flags_that_exist(calls_of, name, variables):
    """As they stand for SDXL, and for the small pipeline by two variables."""
    for program, words in calls_of(Path(f"scripts/{name}.sh"), **variables):
        options = parse(program, words)
        files = [value for key, value in vars(options).items() if key.endswith("prompts") and value]
        assert all(Path(file).is_file() for file in files)
        if hasattr(options, "model"):
            assert options.model == variables.get("MODEL", "stabilityai/stable-diffusion-xl-base-1.0")


def test_the_recipe_of_quantization_is_the_papers(calls_of):
    ((_, words),) = calls_of(Path("scripts/quantization.sh"), BITS="4", FORMAT="paper")
    options = parse("main_text2image.py", words)
    spec, sampling = options.spec, options.sampling
    assert (spec.num_codebooks, spec.nbits_per_codebook, spec.in_group_size) == (4, 8, 8)
    assert (sampling.scheduler, sampling.num_inference_steps, sampling.guidance_scale) == ("ddim", 50, 5)
    assert (options.calibration_nsamples, options.solver.beam_size) == (256, 8)
    ((_, words),) = calls_of(Path("scripts/quantization.sh"), BITS="2.5")
    assert parse("main_text2image.py", words).target_bits == 2.5


def test_further_flags_and_a_launcher_reach_the_program(calls_of):
    script = Path("scripts/eval_image_generation.sh")
    calls = calls_of(script, "--bs", "3", LAUNCH="accelerate launch --num_processes 2", **SMALL)
    assert [words[:4] for _, words in calls] == [["--num_processes", "2", "generate.py", "assets/shapes-xl"]] * 2
    assert all(parse("generate.py", words[3:]).bs == 3 for _, words in calls)


def test_pictures_are_drawn_in_full_precision_and_by_the_quantized_unet(calls_of):
    (_, full), (_, ours) = calls_of(Path("scripts/eval_image_generation.sh"), **SMALL)
    full, ours = parse("generate.py", full), parse("generate.py", ours)
    assert full.teacher and full.quantized is None and ours.quantized.endswith("out/quantized")
    assert vars(full) | {"teacher": 0, "quantized": 0, "output_dir": 0} == vars(ours) | {
        "teacher": 0,
        "quantized": 0,
        "output_dir": 0,
    }


def test_the_fine_tuned_unet_draws_where_there_is_one(calls_of, tmp_path):
    (tmp_path / "out/finetuned").mkdir(parents=True)
    (tmp_path / "out/finetuned/model_index.json").write_text("{}")
    (_, _), (_, ours) = calls_of(Path("scripts/eval_image_generation.sh"), **SMALL)
    options = parse("generate.py", ours)
    assert options.quantized.endswith("finetuned") and options.output_dir.endswith("images-finetuned")


def test_a_reference_adds_fid(calls_of):
    for variables in ({}, SMALL):
        (_, words), _ = calls_of(Path("scripts/metric_calculation.sh"), FID_REFERENCE="coco.npz", **variables)
        options = parse("metrics.py", words)
        assert "fid" in options.metrics and options.fid_reference == "coco.npz"


def test_an_unknown_profile_is_an_error(calls_of):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        calls_of(Path("scripts/quantization.sh"), PROFILE="huge")
    assert caught.value.returncode == 2
    assert caught.value.stderr == b"error: PROFILE is huge; allowed are sdxl and small\n"


@pytest.mark.parametrize("path", GUIDES, ids=str)
def test_commands_of_the_guides_have_flags_that_exist(path):
    calls = [call for call in written_calls(path.read_text()) if not {"...", "…"} & set(call[1])]
    for program, words in calls:
        parse(program, words)


@pytest.mark.parametrize("path", [*SCRIPTS, *sorted(Path("benchmarks").glob("*.sh"))], ids=str)
def test_shell_accepts_them(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_the_demo_runs_the_recipes_on_the_small_pipeline():
    text = Path("scripts/demo.sh").read_text()
    assert 'MODEL="${MODEL:-assets/shapes-xl}" PROFILE=small' in text
    ran = re.findall(r"^bash scripts/(\w+)\.sh$", text, re.MULTILINE)
    assert [name for name in RECIPES if name in ran] == ran and ran[-1] == "metric_calculation"


def test_show_result_prints_the_summary():
    sys.path.insert(0, "scripts")
    from show_result import table

    summary = {
        "effective_bits_layers": 3.07,
        "effective_bits_unet": 3.7,
        "bytes_of_unet": 6_400_000,
        "bytes_of_original_unet": 27_500_000,
        "unet_output_error_db": -25.0,
        "images": {"psnr_db": 24.0},
        "seconds": {"total": 200.0},
    }
    text = table(json.loads(json.dumps(summary)))
    assert "3.070" in text and "6.40 MB (was 27.50 MB)" in text and "-25.00 dB" in text


def test_the_repository_stays_small():
    """Every file under 15 MB, all assets under 70 MB."""
    files = [path for path in Path("assets").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 15e6 and sum(sizes) < 70e6
