"""Linear and Conv2d layers that hold only packed codes and small tensors.

They subclass `nn.Linear` and `nn.Conv2d`, as peft and diffusers expect, but have no weight parameter: `weight` is
decoded when it is asked for and freed after the call, except inside `decoded_once`.

Letters: O outputs, I = kh·kw·C inputs as in `vqdm.additive.code`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqdm.additive.code import AdditiveCode, CodeSpec, stored_bits
from vqdm.layers.decoded import decoded_weight


class _Coded:
    """What quantized layers share: stored tensors as parameters, and the decoded weight."""

    spec: CodeSpec
    keep_decoded = False
    _decoded: Tensor | None = None

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
        self._decoded = None

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

    def _decoded_as(self, x: Tensor) -> Tensor:
        """The weight in the layer's own shape, in the type and on the device of an input."""
        if not self.keep_decoded or torch.is_grad_enabled():
            return self._shaped(self.decoded_matrix()).to(x.dtype)
        if self._decoded is None or self._decoded.dtype != x.dtype or self._decoded.device != x.device:
            self._decoded = self._shaped(self.decoded_matrix()).to(x.dtype)
        return self._decoded

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
        return decoded_weight(self.decoded_matrix().to(self.dtype))

    def _shaped(self, matrix: Tensor) -> Tensor:
        return matrix

    def plain(self) -> nn.Linear:
        """The ordinary layer of the decoded weight."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.weight.data, False), self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._decoded_as(x), self.bias)


class QuantizedConv2d(_Coded, nn.Conv2d):
    """`nn.Conv2d` with groups=1 whose weight [O, C, kh, kw] is an additive code of the matrix [O, I]."""

    def __new__(cls, geometry: nn.Conv2d | int | None = None, *args, **options):
        # peft makes the convolutions of an adapter by calling the class of the layer with numbers.
        return nn.Conv2d(geometry, *args, **options) if isinstance(geometry, int) else super().__new__(cls)

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
        return decoded_weight(self._shaped(self.decoded_matrix()).to(self.dtype))

    def _shaped(self, matrix: Tensor) -> Tensor:
        if self.spec.group_channels:
            taps = matrix.view(self.out_channels, *self.kernel_size, self.in_channels)  # [O, I] → [O, kh, kw, C]
            return taps.permute(0, 3, 1, 2)
        return matrix.view(self.out_channels, self.in_channels, *self.kernel_size)  # [O, I] → [O, C, kh, kw]

    def plain(self) -> nn.Conv2d:
        """The ordinary layer of the decoded weight."""
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        geometry = {name: getattr(self, name) for name in names}
        layer = nn.Conv2d(**geometry, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.weight.data.contiguous(), False), self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self._decoded_as(x), self.bias)


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


@contextmanager
def decoded_once(model: nn.Module) -> Iterator[None]:
    """Inside, layers keep the weight that they decode first without gradients: faster, as large as the original.

    On leaving, decoded weights are dropped.
    """
    layers = quantized_layers(model).values()
    try:
        for layer in layers:
            layer.keep_decoded = True
        yield
    finally:
        for layer in layers:
            layer.keep_decoded, layer._decoded = False, None


def dequantize_layers(model: nn.Module) -> None:
    """Replace every quantized layer by the plain one of its decoded weight, in place."""
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, layer.plain().train(layer.training))


def cast_plain(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating tensors in place, except those that codes consist of: these stay in 16 bit.

    diffusers refuses `.to(dtype)` on a quantized model.
    """
    stored = [module.stored_tensors() for module in model.modules() if hasattr(module, "stored_tensors")]
    coded = {id(tensor) for tensors in stored for tensor in tensors.values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in coded:
            tensor.data = tensor.data.to(dtype)
