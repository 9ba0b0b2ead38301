"""Truncated and bit-flipped files of an interrupted run are noticed and named; without them it ends as it would."""

import json
import random
import shutil
import signal
from itertools import cycle
from pathlib import Path

import pytest
from programs import PROGRAMS

FILES = [
    "work/evaluation/000000-0002.safetensors",
    "work/calibration/000002-0002.safetensors",
    "work/layers/down_blocks.0.resnets.0.conv1.safetensors",
    "work/hessians_down_blocks.1/hessians.json",
    "work/hessians_down_blocks.1/down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.safetensors",
]


def truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def interrupted(launcher, materials, disk_changes, tmp_path_factory) -> Path:
    """A quantization that was killed while it solved the layers of its second block."""
    words, place = PROGRAMS["quantize"].words, tmp_path_factory.mktemp("interrupted")
    for moment in range(disk_changes("quantize") // 3, disk_changes("quantize")):
        out = place / str(moment)
        crash = {"at": moment, "signal": signal.SIGKILL}
        assert launcher.start(words(materials, out), crash=crash).wait() == -signal.SIGKILL
        if all((out / name).is_file() for name in FILES):
            return out
    raise AssertionError("no moment has all files")


@pytest.mark.parametrize(("name", "spoil"), zip(FILES, cycle([flip, truncate]), strict=False))
def test_a_damaged_file_is_named(launcher, materials, interrupted, tmp_path, name, spoil):
    out = shutil.copytree(interrupted, tmp_path / "out")
    spoil(out / name, random.Random(name))
    process = launcher.start([*PROGRAMS["quantize"].words(materials, out), "--resume"])
    assert process.wait() in (1, 2), process.said()
    (line,) = process.errors()
    assert str(out / name) in line and "damaged" in line


def test_without_the_damaged_files_the_run_goes_on(launcher, materials, interrupted, uninterrupted, tmp_path):
    out = shutil.copytree(interrupted, tmp_path / "out")
    for name in FILES:
        (out / name).unlink()
    process = launcher.start([*PROGRAMS["quantize"].words(materials, out), "--resume"])
    assert process.wait() == 0, process.said()
    assert PROGRAMS["quantize"].results(out) == uninterrupted("quantize")


def test_a_damaged_claim_is_named(launcher, materials, interrupted, tmp_path):
    out = shutil.copytree(interrupted, tmp_path / "out")
    truncate(out / "run.json", random.Random(0))
    process = launcher.start([*PROGRAMS["quantize"].words(materials, out), "--resume"])
    assert process.wait() == 2
    assert f"--resume: {out / 'run.json'} is damaged" in process.errors()[0]


def test_damaged_pictures_and_rows_are_made_again(launcher, materials, uninterrupted, tmp_path):
    program, out = PROGRAMS["generate"], tmp_path / "out"
    shutil.copytree(materials.reference, out)
    image = sorted(out.glob("*.png"))[0]
    flip(image, random.Random(1))
    lines = (out / "manifest.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps(row | {"prompt": row["prompt"].replace("red", "rad")})
    (out / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    process = launcher.start([*program.words(materials, out), "--resume"])
    assert process.wait() == 0, process.said()
    assert f"{out / 'manifest.jsonl'}: line 4 is damaged" in process.said()
    assert program.results(out) == uninterrupted("generate")
