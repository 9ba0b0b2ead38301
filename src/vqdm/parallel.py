"""Several processes, one a GPU, as `accelerate launch` or `torchrun` start them; they agree on what is to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from vqdm.diffusion.pipelines import pick_device
from vqdm.errors import UserError

# Ranks wait for the slowest of them, which may be loading or verifying for longer than the backends' minutes.
PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """This process among all of the launch.

    Attributes:
        rank, world: number of this process, and how many there are.
        device: where this process computes.
    """

    rank: int
    world: int
    device: torch.device
    state: PartialState

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """Every `world`-th item, beginning with this rank's own."""
        return items[self.rank :: self.world]

    def agreed(self, value: Any) -> Any:
        """The first rank's value, on every rank; all must call it."""
        held = [value]
        broadcast_object_list(held)
        return held[0]

    def gathered(self, value: Any) -> list:
        """Every rank's value, in order of the ranks, on every rank; all must call it."""
        return gather_object([value])

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.state.wait_for_everyone()


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """Join the launch, if there is one; the log of all ranks but the first is kept to warnings.

    Raises:
        UserError: `--device` is not there, or names one GPU for several processes.
    """
    chosen = pick_device(device)
    state = PartialState(cpu=chosen.type == "cpu", timeout=PATIENCE)
    world = state.num_processes
    if world > 1 and chosen.index is not None:
        raise UserError(f"--device {device} is one device for {world} processes; allowed are auto, cpu and cuda")
    if state.process_index:
        logging.getLogger("vqdm").setLevel(logging.WARNING)
    yield Ranks(state.process_index, world, state.device if world > 1 else chosen, state)
    # Only after success: a rank that failed leaves at once, and the launcher ends the others.
    if world > 1:
        state.destroy_process_group()
