"""A long step of a run in pieces: each is a file in the run's folder, made by one process and read by all.

What the pieces are does not depend on the number of processes, and neither does a piece on the others; so the result
is the same for any number of them. After an interruption only pieces that are not there yet are made.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from vqdm.errors import RunError
from vqdm.parallel import Ranks
from vqdm.storage.atomic import Damaged, load_sealed, save_sealed

Tensors = dict[str, Tensor]
SECONDS_TO_APPEAR = 60.0  # that a network disk has to show one machine what another has written


def pieces(ranks: Ranks, folder: Path, names: Sequence[str], make: Callable[[str], Tensors]) -> list[Tensors]:
    """The tensors of every piece, in the order of `names`; all ranks must call it.

    Raises:
        RunError: a file is damaged.
    """
    missing = ranks.broadcast([name for name in names if not _file(folder, name).is_file()])
    for name in ranks.shard(missing):
        save_sealed(make(name), _file(folder, name))
    ranks.barrier()
    return [read(_file(folder, name)) for name in names]


def spans(ranks: Ranks, folder: Path, first: int, count: int, size: int) -> list[tuple[int, int]]:
    """Cover items `first` to `first + count` by spans (first, count); all ranks must call it.

    Spans whose pieces the folder holds stay, and between them there are new ones of at most `size`: a run that is
    resumed with another batch size keeps what it has, and one with the same gets the spans that it would have had.
    """
    files = [re.fullmatch(r"(\d+)-(\d+)\.safetensors", path.name) for path in folder.glob("*.safetensors")]
    held = sorted((int(file[1]), int(file[2])) for file in files if file)
    place, end, found = first, first + count, []
    for start, number in [*held, (end, 0)]:
        if place <= start and start + number <= end:
            found += [(k, min(size, start - k)) for k in range(place, start, size)]
            found += [(start, number)] * (number > 0)
            place = start + number
    return ranks.broadcast(found)


def span_name(first: int, count: int) -> str:
    """The name of a span's piece."""
    return f"{first:06d}-{count:04d}"


def read(path: Path) -> Tensors:
    """The tensors of a file that is there, or will be in a moment. Raises RunError when it is damaged."""
    appear(path)
    try:
        return load_sealed(path)[0]
    except (OSError, Damaged) as error:
        raise RunError(f"{path} is damaged ({error}); delete it and run again with --resume") from None


def appear(path: Path) -> None:
    """Wait for a file that another machine has written already.

    Raises:
        RunError: it does not appear.
    """
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not path.is_file():
        if time.monotonic() > end:
            raise RunError(f"{path} does not appear; all machines must share the folder of --output_dir")
        time.sleep(0.2)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
