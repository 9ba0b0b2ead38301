"""Devices: the one to compute on, its dtype, its memory, plans of what fits, and batches that are halved if it ends."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.tracking import Stopwatch, log_info

Item, Result = TypeVar("Item"), TypeVar("Result")

PROGRAM = 1_500_000_000  # bytes of RAM of a program and its libraries
WORKSPACES = 1_500_000_000  # of a GPU: its context, workspaces of libraries, what an allocator wastes; an estimate
MEASURING = 0.005  # seconds of the product that gives a rate
SMALLER_IMAGES = "try smaller --height and --width"


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
    """Make a GPU the current one, which `torch.cuda` uses without a number; return the device with its number.

    The CPU has none: moving a model to the "cpu:0" that accelerate names would copy all weights, to other addresses.
    """
    if device.type not in ("cuda", "xpu"):
        return torch.device("cpu") if device.type == "cpu" else device
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

    The resident set includes what the system keeps in RAM of mapped files, which plans leave out.

    Without a device, that of the current GPU if there is one.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        peaks["cuda"] = torch.cuda.max_memory_allocated(device)
    return peaks


def free_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Return the bytes that this process can have of a GPU and of RAM, what it has counted in; None where unknown.

    Pages of mapped files are available to the system already.
    """
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        return gpu, 1024 * int(lines["MemAvailable"].split()[0]) + (resident - of_files) * resource.getpagesize()
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
    advice: str = SMALLER_IMAGES

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


# ------------------------------------------------------------------------------------------- plans of memory


@dataclass(frozen=True)
class Need:
    """What a phase needs: bytes on the device that computes, in RAM beside it, and on the disk at its end; seconds."""

    phase: str
    device: int
    ram: int
    disk: int
    seconds: float = 0.0


def on(needs: list[Need], device: str) -> list[Need]:
    """Return the needs with those of the program itself; on a CPU, RAM is where all is computed."""
    if device == "cpu":
        return [replace(need, device=0, ram=need.ram + need.device + PROGRAM) for need in needs]
    return [replace(need, device=need.device + WORKSPACES, ram=need.ram + PROGRAM) for need in needs]


def table(needs: list[Need]) -> str:
    """Format a line per phase: GB, and an estimate of the minutes."""
    lines = [f"{'phase':12} {'GPU':>7} {'RAM':>7} {'disk':>7} {'minutes':>8}   GB and minutes: counted, not measured"]
    for need in needs:
        sizes = " ".join(f"{count / 1e9:7.2f}" for count in (need.device, need.ram, need.disk))
        lines.append(f"{need.phase:12} {sizes} {need.seconds / 60:8.1f}")
    return "\n".join([*lines, f"about {sum(need.seconds for need in needs) / 3600:.2g} hours in all"])


def lacking(needs: list[Need], device: int | None, ram: int | None) -> list[str]:
    """Return a line for GPU memory and for RAM, where a phase needs more than is free; None is unknown."""
    found = []
    for name, free, most in (
        ("GPU memory", device, max(needs, key=lambda need: need.device)),
        ("RAM", ram, max(needs, key=lambda need: need.ram)),
    ):
        wanted = most.device if name == "GPU memory" else most.ram
        if free is not None and wanted > free:
            found.append(f"{name}: phase {most.phase} needs {wanted / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    return found


def budgeted(
    config: Any,
    needs_of: Callable[[Any], list[Need]],
    alternatives: Iterable[Any],
    flags: Callable[[Any], str],
    device: torch.device,
) -> list[Need]:
    """Log what every phase of a run needs, and return it.

    Args:
        config: settings of the run, with `ignore_budget` and `dry_run`.
        needs_of: gives the needs of settings.
        alternatives: settings that need less; the closest come first.
        flags: gives the flags of an alternative.

    Raises:
        UserError: a phase needs more than is free, unless `ignore_budget` or `dry_run`; names flags that would do.
    """
    needs, free, refused = needs_of(config), free_memory(device), not (config.ignore_budget or config.dry_run)
    log_info(table(needs))
    short = lacking(needs, *free)
    if short:
        fits = next((one for one in alternatives if not lacking(needs_of(one), *free)), None)
        advice = f"it fits with {flags(fits)}" if fits else f"no {flags(None)} is small enough; {SMALLER_IMAGES}"
        message = f"{short[0]}; {advice}; --ignore_budget starts all the same"
        if refused:
            raise UserError(message)
        log_info(message)
    return needs


class MatmulRates(NamedTuple):
    """Floating-point operations per second of matrix products: in the type that a model computes in, in float32."""

    model: float
    single: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> MatmulRates:
        """Measure both on a device, within a tenth of a second after its libraries are loaded."""
        single = matmul_rate(device, torch.float32)
        return cls(single if dtype == torch.float32 else matmul_rate(device, dtype), single)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a product of square matrices, as large as take a while."""
    size, elapsed = 128, 0.0
    while elapsed < MEASURING and size < 8192:
        size *= 2
        A = torch.ones(size, size, device=device, dtype=dtype)
        for _ in range(2):  # libraries start with the first product of a size
            began = time.perf_counter()
            (A @ A)[0, 0].item()  # waits for the device
            elapsed = time.perf_counter() - began
    return 2 * size**3 / elapsed


class MemoryClock(Stopwatch):
    """Seconds by phase, and the peaks of memory that were reached in it: those of the host only ever grow."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.peaks = device, {}

    def _lap(self) -> None:
        super()._lap()
        self._note(self._open[-1] if self._open else "between")

    def _note(self, phase: str) -> None:
        before = self.peaks.get(phase, {})
        now = peak_memory(self.device)
        self.peaks[phase] = {kind: max(value, before.get(kind, 0)) for kind, value in now.items()}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def whole(self) -> dict[str, int]:
        """Return the peaks of all phases together, as `devices.peak_memory`."""
        self._note("between")
        return {kind: max(one[kind] for one in self.peaks.values()) for kind in self.peaks["between"]}

    def beside(self, needs: list[Need]) -> dict[str, dict]:
        """Return the peaks that were reached in each phase beside those of a plan, in bytes."""
        planned = {need.phase: {"gpu": need.device, "ram": need.ram, "disk": need.disk} for need in needs}
        return {name: {"reached": peaks, "planned": planned.get(name)} for name, peaks in self.peaks.items()}
