"""Starting, watching and killing programs for the tests of faults."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60.0  # that anything waited for may take: the promise for ranks whose peer is gone


class Launcher:
    """Client of `fork_server.py`."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
            text=True,
            start_new_session=True,
        )
        json.loads(self.server.stdout.readline())

    def ask(self, **order) -> dict:
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, words: list, env: dict | None = None, **options) -> Process:
        """Start a program; `options` are those of the server."""
        self.started += 1
        log = self.folder / f"{self.started:04d}.log"
        log.touch()
        answer = self.ask(start=list(map(str, words)), env=env or {}, log=str(log), **options)
        return Process(self, answer["pid"], log)

    def launch(self, words: list, world: int, crashes: dict[int, dict] | None = None) -> list[Process]:
        """Start `world` ranks of a program, or a single process; `crashes` are by rank."""
        if world == 1:
            return [self.start(words, crash=(crashes or {}).get(0))]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
        return [
            self.start(words, {name: str(value) for name, value in env.items()}, crash=(crashes or {}).get(rank))
            for rank, env in enumerate(ranks)
        ]

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(SECONDS)


@dataclass
class Process:
    """A program that runs or has run."""

    launcher: Launcher
    pid: int
    log: Path
    status: int | None = None

    def ended(self) -> bool:
        if self.status is None:
            self.status = self.launcher.ask(poll=self.pid)["status"]
        return self.status is not None

    def wait(self, seconds: float = 5 * SECONDS) -> int:
        """The exit status. Raises AssertionError where there is none in time."""
        end = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > end:
                os.kill(self.pid, 9)
                raise AssertionError(f"still running after {seconds} s:\n{self.said()}")
            time.sleep(0.005)
        return self.status

    def kill(self, signal: int) -> None:
        if not self.ended():
            os.kill(self.pid, signal)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def errors(self) -> list[str]:
        """Lines that the program ended with."""
        return [line for line in self.said().splitlines() if line.startswith("error: ")]

    def changes(self) -> int:
        """How often the program changed the disk, where that was counted."""
        return int(Path(f"{self.log}.changes").read_text())
