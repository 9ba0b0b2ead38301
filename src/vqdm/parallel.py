"""Several processes, one per GPU, as `accelerate launch` or `torchrun` start them, and the collectives among them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from vqdm.devices import pick_device, use_device
from vqdm.documents import first_line
from vqdm.errors import RunError, UserError

# Ranks wait for the slowest one, which may be loading or quantizing for longer than the backends' default of minutes.
# The launcher ends the others at once when a rank fails; this limit is for launches without one.
TIMEOUT = timedelta(hours=2)
LOST = "another process of the launch has ended or does not answer; start the same command again"


@dataclass(frozen=True)
class Ranks:
    """This process among all of the launch; a process that was not launched is the only one.

    Attributes:
        rank, world: number of this process, and how many there are.
        device: where this process computes.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    state: PartialState | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence) -> Sequence:
        """Return every `world`-th item, beginning with item `rank`."""
        return items[self.rank :: self.world]

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's value on every rank; all must call it."""
        held = [value]
        if self.world > 1:
            with _connected():
                broadcast_object_list(held)
        return held[0]

    def all_gather(self, value: Any) -> list:
        """Return every rank's value, in the order of the ranks, on every rank; all must call it."""
        if self.world == 1:
            return [value]
        with _connected():
            return gather_object([value])

    def map(self, items: Sequence, work: Callable[[Any], Any]) -> list:
        """Compute `work` of every item, each on one rank; return all results in the items' order on every rank."""
        parts = self.all_gather([work(item) for item in self.shard(items)])
        return [parts[index % self.world][index // self.world] for index in range(len(items))]

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the ranks, in any order; all must call it."""
        if self.world > 1:
            with _connected():
                torch.distributed.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        if self.world > 1:
            with _connected():
                self.state.wait_for_everyone()


def shares(costs: Sequence[float], world: int) -> list[list[int]]:
    """Divide tasks among `world` ranks, as indices: the costliest first, each to the rank with the least work so far.

    The slowest rank then takes at most 4/3 of the shortest time possible (Graham, SIAM J. Appl. Math. 17, 1969).
    """
    parts, loads = [[] for _ in range(world)], [0.0] * world
    for index in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        idle = loads.index(min(loads))
        parts[idle].append(index)
        loads[idle] += costs[index]
    return parts


@contextmanager
def _connected(problem: str = LOST) -> Iterator[None]:
    """Turn a backend's error about a lost or late rank into one line."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(f"{problem}: {first_line(error)}") from None


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """Join the launch, if there is one; only the first rank logs more than warnings.

    If a rank fails, torchrun or accelerate ends the others.

    Raises:
        UserError: `--device` is not available, or names one GPU for several processes.
        RunError: the processes cannot reach each other.
    """
    chosen = pick_device(device)
    with _connected("the processes of this launch cannot connect"):
        state = PartialState(cpu=chosen.type == "cpu", timeout=TIMEOUT)
    world = state.num_processes
    if world > 1 and chosen.index is not None:
        raise UserError(f"--device {device} is one device for {world} processes; allowed are auto, cpu and cuda")
    if state.process_index:
        logging.getLogger("vqdm").setLevel(logging.WARNING)
    yield Ranks(state.process_index, world, use_device(state.device if world > 1 else chosen), state)
    if world > 1:  # only after success: a failed rank must not wait for the others
        state.destroy_process_group()
