"""Linear and Conv2d layers that hold only packed codes and small tensors.

They subclass `nn.Linear` and `nn.Conv2d`, as peft and diffusers expect, but have no weight parameter: reading `weight`
decodes it, and a call decodes into a buffer that all layers share, except inside `decoded_once` and `held_weights`.

Layers may share codebooks: a module of the model, `SharedCodebookModule`, then stores each set of them once.

Letters: O outputs, I = kh·kw·C inputs; M, K, p, g as in `vqdm.additive.code`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from vqdm.additive.code import AdditiveCode, CodeSpec, stored_bits, stored_codebooks
from vqdm.layers.decode import Stored, decode
from vqdm.layers.functional import Convolution, Linear, code_gradients, coded, decoded_weight

SHARED_CODEBOOKS = "codebook_banks"  # the model's attribute, and so the prefix of the tensors' names in files


class SharedCodebookModule(nn.Module):
    """Shared codebooks by name, each a float16 parameter [M, K, p, g].

    Layers get codebooks by calling the module, so offloading hooks bring them to the device first.
    """

    def reserve(self, spec: CodeSpec, device: torch.device) -> None:
        """Allocate the codebooks that `spec` names. Raises ValueError if they exist in another shape."""
        name = spec.shared_codebooks
        held = self._parameters.get(name)
        if held is None and hasattr(self, name):
            raise ValueError(f"shared_codebooks is {name}, which a module of torch needs for itself; choose another")
        if held is None:
            empty = torch.empty(spec.codebooks_shape, dtype=torch.float16, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        elif held.shape != spec.codebooks_shape:
            raise ValueError(f"shared_codebooks {name} are {tuple(held.shape)}; a layer needs {spec.codebooks_shape}")

    def fill(self, name: str, codebooks: Tensor) -> None:
        """Set the values of codebooks."""
        held = self._parameters[name]
        held.data = codebooks.to(held.device, held.dtype)

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return all codebooks by name."""
        return dict(self._parameters)

    def forward(self, name: str) -> Tensor:
        """Return the codebooks [M, K, p, g] of that name."""
        held = self._parameters[name]
        # diffusers' group offloading by leaf takes a module's memory away as soon as its call is over, which is before
        # the layer that called has decoded: it gets a copy, made on the stream that it computes on.
        return held.clone() if hasattr(self, "_diffusers_hook") else held


def shared_codebook_module(model: nn.Module) -> SharedCodebookModule:
    """Return the model's shared codebooks; adds an empty module if it has none."""
    if not hasattr(model, SHARED_CODEBOOKS):
        setattr(model, SHARED_CODEBOOKS, SharedCodebookModule())
    return getattr(model, SHARED_CODEBOOKS)


def drop_shared_codebooks(model: nn.Module) -> None:
    """Remove the shared codebooks from a model whose layers no longer need them."""
    if hasattr(model, SHARED_CODEBOOKS):
        delattr(model, SHARED_CODEBOOKS)


@dataclass(frozen=True)
class Layer:
    """A layer to quantize.

    Attributes:
        name: dotted, in the model.
        block: the block that it belongs to.
        kind: "linear" or "conv".
        rows, columns: shape of its matrix [O, I].
        spec: the format.
    """

    name: str
    block: str
    kind: str
    rows: int
    columns: int
    spec: CodeSpec


_by_number: WeakValueDictionary[int, _Quantized] = WeakValueDictionary()
_numbers = count()


@torch.library.custom_op("vqdm::decode_layer", mutates_args=())
def _decode_layer(number: Tensor, x: Tensor, shape: list[int]) -> Tensor:
    """Decode, inside a compiled graph, the weight [O, I] of the layer with that number, in the dtype of `x`.

    The graph sees a number where the layer's format and packed codes would be, so that layers of one shape and of
    different bits run the same graph: `torch.compile` would make another for each.
    """
    return decode(_by_number[int(number)]._stored(), x.dtype)


@_decode_layer.register_fake
def _(number: Tensor, x: Tensor, shape: list[int]) -> Tensor:
    return x.new_empty(shape)


def _in_graph() -> bool:
    """Whether a graph is compiled that this process runs; one that is exported has no layers to find."""
    exporting = getattr(torch.compiler, "is_exporting", bool)  # not in torch 2.6
    return torch.compiler.is_compiling() and not exporting()


class _Quantized:
    """The part that quantized layers have in common: stored tensors as parameters, and the decoded weight.

    Attributes:
        shared: the model's shared codebooks, if the layer uses any.
        keep_decoded: keep the first weight that is decoded without gradients, for `decoded_once`.
        wide: whether `weight` is in float32, as of layers that transformers keeps in it: T5 casts the input of such a
            layer to the type of its weight, and float16 would overflow.
        latent: None, or a tensor [O, I] that gets the gradient of the decoded weight, whatever its values.
        held: None, or the decoded weight [O, I] that calls use and that collects its own gradient (`held_weights`).
    """

    spec: CodeSpec
    shared: tuple[SharedCodebookModule, ...] = ()  # in a tuple, or the model's module would become the layer's child
    keep_decoded = False
    wide = False
    latent: Tensor | None = None
    held: Tensor | None = None
    _decoded: Tensor | None = None

    def _allocate(self, spec: CodeSpec, rows: int, columns: int, bias: Tensor | None, device) -> None:
        self.spec, self._rows, self._columns = spec, rows, columns
        for name, (shape, dtype) in spec.tensor_shapes(rows, columns).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device), False))
        self.register_parameter("bias", bias)
        self._take_number()

    def _take_number(self) -> None:
        """Enter the layer in the table by which a compiled graph finds it."""
        self._number = torch.tensor(next(_numbers), device="cpu")
        _by_number[int(self._number)] = self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._take_number()  # a copy is another layer

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that replace the weight, by name; without `bias`."""
        return {name: tensor for name, tensor in self.named_parameters(recurse=False) if name != "bias"}

    def set_code(self, code: AdditiveCode) -> None:
        """Set a code of this layer's format. Raises ValueError if a shape or the shared codebooks differ."""
        if self.spec.shared_codebooks and not torch.equal(self._codebooks().cpu(), code.codebooks.half().cpu()):
            raise ValueError(f"the code was made with codebooks other than the shared {self.spec.shared_codebooks}")
        for name, tensor in code.pack().items():
            held = getattr(self, name)
            if held.shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the layer holds {tuple(held.shape)}")
            setattr(self, name, nn.Parameter(tensor.to(held.device), False))
        self._decoded = None

    def set_codes(self, codes: Tensor) -> None:
        """Set codes [R, G, M] alone. Raises ValueError for another shape, or for codes beyond the codebooks."""
        R, G = self._stored().groups
        if codes.shape != (R, G, self.spec.num_codebooks):
            raise ValueError(f"codes have shape {tuple(codes.shape)}; allowed is {(R, G, self.spec.num_codebooks)}")
        widths = self.code_widths if self.spec.has_widths else None
        self.codes.data.copy_(self.spec.packed(codes, widths))
        self._decoded = None

    def code(self) -> AdditiveCode:
        """Return the layer's code in working form."""
        return self._stored().working()

    @property
    def stored_bits(self) -> int:
        """Return the number of bits of the tensors that replace the weight."""
        return stored_bits(self.stored_tensors())

    def decoded_matrix(self) -> Tensor:
        """Return the weight as a float32 matrix [O, I], differentiable in all but the codes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.code().dequantize()
        return decode(self._stored(), torch.float32)

    def _stored(self) -> Stored:
        """Collect the tensors that the weight is decoded from."""
        return Stored.of(self.spec, (self._rows, self._columns), self._parameters, self._codebooks())

    def _codebooks(self) -> Tensor:
        """Return codebooks [M, K, p, g], or [G, M, K, p, g] if groupwise; the layer's own or shared ones."""
        if self.spec.shared_codebooks:
            return self.shared[0](self.spec.shared_codebooks)
        return stored_codebooks(self.spec, self._columns // self.spec.in_group_size, self._parameters)

    def _apply_coded(self, operation: Linear | Convolution, x: Tensor) -> Tensor:
        """Apply `operation` with the decoded weight, in the dtype of autocast or of `x`."""
        if self.held is not None:
            return operation.forward(x, self.held, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.keep_decoded and not torch.is_grad_enabled():
            if self._decoded is None or self._decoded.dtype != x.dtype or self._decoded.device != x.device:
                self._decoded = self._decoded_like(x)
            return operation.forward(x, self._decoded, self.bias)
        if _in_graph() and not (torch.is_grad_enabled() and self._is_trained()):
            return operation.forward(x, self._decoded_like(x), self.bias)
        return coded(operation, x, self._stored(), self.bias, self.latent)

    def _decoded_like(self, x: Tensor) -> Tensor:
        """Return the weight [O, I] in the dtype of `x`, without a gradient."""
        if _in_graph():
            return _decode_layer(self._number, x.detach(), [self._rows, self._columns])
        return decode(self._stored(), x.dtype)

    def _is_trained(self) -> bool:
        """Whether the decoded weight has a gradient: tensors other than codes decide, which differ less in shape."""
        tensors = [self.latent, *(t for name, t in self._parameters.items() if name not in ("codes", "bias"))]
        return any(map(_wants, tensors)) or (bool(self.spec.shared_codebooks) and _wants(self._codebooks()))

    @property
    def dtype(self) -> torch.dtype:
        """Return the floating dtype of the small tensors, or of the shared codebooks if all are integers.

        float32 where the layer is `wide`.
        """
        if self.wide:
            return torch.float32
        floats = [tensor.dtype for tensor in self.stored_tensors().values() if tensor.is_floating_point()]
        return floats[0] if floats else self.shared[0].stored_tensors()[self.spec.shared_codebooks].dtype


class QuantizedLinear(_Quantized, nn.Linear):
    """`nn.Linear` whose weight [O, I] is an additive code."""

    def __init__(self, in_features: int, out_features: int, spec: CodeSpec, bias: Tensor | None = None, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._allocate(spec, out_features, in_features, bias, device)

    @classmethod
    def like(cls, layer: nn.Linear, spec: CodeSpec) -> QuantizedLinear:
        """Make an empty quantized layer of the same shape and device, sharing the bias."""
        return cls(layer.in_features, layer.out_features, spec, layer.bias, layer.weight.device)

    @property
    def weight(self) -> Tensor:
        """Decode the weight [O, I]."""
        return decoded_weight(self.decoded_matrix().to(self.dtype))

    def plain(self) -> nn.Linear:
        """Make the plain layer of the decoded weight."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.weight.data, False), self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_coded(Linear(), x)


class QuantizedConv2d(_Quantized, nn.Conv2d):
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
        """Make an empty quantized layer of the same shape and device, sharing the bias."""
        return cls(layer, spec, layer.bias, layer.weight.device)

    @property
    def weight(self) -> Tensor:
        """Decode the weight [O, C, kh, kw]."""
        return decoded_weight(self._operation((0, 0)).kernel(self.decoded_matrix()).to(self.dtype))

    def _operation(self, padding: tuple[int, int]) -> Convolution:
        return Convolution(self.kernel_size, self.stride, padding, self.dilation, self.spec.group_channels)

    def plain(self) -> nn.Conv2d:
        """Make the plain layer of the decoded weight."""
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
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return self._apply_coded(self._operation(self.padding), x)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = nn.functional.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        return self._apply_coded(self._operation((0, 0)), padded)


QuantizedLayer = QuantizedLinear | QuantizedConv2d


def swap(model: nn.Module, name: str, spec: CodeSpec) -> QuantizedLayer:
    """Replace the plain layer `name` (dotted) by an empty quantized one, in place, and return it.

    Raises ValueError if `spec` names shared codebooks that the model holds in another shape.
    """
    plain = model.get_submodule(name)
    kind = QuantizedLinear if isinstance(plain, nn.Linear) else QuantizedConv2d
    quantized = kind.like(plain, spec).train(plain.training)
    if spec.shared_codebooks:
        quantized.shared = (shared_codebook_module(model),)
        quantized.shared[0].reserve(spec, plain.weight.device)
    model.set_submodule(name, quantized)
    return quantized


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return dotted name → quantized layer, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Quantized)}


@contextmanager
def decoded_once(model: nn.Module) -> Iterator[None]:
    """Inside, layers keep the weight once it is decoded without gradients: faster, but as large as the original.

    On leaving, decoded weights are dropped.
    """
    layers = quantized_layers(model).values()
    try:
        for layer in layers:
            layer.keep_decoded = True
        yield
    finally:
        for layer in layers:
            layer.keep_decoded = False
        drop_decoded(model)


def drop_decoded(model: nn.Module) -> None:
    """Free the decoded weights that layers keep."""
    for layer in quantized_layers(model).values():
        layer._decoded = None


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Inside, layers use weights that were decoded on entry, and backward passes accumulate these weights' gradients.

    For gradient accumulation: decoding and the gradients of codes cost once per optimizer step instead of once per
    micro-batch, and the memory of all weights and their gradients in float32. On exit the gradients are passed on to
    `.grad` of the stored tensors, and of `latent` if a layer has one; after an exception they are not. The stored
    tensors must not change inside.
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
    """Add to `.grad` of a layer's tensors their gradients, given the gradient `E` [O, I] of its decoded weight."""
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
    """Detach from the graph, with scales [R, S] already looked up, unless they are logarithms."""
    floats = {"codebooks": stored.codebooks, "scales": scales, "input_scales": stored.input_scales}
    detached = {name: None if tensor is None else tensor.detach() for name, tensor in floats.items()}
    return stored._replace(scale_codes=None, scale_values=None, **detached)


def _learns(layer: QuantizedLayer) -> bool:
    stored = layer._stored()
    tensors = stored.codebooks, stored.scales, stored.scale_values, stored.input_scales, layer.latent
    return any(_wants(tensor) for tensor in tensors)


def _wants(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def float_scales(model: nn.Module) -> dict[str, torch.dtype]:
    """Store the scales of trellis layers as float16 in place of 8-bit logarithms, with the same values, in place.

    Logarithms cannot be trained. Returns the dotted names of the new tensors and their type.
    """
    found = {}
    for name, layer in quantized_layers(model).items():
        if not layer.spec.log_scales:
            continue
        code = layer.code()
        layer.spec = layer.spec.changed(log_scales=False, scale_exponent=0)
        for key, values in (("scales", code.scales[:, 0]), ("input_scales", code.input_scales)):
            delattr(layer, key.removesuffix("s") + "_logarithms")
            layer.register_parameter(key, nn.Parameter(values.to(torch.float16), False))
            found[f"{name}.{key}"] = torch.float16
    return found


def dequantize_layers(model: nn.Module) -> None:
    """Replace every quantized layer by the plain one of its decoded weight, in place."""
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, layer.plain().train(layer.training))
    drop_shared_codebooks(model)


@contextmanager
def narrowed(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, plain floating tensors that are wider than `dtype` are of that type, so that they are saved in it.

    Values that came from files of that type are the same in it. Codes stay, and so does a model that another library
    quantized.
    """
    coded, before = _coded_tensors(model), []
    if not getattr(model, "is_quantized", False) or coded:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.element_size() > dtype.itemsize and id(tensor) not in coded:
                before.append((tensor, tensor.data))
                tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _coded_tensors(model: nn.Module) -> set[int]:
    """Return the `id` of every tensor that codes consist of."""
    stored = [module.stored_tensors() for module in model.modules() if hasattr(module, "stored_tensors")]
    return {id(tensor) for tensors in stored for tensor in tensors.values()}


def cast_plain(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating tensors in place, except those that codes consist of: these stay in 16 bit.

    diffusers refuses `.to(dtype)` on a quantized model.
    """
    coded = _coded_tensors(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in coded:
            tensor.data = tensor.data.to(dtype)
