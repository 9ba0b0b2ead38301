import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from main_text2image import build_parser

SCRIPTS = sorted(Path("scripts").glob("*.sh"))
QUANTIZE = re.compile(r"python main_text2image\.py((?:.*\\\n)*.*)")


def quantize_lines(text: str) -> list[list[str]]:
    """Arguments of every call of main_text2image.py in a script or document; shell variables stand for themselves."""
    joined = [found.replace("\\\n", " ") for found in QUANTIZE.findall(text)]
    return [shlex.split(line, comments=True) for line in joined]


@pytest.mark.parametrize("path", [*SCRIPTS, Path("README.md")], ids=str)
def test_every_flag_exists(path):
    for line in quantize_lines(path.read_text()):
        options = build_parser().parse(line)
        assert options.model and options.calibration_prompts and options.evaluation_prompts


def test_the_demo_uses_files_that_are_there():
    (line,) = quantize_lines(Path("scripts/demo.sh").read_text())
    options = build_parser().parse(line)
    assert all(Path(name).exists() for name in (options.model, options.calibration_prompts, options.evaluation_prompts))


@pytest.mark.parametrize("path", [*SCRIPTS, *sorted(Path("benchmarks").glob("*.sh"))], ids=str)
def test_shell_accepts_them(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_show_result_prints_the_summary():
    sys.path.insert(0, "scripts")
    from show_result import table

    summary = {
        "effective_bits_layers": 3.07,
        "effective_bits_unet": 3.7,
        "bytes_of_unet": 6_400_000,
        "bytes_of_original_unet": 27_500_000,
        "unet_output_error_db": -25.0,
        "pictures": {"psnr_db": 24.0},
        "seconds": {"total": 200.0},
    }
    text = table(json.loads(json.dumps(summary)))
    assert "3.070" in text and "6.40 MB (was 27.50 MB)" in text and "-25.00 dB" in text


def test_the_repository_stays_small():
    """Every file under 15 MB, all assets under 40 MB."""
    files = [path for path in Path("assets").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 15e6 and sum(sizes) < 40e6
