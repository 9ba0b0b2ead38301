"""Int8 Linear and Conv2d layers, for layers that are not vector-quantized: an integer per weight, a scale per output.

    W[o, ...] ≈ scales[o] · values[o, ...]

Like the quantized layers they subclass `nn.Linear` and `nn.Conv2d`, have no weight parameter, and decode `weight` when
it is read.

Letters: O outputs of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqdm.layers.functional import decoded_weight

LARGEST = 127
# Scales that are tried for every row, times its largest value / 127. None clips much: the gain, about 0.3 dB,
# comes from where the grid happens to lie.
SCALE_STEPS = torch.linspace(0.9, 1.02, 25).tolist()


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 values, shaped like `weight` [O, ...], and float16 scales [O] nearest to it row by row.

    Every row takes the scale of `SCALE_STEPS` with the least squared error. Raises ValueError for values that are not
    finite, or too large for float16 scales.
    """
    rows = weight.detach().flatten(1).float()  # [O, ...] → [O, I]
    widest = rows.abs().amax(1) / LARGEST  # [O]
    least = torch.full_like(widest, torch.inf)
    values, scales = torch.zeros_like(rows, dtype=torch.int8), torch.zeros_like(widest, dtype=torch.float16)
    for step in SCALE_STEPS:
        tried = (step * widest).to(torch.float16)
        whole = _nearest(rows, tried)
        error = (rows - whole * tried.float()[:, None]).square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, tried, scales)
        values = torch.where(better[:, None], whole.to(torch.int8), values)
    if not least.isfinite().all():
        raise ValueError("the weight has values that are not finite, or too large for float16 scales")
    return values.view(weight.shape), scales


def _nearest(rows: Tensor, scales: Tensor) -> Tensor:
    """`rows` [O, I] in units of `scales` [O], as whole numbers that int8 holds; 0 where the scale is 0."""
    units = torch.where(scales == 0, 1.0, scales.float())[:, None]
    return (rows / units).round().clamp(-LARGEST, LARGEST)


class _Int8:
    """The part that int8 layers have in common: stored tensors as parameters, and the decoded weight."""

    arguments: tuple[str, ...]
    kept: tuple[str, ...]
    plain_class: type[nn.Module]

    def _allocate(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        for name in self.kept:
            setattr(self, name, getattr(layer, name))
        shape, device = layer.weight.shape, layer.weight.device
        self.values = nn.Parameter(torch.empty(shape, dtype=torch.int8, device=device), False)
        self.scales = nn.Parameter(torch.empty(shape[0], dtype=torch.float16, device=device), False)
        self.register_parameter("bias", layer.bias)

    def set_weight(self, weight: Tensor) -> None:
        """Round a weight of the layer's shape to the nearest values. Raises ValueError as `quantize_rows`."""
        values, scales = quantize_rows(weight)
        self.values, self.scales = nn.Parameter(values, False), nn.Parameter(scales, False)

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that replace the weight, by name; without `bias`."""
        return {"values": self.values, "scales": self.scales}

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        scales = self.scales.float().view(-1, *(1 for _ in self.values.shape[1:]))  # [O] → [O, 1, ...]
        return (self.values * scales).to(dtype)

    @property
    def weight(self) -> Tensor:
        """Decode the weight in the layer's own shape and the scales' dtype."""
        return decoded_weight(self._decoded(self.scales.dtype))

    def plain(self) -> nn.Linear | nn.Conv2d:
        """Make the plain layer of the decoded weight."""
        geometry = {name: getattr(self, name) for name in self.arguments}
        layer = self.plain_class(**geometry, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.weight.data, False), self.bias
        return layer


class Int8Linear(_Int8, nn.Linear):
    """`nn.Linear` with an int8 weight [O, I]."""

    arguments = kept = ("in_features", "out_features")
    plain_class = nn.Linear

    def __init__(self, layer: nn.Linear):
        self._allocate(layer)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._decoded(x.dtype), self.bias)


class Int8Conv2d(_Int8, nn.Conv2d):
    """`nn.Conv2d` with an int8 weight [O, C/groups, kh, kw]."""

    kept = (*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice")
    arguments = tuple(name for name in nn.Conv2d.__constants__ if name != "output_padding")
    plain_class = nn.Conv2d

    def __new__(cls, layer: nn.Conv2d | int | None = None, *args, **options):
        # peft makes the convolutions of an adapter by calling the class of the layer with numbers.
        return nn.Conv2d(layer, *args, **options) if isinstance(layer, int) else super().__new__(cls)

    def __init__(self, layer: nn.Conv2d):
        self._allocate(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self._decoded(x.dtype), self.bias)


Int8Layer = Int8Linear | Int8Conv2d


def swap_int8(model: nn.Module, name: str) -> Int8Layer:
    """Replace the plain layer `name` (dotted) by an empty int8 one, in place, and return it."""
    plain = model.get_submodule(name)
    kind = Int8Linear if isinstance(plain, nn.Linear) else Int8Conv2d
    layer = kind(plain).train(plain.training)
    model.set_submodule(name, layer)
    return layer


def quantize_int8(model: nn.Module, name: str) -> Int8Layer:
    """Replace the plain layer `name` (dotted) by an int8 one, in place, and return it.

    Raises:
        ValueError: as `quantize_rows`, naming the layer.
    """
    weight = model.get_submodule(name).weight
    layer = swap_int8(model, name)
    try:
        layer.set_weight(weight)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None
    return layer


def int8_layers(model: nn.Module) -> dict[str, Int8Layer]:
    """Return dotted name → int8 layer, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Int8)}


def dequantize_int8(model: nn.Module) -> None:
    """Replace every int8 layer by the plain one of its decoded weight, in place."""
    for name, layer in int8_layers(model).items():
        model.set_submodule(name, layer.plain().train(layer.training))
