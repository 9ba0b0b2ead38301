"""Several processes, one a GPU, as `accelerate launch` or `torchrun` start them; they agree on what is to do."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from vqdm.diffusion.pipelines import pick_device
from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.peers import Peers

# Ranks wait for the slowest of them, which may be loading or verifying for longer than the backends' minutes. Those
# that ended are noticed at once, by `peers`.
PATIENCE = timedelta(days=2)
SECONDS_TO_START = 600.0  # for all processes of a launch to have started; launchers end the others of one that failed
NOTICE = 5.0  # seconds that `peers` has to end this process after its backend lost a connection


@dataclass(frozen=True)
class Ranks:
    """This process among all of the launch; one that was not launched is alone.

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
        """Every `world`-th item, beginning with this rank's own."""
        return items[self.rank :: self.world]

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank; all must call it."""
        held = [value]
        if self.world > 1:
            with _collective():
                broadcast_object_list(held)
        return held[0]

    def all_gather(self, value: Any) -> list:
        """Every rank's value, in order of the ranks, on every rank; all must call it."""
        if self.world == 1:
            return [value]
        with _collective():
            return gather_object([value])

    def map(self, items: Sequence, work: Callable[[Any], Any]) -> list:
        """`work` of every item, each done by one rank: all results in the items' order, on every rank."""
        parts = self.all_gather([work(item) for item in self.shard(items)])
        return [parts[index % self.world][index // self.world] for index in range(len(items))]

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the ranks; all must call it. In any order: see `HessianAccumulator`."""
        if self.world > 1:
            with _collective():
                torch.distributed.all_reduce(tensor)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            with _collective():
                self.state.wait_for_everyone()


def shares(costs: Sequence[float], world: int) -> list[list[int]]:
    """Indices of tasks for each of `world` ranks: the costliest first, each to the rank with the least to do so far.

    The slowest rank then takes at most 4/3 of the shortest time possible (Graham, SIAM J. Appl. Math. 17, 1969).
    """
    parts, loads = [[] for _ in range(world)], [0.0] * world
    for index in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        idle = loads.index(min(loads))
        parts[idle].append(index)
        loads[idle] += costs[index]
    return parts


@contextmanager
def _collective() -> Iterator[None]:
    """Leave a backend's complaint about a lost connection to `peers`, which knows whose it was."""
    try:
        yield
    except RuntimeError as error:
        time.sleep(NOTICE)
        raise RunError(f"the processes lost each other: {first_line(error)}") from None


@contextmanager
def _started() -> Iterator[None]:
    """End this process with a line where the others do not start: the backend would wait as long as for results."""
    alarm = threading.Timer(SECONDS_TO_START, _left_alone)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def use_device(device: torch.device) -> torch.device:
    """Make a GPU the one that `torch.cuda` means without a number; returns the device with its number."""
    if device.type not in ("cuda", "xpu"):
        return device
    module = getattr(torch, device.type)
    index = module.current_device() if device.index is None else device.index
    module.set_device(index)
    return torch.device(device.type, index)


def _left_alone() -> None:
    rank, world = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
    waited = f"the {world} processes of this launch have not all started in {SECONDS_TO_START:g} s"
    print(f"error: {waited}, says process {rank}; start the same command again", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread waits inside the backend and cannot be woken


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """Join the launch, if there is one; the log of all ranks but the first is kept to warnings.

    Raises:
        UserError: `--device` is not there, or names one GPU for several processes.
        RunError: the processes cannot reach each other.

    A process that waits in vain for the others to start ends at once, with a line.
    """
    chosen = pick_device(device)
    with _started():
        state = PartialState(cpu=chosen.type == "cpu", timeout=PATIENCE)
    world = state.num_processes
    if world > 1 and chosen.index is not None:
        raise UserError(f"--device {device} is one device for {world} processes; allowed are auto, cpu and cuda")
    if state.process_index:
        logging.getLogger("vqdm").setLevel(logging.WARNING)
    ranks = Ranks(state.process_index, world, use_device(state.device if world > 1 else chosen), state)
    peers = Peers.join(ranks.rank, world, state.local_process_index, ranks.broadcast) if world > 1 else None
    yield ranks
    # Only after success: a rank that failed leaves at once, and `peers` ends the others.
    if peers:
        peers.leave()
        state.destroy_process_group()
