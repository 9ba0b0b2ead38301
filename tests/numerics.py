"""What two computations of one thing must share: stored tensors every bit, outputs all but rounding.

A sum of n rounded terms is off by about √n · ε of its size, more when the order of its terms changes, and how a
processor orders them is its own affair (docs/determinism.md). So no test compares outputs of two models, of two batch
sizes or of two copies by `torch.equal`; one that calls the same function on the same tensors may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

TERMS = 1024  # of the longest sums in the tiny models
LAYERS = 8  # roundings that meet on the way to an output, in units of one sum's


def assert_same_tensors(found: nn.Module | Mapping[str, Tensor], expected: nn.Module | Mapping[str, Tensor]) -> None:
    """Equal names, types, shapes and values, bit for bit."""
    ours, theirs = (one.state_dict() if isinstance(one, nn.Module) else one for one in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def rounding(dtype: torch.dtype, terms: int = TERMS) -> float:
    """How far two orders of adding may move an output, relative to the largest one."""
    return LAYERS * math.sqrt(terms) * torch.finfo(dtype).eps


def assert_close_outputs(found: Tensor, expected: Tensor, terms: int = TERMS, gain: float = 1.0) -> None:
    """Equal types and shapes, and values that differ by the rounding of sums of `terms` terms at most.

    Args:
        gain: how much a model whose random weights are large amplifies what differs on the way.
    """
    atol = gain * rounding(expected.dtype, terms) * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def random_widths(groups: int, total: int, most: int, generator: torch.Generator) -> Tensor:
    """Widths of the column groups of a code of variable rate, 0 to `most`, that add up to `total`: int64 [groups]."""
    places = torch.randperm(groups * most, generator=generator)[:total]  # of which every group has `most`
    return torch.bincount(places % groups, minlength=groups)
