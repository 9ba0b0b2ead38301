"""One process as a launch of its own, and how work is divided. Several processes: tests/faults/test_ranks.py."""

import os
import random
import socket
import sys
from itertools import pairwise, product

import pytest
from accelerate import PartialState

from vqdm.parallel import Ranks, launched, shares


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


def test_a_process_whose_peers_do_not_start_ends_with_a_line(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    where = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vqdm.parallel.SECONDS_TO_START", 0.5)
    if (child := os.fork()) == 0:
        try:
            PartialState._reset_state()
            with open(tmp_path / "said", "w") as sys.stderr, launched("cpu"):
                pass
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    said = (tmp_path / "said").read_text()
    assert said.count("\n") == 1
    assert "error: the 2 processes of this launch have not all started in 0.5 s, says process 0" in said
