"""Casting quantized models where diffusers itself asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def allow_casting(model: nn.Module) -> Iterator[None]:
    """Inside, diffusers casts a quantized model as it does a plain one, instead of refusing.

    `load_ip_adapter` and `save_lora_adapter` cast the model to the type that it has. Floating-point tensors of codes
    are cast like all others; packed codes are integers and stay.
    """
    quantized = getattr(model, "is_quantized", False)
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = quantized
