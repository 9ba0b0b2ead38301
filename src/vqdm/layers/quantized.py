"""Linear and Conv2d layers that hold only packed codes and small tensors.

They subclass `nn.Linear` and `nn.Conv2d`, as peft and diffusers expect, but have no weight parameter: `weight` is
decoded when it is asked for and freed after the call.

Letters: O outputs, I = kh·kw·C inputs as in `vqdm.additive.code`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqdm.additive.code import AdditiveCode, CodeSpec, stored_bits


class _Coded:
    """What quantized layers share: stored tensors as parameters, and the decoded weight."""

    spec: CodeSpec

    def _allocate(self, spec: CodeSpec, rows: int, columns: int, bias: Tensor | None, device) -> None:
        self.spec, self._rows, self._columns = spec, rows, columns
        for name, (shape, dtype) in spec.tensor_shapes(rows, columns).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device), False))
        self.register_parameter("bias", bias)

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors that replace the weight, by name; `bias` is not among them."""
        return {name: tensor for name, tensor in self.named_parameters(recurse=False) if name != "bias"}

    def set_code(self, code: AdditiveCode) -> None:
        """Take over a code of this layer's format. Raises ValueError when a tensor's shape differs."""
        for name, tensor in code.pack().items():
            held = getattr(self, name)
            if held.shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the layer holds {tuple(held.shape)}")
            setattr(self, name, nn.Parameter(tensor.to(held.device), False))

    def code(self) -> AdditiveCode:
        """The layer's code in working form."""
        return AdditiveCode.unpack(self.spec, (self._rows, self._columns), self.stored_tensors())

    @property
    def stored_bits(self) -> int:
        """Bits of the tensors that replace the weight."""
        return stored_bits(self.stored_tensors())

    def decoded_matrix(self) -> Tensor:
        """The weight as a float32 matrix [O, I]."""
        return self.code().dequantize()

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the small tensors, and of `weight`."""
        return next(tensor.dtype for tensor in self.stored_tensors().values() if tensor.is_floating_point())


class QuantizedLinear(_Coded, nn.Linear):
    """`nn.Linear` whose weight [O, I] is an additive code."""

    def __init__(self, in_features: int, out_features: int, spec: CodeSpec, bias: Tensor | None = None, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._allocate(spec, out_features, in_features, bias, device)

    @classmethod
    def like(cls, layer: nn.Linear, spec: CodeSpec) -> QuantizedLinear:
        """An empty quantized layer of the same shape and device, sharing the bias."""
        return cls(layer.in_features, layer.out_features, spec, layer.bias, layer.weight.device)

    @property
    def weight(self) -> Tensor:
        """Decoded weight [O, I]."""
        return self.decoded_matrix().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.decoded_matrix().to(x.dtype), self.bias)


class QuantizedConv2d(_Coded, nn.Conv2d):
    """`nn.Conv2d` with groups=1 whose weight [O, C, kh, kw] is an additive code of the matrix [O, I]."""

    def __init__(self, geometry: nn.Conv2d, spec: CodeSpec, bias: Tensor | None = None, device=None):
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(geometry, name))
        taps = self.kernel_size[0] * self.kernel_size[1]
        self._allocate(spec, self.out_channels, self.in_channels * taps, bias, device)

    @classmethod
    def like(cls, layer: nn.Conv2d, spec: CodeSpec) -> QuantizedConv2d:
        """An empty quantized layer of the same shape and device, sharing the bias."""
        return cls(layer, spec, layer.bias, layer.weight.device)

    @property
    def weight(self) -> Tensor:
        """Decoded weight [O, C, kh, kw]."""
        return self._kernel().to(self.dtype)

    def _kernel(self) -> Tensor:
        matrix = self.decoded_matrix()
        if self.spec.group_channels:
            taps = matrix.view(self.out_channels, *self.kernel_size, self.in_channels)  # [O, I] → [O, kh, kw, C]
            return taps.permute(0, 3, 1, 2)
        return matrix.view(self.out_channels, self.in_channels, *self.kernel_size)  # [O, I] → [O, C, kh, kw]

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self._kernel().to(x.dtype), self.bias)


QuantizedLayer = QuantizedLinear | QuantizedConv2d


def swap(model: nn.Module, name: str, spec: CodeSpec) -> QuantizedLayer:
    """Replace the plain layer `name` (dotted) by an empty quantized one, in place, and return it."""
    plain = model.get_submodule(name)
    kind = QuantizedLinear if isinstance(plain, nn.Linear) else QuantizedConv2d
    quantized = kind.like(plain, spec).train(plain.training)
    model.set_submodule(name, quantized)
    return quantized


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Dotted name → quantized layer, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Coded)}


def cast_plain(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating tensors in place, except those that codes consist of: these stay in 16 bit.

    diffusers refuses `.to(dtype)` on a quantized model.
    """
    coded = {id(tensor) for layer in quantized_layers(model).values() for tensor in layer.stored_tensors().values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in coded:
            tensor.data = tensor.data.to(dtype)
