"""Trainable parameters: every floating-point tensor of the student. Codes and 8-bit values are integers and stay.

These are codebooks (a layer's own, groupwise, as tables of values, or shared), scales (of rows, groups, inputs, int8
layers), biases and norms, and weights of layers that are not quantized.

Parameters are float32 in training and written back in the type they are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vqdm.diffusion.pipelines import dtypes_in
from vqdm.errors import RunError
from vqdm.finetuning.config import OptimizerConfig
from vqdm.layers.quantized import SharedCodebookModule

CODEBOOKS = ("codebooks", "codebook_values")
KINDS = ("codebook", "scale", "weight", "bias")


@dataclass(frozen=True)
class TrainedParameters:
    """Parameters in training, by dotted name in module order.

    Attributes:
        kinds: name → one of `KINDS`.
        rms: name → root mean square when training began.
    """

    tensors: dict[str, nn.Parameter]
    kinds: dict[str, str]
    rms: dict[str, float]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.tensors.values())


def trainable(
    model: nn.Module, config: OptimizerConfig, selected: Callable[[str], bool] = lambda name: True
) -> TrainedParameters:
    """Make floating-point parameters float32, and the selected ones with a learning rate above 0 trainable; in place.

    Args:
        selected: called with a parameter's dotted name.
    """
    kinds, factors = kinds_of(model), kind_factors(config)
    names = [name for name, kind in kinds.items() if factors[kind] > 0 and selected(name)]
    held = dict(model.named_parameters())
    for name in kinds:
        held[name].data = held[name].data.float()
        held[name].requires_grad_(name in names)
    tensors = {name: held[name] for name in names}
    rms = {name: tensor.detach().square().mean().sqrt().item() for name, tensor in tensors.items()}
    return TrainedParameters(tensors, {name: kinds[name] for name in names}, rms)


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Return name → kind of every floating-point parameter, in module order."""
    found = {}
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(prefix=path, recurse=False):
            if tensor.is_floating_point():
                found[name] = _kind(module, name.rpartition(".")[2], tensor)
    return found


def _kind(module: nn.Module, name: str, tensor: nn.Parameter) -> str:
    if isinstance(module, SharedCodebookModule) or name in CODEBOOKS:
        return "codebook"
    if name != "bias" and hasattr(module, "stored_tensors"):
        return "scale"
    return "weight" if tensor.dim() > 1 else "bias"


def kind_factors(config: OptimizerConfig) -> dict[str, float]:
    """Return kind → factor of the learning rate."""
    return dict(zip(KINDS, (config.codebook_lr, config.scale_lr, config.weight_lr, config.bias_lr), strict=True))


def parameter_groups(trained: TrainedParameters, config: OptimizerConfig) -> list[dict]:
    """Return Adam's parameter groups: one per learning rate, which depends on kind and size.

    A group's `lr_factor` is its factor of the training's learning rate. The learning rate of biases and norms is
    absolute. That of all other parameters is relative to their root mean square, rounded to a power of two: a learning
    rate that suits codebooks of size 1 would scatter scales of size 0.01.
    """
    factors = kind_factors(config)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, tensor in trained.tensors.items():
        kind, rms = trained.kinds[name], trained.rms[name]
        factor = factors[kind] * (1.0 if kind == "bias" or rms == 0 else 2.0 ** round(math.log2(rms)))
        groups.setdefault(factor, []).append(tensor)
    groups = groups or {0.0: []}  # where codes alone are trained
    return [{"params": tensors, "lr": factor, "lr_factor": factor} for factor, tensors in groups.items()]


def types_on_disk(folder: Path) -> dict[str, torch.dtype]:
    """Return name → type of every floating-point tensor in a model folder's safetensors files."""
    return {name: dtype for path in sorted(folder.glob("*.safetensors")) for name, dtype in dtypes_in(path).items()}


def stored_types(model: nn.Module) -> dict[str, torch.dtype]:
    """Return name → type of every floating-point parameter."""
    held = dict(model.named_parameters())
    return {name: held[name].dtype for name in kinds_of(model)}


@contextmanager
def rounded_to(types: dict[str, torch.dtype], trained: TrainedParameters) -> Iterator[None]:
    """Inside, parameters have the values that will be read back from disk: rounded to their stored types."""
    exact = {name: tensor.data for name, tensor in trained.tensors.items()}
    for name, tensor in trained.tensors.items():
        tensor.data = tensor.data.to(types[name]).to(tensor.dtype)
    try:
        yield
    finally:
        for name, tensor in trained.tensors.items():
            tensor.data = exact[name]


def write_back(model: nn.Module, types: dict[str, torch.dtype], compute_dtype: torch.dtype | None = None) -> None:
    """Freeze parameters and round each to its type in `types`, in place; held in `compute_dtype` afterwards, if given.

    Raises:
        RunError: a value exceeds its type's range; names the parameter.
    """
    held = dict(model.named_parameters())
    for name, dtype in types.items():
        held[name].requires_grad_(False)
        held[name].grad = None
        held[name].data = held[name].data.to(dtype)
        if not held[name].isfinite().all():
            raise RunError(f"{name} exceeds the range of {dtype}; use a lower --finetune_lr")
        if compute_dtype:
            held[name].data = held[name].data.to(compute_dtype)
