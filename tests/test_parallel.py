"""One process as a launch of its own, and how work is divided. Several processes: tests/faults/test_ranks.py."""

import os
import random
import subprocess
import sys
from itertools import pairwise, product

import pytest

from vqdm.errors import RunError
from vqdm.parallel import Ranks, shares


def test_a_process_that_was_not_launched_is_alone():
    ranks = Ranks()
    assert ranks.main and ranks.shard([1, 2, 3]) == [1, 2, 3]
    assert ranks.broadcast("x") == "x" and ranks.all_gather(4) == [4]
    assert ranks.map([3, 1], lambda item: item * 2) == [6, 2]
    ranks.barrier()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_hold_every_task_once_and_are_near_the_best(world):
    """At most 4/3 of the shortest time, found by trying all divisions."""
    draw = random.Random(world)
    for _ in range(20):
        costs = [draw.randint(1, 9) for _ in range(7)]
        parts = shares(costs, world)
        assert sorted(index for part in parts for index in part) == list(range(7))
        times = [sum(costs[index] for index in part) for part in parts]
        divisions = product(range(world), repeat=7)
        best = min(
            max(sum(c for c, r in zip(costs, ranks, strict=True) if r == k) for k in range(world))
            for ranks in divisions
        )
        assert max(times) <= best * 4 / 3
        assert all(costs[a] >= costs[b] for part in parts for a, b in pairwise(part))


def test_shares_of_fewer_tasks_than_ranks_leave_some_idle():
    assert shares([5.0], 3) == [[0], [], []]
    assert shares([], 2) == [[], []]


WORKER = """
import os, signal, sys, time
from vqdm.cli import run_script
from vqdm.parallel import launched

def work(words):
    with launched("cpu") as ranks:
        ranks.barrier()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

sys.exit(run_script(work, []))
"""


def test_a_killed_process_ends_a_launch(tmp_path):
    """torchrun ends the other process, which computes without waiting for the killed one."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Signal 9 (SIGKILL)" in done.stderr


def test_a_lost_connection_is_one_line(monkeypatch):
    def lost(_):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore")

    monkeypatch.setattr("vqdm.parallel.broadcast_object_list", lost)
    with pytest.raises(RunError, match=r"has ended or does not answer; .*: Connection closed by peer \[127.0.0.1\]:1$"):
        Ranks(0, 2).broadcast(1)
