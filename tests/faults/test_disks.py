"""Full and read-only disks: one line that names the file, and nothing lost."""

import os
import subprocess
from pathlib import Path

import pytest
from programs import PROGRAMS


def resumed(launcher, program, materials, out):
    """The results once the trouble is over."""
    words = [*program.words(materials, out), *(["--resume"] if program.resumes else [])]
    process = launcher.start(words)
    assert process.wait() == 0, process.said()
    return program.results(out)


@pytest.mark.parametrize(("name", "limits"), [("quantize", (12_000, 100_000)), ("generate", (2_500,))])
def test_no_file_grows_beyond_what_the_disk_takes(launcher, materials, uninterrupted, tmp_path, name, limits):
    """A limit on the size of files fails writes as a full disk does, in the middle of a file."""
    program, out = PROGRAMS[name], tmp_path / "out"
    for limit in limits:
        words = [*program.words(materials, out), "--resume"]
        process = launcher.start(words, file_bytes=limit)
        assert process.wait() == 1
        (line,) = process.errors()
        assert "File too large" in line and str(out) in line, line
    assert resumed(launcher, program, materials, out) == uninterrupted(name)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many bytes; only root can."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "vqdm", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


@pytest.mark.parametrize(("name", "size"), [("quantize", 600_000), ("generate", 20_000), ("metrics", 4096)])
def test_a_full_disk_is_named(launcher, materials, small_disk, name, size):
    out = small_disk(size) / "out"
    process = launcher.start(PROGRAMS[name].words(materials, out))
    assert process.wait() in (1, 2)
    (line,) = process.errors()
    assert str(out) in line and ("No space left on device" in line or "GB are free" in line), line


@pytest.fixture
def read_only(tmp_path, small_disk):
    """A folder that nobody can write into: for root, who may write everywhere, a disk of that kind."""
    if os.geteuid():
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
        return folder
    folder = small_disk(4096)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("inside", ["out", ""])
def test_a_read_only_folder_is_named(launcher, materials, read_only, name, inside):
    process = launcher.start(PROGRAMS[name].words(materials, read_only / inside))
    assert process.wait() == 2, process.said()
    (line,) = process.errors()
    assert f"--output_dir {read_only / inside} cannot be written: " in line


def test_a_disk_with_too_little_room_is_refused_first(launcher, materials, small_disk):
    process = launcher.start(PROGRAMS["quantize"].words(materials, small_disk(300_000) / "out"))
    assert process.wait() == 2
    assert "GB are free, the run needs about" in process.errors()[0]
