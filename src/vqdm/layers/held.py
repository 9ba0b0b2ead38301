"""Weights that are decoded once for several forward and backward passes, as accumulating gradients asks for.

Decoding and the gradients of codes then cost once an optimizer step instead of once a micro-batch. It takes the memory
of all weights and of their gradients in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqdm.layers.decode import decode
from vqdm.layers.functional import code_gradients
from vqdm.layers.quantized import QuantizedLayer, quantized_layers
from vqdm.layers.stored import Stored


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Inside, layers use weights that are decoded on entering; passes backward add up these weights' gradients.

    On leaving, they are turned into gradients of what the weights were decoded from, added to `.grad` there, and of
    `latent` where a layer has one. The stored tensors must not change inside. After an exception nothing is added.
    """
    layers = list(quantized_layers(model).values())
    try:
        for layer in layers:
            layer.held = decode(layer._stored(), torch.float32).requires_grad_(_learns(layer))
        yield
        for layer in layers:
            spread_gradient(layer, layer.held.grad)
            layer.held = None
    finally:
        for layer in layers:
            layer.held = None


def spread_gradient(layer: QuantizedLayer, E: Tensor | None) -> None:
    """Add to `.grad` of a layer's tensors what the gradient `E` [O, I] of its decoded weight means for them."""
    if E is None:
        return
    if _wants(layer.latent):
        layer.latent.grad = E.to(layer.latent.dtype) if layer.latent.grad is None else layer.latent.grad + E
    stored = layer._stored()
    free = stored.learnable()
    needs = tuple(_wants(tensor) for tensor in free)
    if any(needs):
        found = code_gradients(_as_matrix(stored, free[1]), E, needs)
        pairs = [(tensor, grad) for tensor, grad in zip(free, found, strict=True) if grad is not None]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


def _as_matrix(stored: Stored, scales: Tensor | None) -> Stored:
    """Without the graph, and with scales [R, S] that are looked up already, unless they are logarithms."""
    plain = stored._replace(scales=scales, scale_codes=None, scale_values=None)
    return plain._replace(**{name: None if one is None else one.detach() for name, one in _floats(plain).items()})


def _floats(stored: Stored) -> dict[str, Tensor | None]:
    return {name: getattr(stored, name) for name in ("codebooks", "scales", "input_scales")}


def _learns(layer: QuantizedLayer) -> bool:
    stored = layer._stored()
    tensors = stored.codebooks, stored.scales, stored.scale_values, stored.input_scales, layer.latent
    return any(_wants(tensor) for tensor in tensors)


def _wants(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
