"""What the `weight` of a layer without a weight parameter is: decoded for the reader, and lost after it."""

from __future__ import annotations

import torch
from torch import Tensor


class DecodedWeight(Tensor):
    """A decoded weight: read it as any tensor; operations on it give plain tensors.

    Adapters are merged by assigning to `weight.data`. Here that would change a copy, and the adapter would be gone
    without a word, so it is an error.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        """The values, as a plain tensor."""
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise RuntimeError(
            "a quantized layer's weight is decoded from its codes and cannot be changed, so no adapter can be fused "
            "into it; keep the adapter apart, or call dequantize() on the model first"
        )


def decoded_weight(values: Tensor) -> DecodedWeight:
    """`values` as a `DecodedWeight`, sharing memory and gradients."""
    return values.as_subclass(DecodedWeight)
