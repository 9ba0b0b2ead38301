"""How much each layer's quantization moves the UNet's output: one layer at a time, on recorded points.

The effects of layers nearly add up, so that their sum predicts the error of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqdm.diffusion.blocks import Layer, weight_of
from vqdm.diffusion.trajectories import Trajectories

Calls = list[Callable[[], dict]]


def spread_over_noise(trajectories: Trajectories, count: int) -> list[tuple[int, int]]:
    """`count` points of different prompts, evenly spread over the steps, fewer where there are fewer."""
    prompts, steps = trajectories.latents.shape[:2]
    count = min(count, prompts * steps)
    return [(n % prompts, (2 * n + 1) * steps // (2 * count)) for n in range(count)]


@torch.no_grad()
def outputs(unet: nn.Module, calls: Calls) -> list[Tensor]:
    """The UNet's outputs, float32, one tensor a call."""
    return [unet(**call()).sample.float() for call in calls]


@contextmanager
def replaced_weight(unet: nn.Module, layer: Layer, matrix: Tensor) -> Iterator[None]:
    """Inside, the layer's weight is that of `matrix` [O, I]."""
    weight = unet.get_submodule(layer.name).weight
    original = weight.data
    weight.data = weight_of(matrix, original.shape, layer.spec.group_channels).to(original.dtype)
    try:
        yield
    finally:
        weight.data = original


def output_effect(unet: nn.Module, layer: Layer, matrix: Tensor, calls: Calls, expected: list[Tensor]) -> float:
    """Squared error of the UNet's outputs over their energy when one layer's weight is `matrix` [O, I]."""
    with replaced_weight(unet, layer, matrix):
        found = outputs(unet, calls)
    error = sum((one - other).double().square().sum() for one, other in zip(found, expected, strict=True))
    return (error / sum(one.double().square().sum() for one in expected)).item()
