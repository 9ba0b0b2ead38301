"""What is trained: every floating-point tensor of the student. Codes, and 8-bit values, are integers and stay.

Codebooks (a layer's own, groupwise, as tables of values, or banks that layers share), scales (of rows, of groups, of
inputs, of 8-bit layers), biases and norms, and the weights of layers that are not quantized.

Parameters are kept in float32 while they are trained and written back in the type that they are stored in.
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
from vqdm.layers.shared_codebooks import SharedCodebookModule

CODEBOOKS = ("codebooks", "codebook_values")
KINDS = ("codebook", "scale", "weight", "bias")


@dataclass(frozen=True)
class Trained:
    """Parameters in training, by dotted name in module order.

    Attributes:
        kinds: name → one of `KINDS`.
        sizes: name → root mean square when training began.
    """

    tensors: dict[str, nn.Parameter]
    kinds: dict[str, str]
    sizes: dict[str, float]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.tensors.values())


def trainable(model: nn.Module, config: OptimizerConfig, wanted: Callable[[str], bool] = lambda name: True) -> Trained:
    """Make floating-point parameters float32, and those trainable that `wanted` holds for and whose rate is not 0."""
    kinds, factors = kinds_of(model), kind_factors(config)
    names = [name for name, kind in kinds.items() if factors[kind] > 0 and wanted(name)]
    held = dict(model.named_parameters())
    for name in kinds:
        held[name].data = held[name].data.float()
        held[name].requires_grad_(name in names)
    tensors = {name: held[name] for name in names}
    sizes = {name: tensor.detach().square().mean().sqrt().item() for name, tensor in tensors.items()}
    return Trained(tensors, {name: kinds[name] for name in names}, sizes)


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Name of every floating-point parameter → its kind, in module order."""
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
    """Kind → what its learning rate is of `finetune_lr`."""
    return dict(zip(KINDS, (config.codebook_lr, config.scale_lr, config.weight_lr, config.bias_lr), strict=True))


def parameter_groups(trained: Trained, config: OptimizerConfig) -> list[dict]:
    """Adam's groups: parameters whose learning rate is the same, kinds and powers of two of their size apart.

    `full_rate` is what a group's learning rate is of the one that training has. Biases and norms have an absolute one;
    all else moves relative to its size, or a learning rate that suits codebooks of size 1 would scatter scales of size
    0.01.
    """
    factors = kind_factors(config)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, tensor in trained.tensors.items():
        kind = trained.kinds[name]
        absolute = kind == "bias" or trained.sizes[name] == 0
        rate = factors[kind] * (1.0 if absolute else _power_of_two(trained.sizes[name]))
        groups.setdefault(rate, []).append(tensor)
    groups = groups or {0.0: []}  # where codes alone are trained
    return [{"params": tensors, "lr": rate, "full_rate": rate} for rate, tensors in groups.items()]


def _power_of_two(size: float) -> float:
    """The nearest in logarithm."""
    return 2.0 ** round(math.log2(size))


def types_on_disk(folder: Path) -> dict[str, torch.dtype]:
    """Name of every floating-point tensor in a model's safetensors files → its type there."""
    return {name: dtype for path in sorted(folder.glob("*.safetensors")) for name, dtype in dtypes_in(path).items()}


def stored_types(model: nn.Module) -> dict[str, torch.dtype]:
    """Name of every floating-point parameter → its type."""
    held = dict(model.named_parameters())
    return {name: held[name].dtype for name in kinds_of(model)}


@contextmanager
def as_stored(trained: Trained, types: dict[str, torch.dtype]) -> Iterator[None]:
    """Inside, parameters have the values that will be read back from disk: rounded to their stored types."""
    exact = {name: tensor.data for name, tensor in trained.tensors.items()}
    for name, tensor in trained.tensors.items():
        tensor.data = tensor.data.to(types[name]).to(tensor.dtype)
    try:
        yield
    finally:
        for name, tensor in trained.tensors.items():
            tensor.data = exact[name]


def write_back(model: nn.Module, types: dict[str, torch.dtype], computing: torch.dtype | None = None) -> None:
    """Freeze parameters, each in its type of `types`, in place; with `computing`, with its values but in that type.

    Raises:
        RunError: a value that its type cannot hold; names the parameter.
    """
    held = dict(model.named_parameters())
    for name, dtype in types.items():
        held[name].requires_grad_(False)
        held[name].grad = None
        held[name].data = held[name].data.to(dtype)
        if not held[name].isfinite().all():
            raise RunError(f"{name} has grown beyond what {dtype} holds; use a lower --finetune_lr")
        if computing:
            held[name].data = held[name].data.to(computing)
