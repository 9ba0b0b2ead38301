"""One buffer for decoded weights a device, type and stream, as large as the largest that was asked for.

A layer borrows it for its call, so that decoded weights take the memory of one layer and no time to allocate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_idle: dict[tuple, Tensor] = {}


@contextmanager
def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialised tensor that is valid inside. Who comes while the buffer is lent gets memory of their own."""
    key = (device, dtype, _stream(device))
    count = torch.Size(shape).numel()
    buffer = _idle.pop(key, None)  # one step, so that no two threads get the same
    if buffer is None or buffer.numel() < count:
        buffer = None  # the smaller one goes before the larger one comes
        with torch.inference_mode(False):  # or it could not be written to outside of inference mode
            buffer = torch.empty(count, dtype=dtype, device=device)
    try:
        yield buffer[:count].view(shape)
    finally:
        if key not in _idle or _idle[key].numel() < buffer.numel():
            _idle[key] = buffer


def free_scratch() -> None:
    """Give the buffers' memory back; the next layer that is called allocates anew."""
    _idle.clear()


def _stream(device: torch.device) -> int:
    """What runs on another stream may still read a buffer that is idle on this one."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
