"""One buffer for decoded weights a device, type and stream, as large as the largest that was asked for.

A layer borrows it for its call, so that decoded weights take the memory of one layer and no time to allocate.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _Buffer:
    """Memory, and the tensors of each shape that have been made of it.

    Made outside of inference mode, or they could not be written to there.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        with torch.inference_mode(False):
            self.memory = torch.empty(torch.Size(shape).numel(), dtype=dtype, device=device)
        self._views: dict[tuple[int, ...], Tensor] = {}

    def view(self, shape: tuple[int, ...]) -> Tensor | None:
        """A tensor of `shape`; None where the memory is too small."""
        if shape not in self._views:
            count = torch.Size(shape).numel()
            if count > self.memory.numel():
                return None
            with torch.inference_mode(False):
                self._views[shape] = self.memory[:count].view(shape)
        return self._views[shape]


_idle: dict[tuple, _Buffer] = {}


class scratch:
    """`with scratch(shape, dtype, device) as out`: an uninitialised tensor that is valid inside.

    Who comes while the buffer is lent gets memory of their own. Every call of every layer comes here, so it is quick.
    """

    __slots__ = ("_key", "_lent", "_shape")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self._shape, self._key = shape, (dtype, device, _stream(device))

    def __enter__(self) -> Tensor:
        self._lent = _idle.pop(self._key, None)  # one step, so that no two threads get the same
        out = self._lent and self._lent.view(self._shape)
        if out is None:
            self._lent = None  # the smaller one goes before the larger one comes
            self._lent = _Buffer(self._shape, *self._key[:2])
            out = self._lent.view(self._shape)
        return out

    def __exit__(self, *_) -> None:
        idle = _idle.get(self._key)
        if idle is None or idle.memory.numel() < self._lent.memory.numel():
            _idle[self._key] = self._lent


def free_scratch() -> None:
    """Give the buffers' memory back; the next layer that is called allocates anew."""
    _idle.clear()


def _stream(device: torch.device) -> int:
    """What runs on another stream may still read a buffer that is idle on this one."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
