"""Devices: the one to compute on, its dtype, and the peak of its memory."""

from __future__ import annotations

import resource
import sys

import torch

from vqdm.documents import first_line
from vqdm.errors import UserError


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
