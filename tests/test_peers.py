"""Processes that hold connections to each other: plain forks, without a launch."""

import ast
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from vqdm.peers import Peers


class Exchange:
    """The first process's value for all of them, through a file."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, value):
        if value is not None:
            self.path.with_suffix(".new").write_text(repr(value))
            self.path.with_suffix(".new").rename(self.path)
        while not self.path.exists():
            time.sleep(0.001)
        return ast.literal_eval(self.path.read_text())


def forked(work, log: Path) -> int:
    """The id of a process that does `work`, and writes what it says into a file."""
    child = os.fork()
    if child:
        return child
    status = 9
    try:
        with open(log, "w") as sys.stderr:
            work()
        status = 0
    finally:
        os._exit(status)


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """Three connected processes: those in `leaving` go at once and in peace, the others stay."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def start(leaving: set[int], local_ranks: list[int]) -> list[int]:
        def work(rank: int) -> None:
            peers = Peers.join(rank, 3, local_ranks[rank], Exchange(tmp_path / "address"))
            (tmp_path / f"{rank}.joined").touch()
            if rank in leaving:
                peers.leave()
            else:
                time.sleep(60)

        found = [forked(lambda rank=rank: work(rank), tmp_path / f"{rank}.log") for rank in range(3)]
        while len(list(tmp_path.glob("*.joined"))) < 3:
            time.sleep(0.001)
        return found

    return start


def statuses(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("machines", [1, 3])
def test_all_end_with_the_one_that_is_gone(processes, tmp_path, victim, machines):
    """The survivors end with status 1; one of each machine says why."""
    pids = processes(set(), [0, 1, 2] if machines == 1 else [0, 0, 0])
    os.kill(pids[victim], signal.SIGKILL)
    assert statuses(pids) == [-9 if rank == victim else 1 for rank in range(3)]
    said = [path.read_text() for path in sorted(tmp_path.glob("*.log"))]
    assert sum(bool(text) for text in said) == (1 if machines == 1 else 2)
    assert all(f"error: process {victim} of 3 has ended, and the others end with it" in text for text in said if text)


def test_a_goodbye_is_no_failure(processes):
    pids = processes({1, 2}, [0, 1, 2])
    assert statuses(pids[1:]) == [0, 0]
    time.sleep(0.1)
    assert os.waitpid(pids[0], os.WNOHANG) == (0, 0)
    os.kill(pids[0], signal.SIGKILL)
    assert statuses(pids[:1]) == [-9]


@pytest.mark.parametrize("said", [b"guess 1\n", b"\xff\xfe\x00\n", b""])
def test_a_stranger_is_sent_away(tmp_path, monkeypatch, said):
    """Who connects without the word is not taken for a process of the launch, nor who says nothing."""
    monkeypatch.setattr("vqdm.peers.SECONDS_TO_SPEAK", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    exchange = Exchange(tmp_path / "address")
    first = forked(lambda: Peers.join(0, 2, 0, exchange).leave(), tmp_path / "0.log")
    port, _ = exchange(None)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(said)
        assert stranger.recv(1) == b""
    second = forked(lambda: Peers.join(1, 2, 1, exchange).leave(), tmp_path / "1.log")
    assert statuses([first, second]) == [0, 0]
