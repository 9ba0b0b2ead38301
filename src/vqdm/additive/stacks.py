"""Layers of one shape and format as one: a leading axis L, so that every launch on a GPU does the work of all of them.

A single layer is left without the axis, for which products are fastest on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode


def together(find: Callable[..., AdditiveCode], *layers: Sequence, beam_size: int) -> list[AdditiveCode]:
    """`feedback_encode` or `coordinate_descent` of several layers at once, given a list for each of its arguments."""
    found = find(*map(stacked, layers), beam_size=beam_size)
    return [found] if len(layers[0]) == 1 else apart(found)


def stacked(values: Sequence[Tensor] | Sequence[AdditiveCode]) -> Tensor | AdditiveCode:
    """Tensors or codes of several layers as one with a leading axis; of one layer, what it is."""
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    names = _tensors(values[0])
    return replace(values[0], **{name: stacked([getattr(value, name) for value in values]) for name in names})


def apart(code: AdditiveCode) -> list[AdditiveCode]:
    """The codes of several layers, one by one."""
    layers = zip(*_tensors(code).values(), strict=True)
    return [replace(code, **dict(zip(_tensors(code), layer, strict=True))) for layer in layers]


def _tensors(code: AdditiveCode) -> dict[str, Tensor]:
    return {"codes": code.codes, "codebooks": code.codebooks, "scales": code.scales}
