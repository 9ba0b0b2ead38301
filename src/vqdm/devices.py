"""Devices: the one to compute on, its dtype, the peak of its memory, and batches that are halved where it ends."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.tracking import log_info

Item, Result = TypeVar("Item"), TypeVar("Result")


def pick_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the first GPU, else the CPU.

    Raises:
        UserError: the device is unknown or not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)}") from None
    return torch.device(name)


def use_device(device: torch.device) -> torch.device:
    """Make a GPU the current one, which `torch.cuda` uses without a number; return the device with its number."""
    if device.type not in ("cuda", "xpu"):
        return device
    module = getattr(torch, device.type)
    index = module.current_device() if device.index is None else device.index
    module.set_device(index)
    return torch.device(device.type, index)


def check_float64(device: torch.device) -> None:
    """Raise UserError for a device without float64, such as Apple's, in which Hessians are accumulated exactly."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        raise UserError(
            f"--device {device} has no float64, which this program accumulates in; use --device cpu"
        ) from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; "auto" is float32 on a CPU, bfloat16 on a GPU that has it, float16 on other GPUs."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if _has_bfloat16(device) else torch.float16


def _has_bfloat16(device: torch.device) -> bool:
    """Return whether a GPU computes in bfloat16: those of Intel, of NVIDIA from compute capability 8.0 on."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "xpu"


def peak_memory(device: torch.device | None = None) -> dict[str, int]:
    """Return bytes: the process's largest resident set, and the peak of tensors on `device` if it is a CUDA GPU.

    Without a device, that of the current GPU if there is one.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        peaks["cuda"] = torch.cuda.max_memory_allocated(device)
    return peaks


def free_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Return the bytes that this process can have of a GPU and of RAM, what it has counted in; None where unknown."""
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return gpu, 1024 * int(lines["MemAvailable"].split()[0]) + pages * resource.getpagesize()
    except (OSError, KeyError, ValueError):  # no Linux
        return gpu, None


# ------------------------------------------------------------------------------------------- out of memory


@dataclass
class BatchSize:
    """A batch size that is halved for good on out of memory.

    Attributes:
        value: the size now.
        advice: what to try where a batch of one is out of memory.
    """

    value: int
    advice: str = "try smaller --height and --width"

    def batches(
        self, work: Callable[[Sequence[Item]], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Sequence[Item], Result]]:
        """Yield (batch, `work` of it) until no item is left; a batch that is out of memory is repeated in halves.

        Raises:
            RunError: as `halve`.
        """
        done = 0
        while done < len(items):
            batch = items[done : done + self.value]
            found = unless_out_of_memory(work, batch)
            if found is None:
                self.halve(len(batch))
            else:
                yield batch, found[0]
                done += len(batch)

    def halve(self, tried: int) -> None:
        """Halve after a batch of `tried` items was out of memory. Raises RunError if it was of one."""
        if tried <= 1:
            raise RunError(f"out of memory at batch size 1; {self.advice}")
        self.value = tried // 2
        log_info(f"out of memory at batch size {tried}; continuing with {self.value}")


def as_batch_size(size: int | BatchSize) -> BatchSize:
    """Return a batch size that can be halved; a plain number is so for one call only."""
    return size if isinstance(size, BatchSize) else BatchSize(size)


def unless_out_of_memory(work: Callable[..., Result], *args) -> tuple[Result] | None:
    """Return the result of `work(*args)` in a tuple, or None on out of memory, once what it held is freed."""
    try:
        return (work(*args),)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: while the exception lives, its frames hold the tensors to free.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means out of memory, of a GPU or of the machine."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "not enough memory" in words
