"""Programs that are killed at random moments, and resumed, end with the bytes of a run that nobody disturbed.

Moments are those of progress, never of a clock: the n-th change that the program makes to the disk, or the n-th file or
line that a watcher sees; n is drawn with a seed from what a whole run makes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
from launcher import SECONDS, Launcher, Process
from PIL import Image
from programs import BATCH, PROGRAMS, Materials, Program

from vqdm.parallel import LOST
from vqdm.storage.files import UNFINISHED, load_checked

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDINGS = {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGTERM: {-signal.SIGTERM}, signal.SIGINT: {130}}


@dataclass
class Torture:
    """Kills of one program on `world` ranks until `kills` of them have hit."""

    launcher: Launcher
    materials: Materials
    program: Program
    world: int
    draw: random.Random
    folder: Path
    expected: dict[str, str]
    changes: int  # of the disk, in a whole run on one process

    def run(self, kills: int) -> int:
        """Kill, check and resume, each output folder until it is finished; returns how many kills hit."""
        hits, number = 0, 0
        while hits < kills:
            out, number = self.folder / str(number), number + 1
            while not self.attempt(out, last=hits >= kills):
                hits += 1
            assert self.program.results(out) == self.expected
            assert not list(out.rglob(f"*{UNFINISHED}"))
        return hits

    def attempt(self, out: Path, last: bool) -> bool:
        """One start with one kill; whether the program had finished before it."""
        done = self.stamps(out)
        victim, number, moment = self.draw.randrange(self.world), self.draw.choice(SIGNALS), self.moment()
        inside = self.draw.random() < 0.5
        words = [*self.program.words(self.materials, out), *(["--resume"] if self.program.resumes else [])]
        crash = {victim: {"at": moment, "signal": number}} if inside and not last else None
        ranks = self.launcher.launch(words, self.world, crash)
        if not inside and not last:
            watch(ranks[victim], out, moment)
            ranks[victim].kill(number)
        supervise(ranks)
        finished = all(rank.status == 0 for rank in ranks)
        if not finished:
            self.check_ending(ranks, victim, number)
        self.check_folder(out, done)
        return finished

    def moment(self) -> int:
        """Early moments more often: a resumed run has less left to do."""
        return 1 + int(self.changes * self.draw.random() ** 2)

    def check_ending(self, ranks: list[Process], victim: int, number: int) -> None:
        """The victim ends with its signal; the others are ended by the launcher, or notice and log one line."""
        assert ranks[victim].status in ENDINGS[number], ranks[victim].said()
        for rank in (rank for rank in ranks if rank is not ranks[victim] and rank.status != 0):
            assert rank.status in (1, -signal.SIGTERM), rank.said()
            assert len(rank.errors()) in ((1,) if rank.status == 1 else (0, 1)), rank.said()
            assert all(line.startswith(f"error: {LOST}: ") for line in rank.errors()), rank.said()

    def check_folder(self, out: Path, done: dict[Path, tuple]) -> None:
        """Every file is whole; what was done before is still the same file; little was lost."""
        for path in out.rglob("*"):
            check_whole(path)
        again = [path for path, stamp in self.stamps(out).items() if done.get(path, stamp) != stamp]
        assert not again, f"made again: {again}"
        assert self.program.unkept(out) <= BATCH * self.world

    def stamps(self, out: Path) -> dict[Path, tuple]:
        found = {path: path.stat() for path in self.program.kept(out)}
        return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def supervise(ranks: list[Process]) -> None:
    """Wait for all ranks, and end the others once one has failed, as torchrun does."""
    end = time.monotonic() + SECONDS
    while not all([rank.ended() for rank in ranks]):
        if any(rank.status for rank in ranks):
            for rank in ranks:
                rank.kill(signal.SIGTERM)
        assert time.monotonic() < end, [rank.said() for rank in ranks]
        time.sleep(0.01)


def watch(process: Process, out: Path, moment: int) -> None:
    """Return when the program has shown so many files and lines, or has ended."""
    seen: set[str] = set()
    while not process.ended():
        seen.update(os.path.join(folder, name) for folder, _, names in os.walk(out) for name in names)
        if len(seen) + process.said().count("\n") >= moment:
            return
        time.sleep(0.001)


def check_whole(path: Path) -> None:
    """Raise where a file is damaged; those that begin with a dot or are still being staged are nobody's result."""
    staged = "work" in path.parts and "pipeline" in path.parts
    if path.name.startswith(".") or staged or not path.is_file():
        return
    if path.suffix == ".safetensors" and "work" in path.parts:
        load_checked(path)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".png":
        Image.open(path).load()


@pytest.fixture
def torture(launcher, materials, uninterrupted, disk_changes, tmp_path):
    def make(name: str, world: int, seed: int) -> Torture:
        draw = random.Random(f"{name}:{world}:{seed}")
        told = uninterrupted(name, world), disk_changes(name)
        return Torture(launcher, materials, PROGRAMS[name], world, draw, tmp_path, *told)

    return make


@pytest.mark.parametrize(
    ("name", "world", "kills"),
    [
        ("quantize", 1, 5),
        ("quantize", 2, 2),
        ("finetune", 1, 2),
        ("finetune", 2, 2),
        ("generate", 1, 4),
        ("metrics", 1, 1),
    ],
)
def test_a_few_kills(torture, name, world, kills):
    assert torture(name, world, 0).run(kills) >= kills


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        *product(["quantize"], range(7)),
        *product(["finetune"], range(3)),
        *product(["generate"], range(4)),
        ("metrics", 0),
    ],
)
def test_ten_kills_of_300(torture, name, world, seed):
    assert torture(name, world, seed + 1).run(10) >= 10
