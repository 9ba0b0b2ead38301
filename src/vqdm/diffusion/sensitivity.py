"""Measure how much the quantization of each layer moves the denoiser's output, for all layers at once.

To first order a change Δ of one layer's weight moves the outputs f by J Δ. For random signs v the expected value of
(vᵀ J Δ)² is ‖J Δ‖² (Hutchinson, 1990), and one backward pass gives vᵀ J for every layer: one pass per recorded
point instead of one per layer. The effects of layers nearly add up, and their sum predicts the error of the whole.

In float16 vᵀ J of an inner layer may overflow where that of an outer one is small. A backward pass that overflows is
repeated with smaller signs, and each layer keeps its first finite result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from vqdm.diffusion.denoisers import output_of
from vqdm.diffusion.trajectories import Trajectories
from vqdm.errors import RunError
from vqdm.parallel import Ranks

SIGN_SIZES = (1.0, 2.0**-6, 2.0**-12, 2.0**-18)  # of v, tried in turn until no gradient overflows


def spread_over_noise(trajectories: Trajectories, count: int) -> list[tuple[int, int]]:
    """Return `count` points of different prompts, evenly spread over the steps; all if there are fewer."""
    prompts, steps = trajectories.shape
    count = min(count, prompts * steps)
    return [(n % prompts, (2 * n + 1) * steps // (2 * count)) for n in range(count)]


def output_effects(
    denoiser: nn.Module,
    changes: dict[str, Tensor | Callable[[], Tensor]],
    calls: list[Callable[[], dict]],
    generator: Callable[[int], torch.Generator],
    tick: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Return by layer name the squared error of the denoiser's outputs over their energy when this layer alone changes.

    Args:
        changes: by layer name, the tensor that is added to the weight, in its shape; on any device. Or a function that
            makes it, called at each of the calls.
        calls: functions that make the keyword arguments of one call each; every call uses one random v.
            They are spread over the ranks, and summed in their order.
        generator: gives the random numbers of the call of a number.
        tick: called after every call of this rank.

    Raises:
        RunError: the output or a gradient holds NaN or infinity; names the layer.
    """

    def effects(index: int) -> tuple[Tensor, float]:
        found = _effects_of_call(denoiser, changes, calls[index](), generator(index))
        tick()
        return found

    with following(denoiser, [denoiser.get_submodule(name).weight for name in changes]):
        found = (ranks or Ranks()).map(range(len(calls)), effects)
    squares, energies = zip(*found, strict=True)
    return dict(zip(changes, (torch.stack(squares).sum(0) / sum(energies)).tolist(), strict=True))


def _effects_of_call(
    denoiser: nn.Module, changes: dict, call: dict, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Return (vᵀ J Δ)² of every change [layers] on the CPU in float64, and the output's energy."""
    weights = [denoiser.get_submodule(name).weight for name in changes]
    signs = None
    moved = torch.full((len(weights),), torch.nan)
    for size in SIGN_SIZES:
        # The graph is rebuilt each time: retaining it would also retain what checkpointing recomputes.
        output = output_of(denoiser(**call)).float()
        if signs is None:
            signs = torch.randint(2, output.shape, generator=generator).mul_(2).sub_(1).to(output)
        found = _products(weights, changes, (output * signs * size).sum())
        moved = torch.where(moved.isfinite(), moved, found / size)
        energy = output.detach().double().square().sum().item()
        if moved.isfinite().all() or not math.isfinite(energy):
            break
    _check_finite(dict(zip(changes, moved.tolist(), strict=True)), energy, weights[0].dtype)
    return moved.double().square(), energy


def _products(weights: list[nn.Parameter], changes: dict, value: Tensor) -> Tensor:
    """Return the sum of gradient times change of every layer [layers] on the CPU; no two gradients exist at once."""
    found: dict[str, Tensor] = {}

    def multiply(name: str, weight: nn.Parameter) -> None:
        change = changes[name]() if callable(changes[name]) else changes[name]
        found[name] = (weight.grad.float() * change.to(weight.device)).sum()
        weight.grad = None

    named = zip(changes, weights, strict=True)
    hooks = [weight.register_post_accumulate_grad_hook(partial(multiply, name)) for name, weight in named]
    try:
        value.backward()
    finally:
        for hook in hooks:
            hook.remove()
    # The output does not depend on every layer: the last block of some transformers also updates its text.
    return torch.stack([found.get(name, value.new_zeros(())) for name in changes]).cpu()


def _check_finite(moved: dict[str, float], energy: float, dtype: torch.dtype) -> None:
    """Raise RunError if the output's energy or a layer's effect on it is not finite."""
    advice = f"NaN or infinity in {str(dtype).removeprefix('torch.')}; use --dtype bfloat16 or float32"
    if not math.isfinite(energy):
        raise RunError(f"the denoiser's output holds {advice}")
    # Gradients flow from the last layer to the first: the last one that overflows is where it began.
    for name, value in reversed(moved.items()):
        if not math.isfinite(value):
            raise RunError(f"layer {name}: the gradient of its weight holds {advice}")


@contextmanager
def following(denoiser: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients reach `weights`; on a GPU activations are recomputed, not stored."""
    able = getattr(denoiser, "_supports_gradient_checkpointing", False) and not denoiser.is_gradient_checkpointing
    checkpointing = able and denoiser.device.type != "cpu"
    try:
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
        if checkpointing:
            denoiser.disable_gradient_checkpointing()
