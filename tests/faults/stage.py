"""One launcher for all tests of faults, and what the programs work on."""

from __future__ import annotations

import shutil

import pytest
import tiny_students
from launcher import Launcher
from PIL import Image
from programs import GENERATE, PROGRAMS, Materials


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    found = Launcher(tmp_path_factory.mktemp("logs"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def materials(pipelines, prompt_file, launcher, tmp_path_factory) -> Materials:
    folder = tmp_path_factory.mktemp("materials")
    words = ["generate", pipelines["sdxl"], prompt_file, "--output_dir", folder / "reference", *GENERATE]
    assert launcher.start(words).wait() == 0
    shutil.copytree(folder / "reference", folder / "images")
    for path in sorted((folder / "images").glob("*.png")):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    shutil.copytree(pipelines["sdxl"], folder / "quantized", ignore=shutil.ignore_patterns("unet"))
    tiny_students.student(tiny_students.FORMATS["shared"]).save_pretrained(folder / "quantized" / "unet")
    return Materials(pipelines["sdxl"], folder / "quantized", prompt_file, folder / "images", folder / "reference")


@pytest.fixture(scope="session")
def uninterrupted(launcher, materials, tmp_path_factory):
    """Program → the results of a run that nobody disturbs, of one process unless bytes depend on their number."""
    known = {}

    def results(name: str, world: int = 1) -> dict[str, str]:
        key = name, 1 if PROGRAMS[name].ranks_agree else world
        if key not in known:
            out = tmp_path_factory.mktemp(name) / "out"
            ranks = launcher.launch(PROGRAMS[name].words(materials, out), key[1])
            assert [rank.wait() for rank in ranks] == [0] * key[1], ranks[0].said()
            known[key] = PROGRAMS[name].results(out)
        return known[key]

    return results


@pytest.fixture(scope="session")
def disk_changes(launcher, materials, tmp_path_factory):
    """Program → how often a whole run changes the disk; counted when first asked for."""
    known = {}

    def changes(name: str) -> int:
        if name not in known:
            words = PROGRAMS[name].words(materials, tmp_path_factory.mktemp("counted") / "out")
            process = launcher.start(words, crash={"at": 0, "signal": 0})
            assert process.wait() == 0, process.said()
            known[name] = process.changes()
        return known[name]

    return changes
