"""Linear and Conv2d layers in 8 bit, for what vector quantization leaves alone: an integer a weight, a scale an output.

    W[o, ...] ≈ scales[o] · values[o, ...]

Like the quantized layers they subclass `nn.Linear` and `nn.Conv2d`, have no weight parameter, and decode `weight` when
it is asked for.

Letters: O outputs of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqdm.layers.decoded import decoded_weight

LARGEST = 127
# Scales that are tried for every row, times its largest value / 127. None clips much: 8 bits reach far enough, and the
# gain, about 0.3 dB, is from where the grid happens to fall.
SCALE_STEPS = torch.linspace(0.9, 1.02, 25).tolist()


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 values, shaped like `weight` [O, ...], and the float16 scales [O] that are nearest to it row by row.

    Of `SCALE_STEPS` every row takes the scale that leaves the least squared error. Raises ValueError on values that
    are not finite or beyond what float16 scales reach.
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


class _Rounded:
    """What rounded layers share: stored tensors as parameters, and the decoded weight."""

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
        """Take over the nearest that the layer can hold to a weight of its shape. Raises ValueError as `round_rows`."""
        values, scales = round_rows(weight)
        self.values, self.scales = nn.Parameter(values, False), nn.Parameter(scales, False)

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors that replace the weight, by name; `bias` is not among them."""
        return {"values": self.values, "scales": self.scales}

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        scales = self.scales.float().view(-1, *(1 for _ in self.values.shape[1:]))  # [O] → [O, 1, ...]
        return (self.values * scales).to(dtype)

    @property
    def weight(self) -> Tensor:
        """Decoded weight in the layer's own shape, of the scales' type."""
        return decoded_weight(self._decoded(self.scales.dtype))

    def plain(self) -> nn.Linear | nn.Conv2d:
        """The ordinary layer of the decoded weight."""
        geometry = {name: getattr(self, name) for name in self.arguments}
        layer = self.plain_class(**geometry, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.weight.data, False), self.bias
        return layer


class RoundedLinear(_Rounded, nn.Linear):
    """`nn.Linear` whose weight [O, I] is in 8 bit."""

    arguments = kept = ("in_features", "out_features")
    plain_class = nn.Linear

    def __init__(self, layer: nn.Linear):
        self._allocate(layer)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._decoded(x.dtype), self.bias)


class RoundedConv2d(_Rounded, nn.Conv2d):
    """`nn.Conv2d` whose weight [O, C/groups, kh, kw] is in 8 bit."""

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


RoundedLayer = RoundedLinear | RoundedConv2d


def swap_rounded(model: nn.Module, name: str) -> RoundedLayer:
    """Replace the plain layer `name` (dotted) by an empty rounded one, in place, and return it."""
    plain = model.get_submodule(name)
    kind = RoundedLinear if isinstance(plain, nn.Linear) else RoundedConv2d
    rounded = kind(plain).train(plain.training)
    model.set_submodule(name, rounded)
    return rounded


def round_layer(model: nn.Module, name: str) -> RoundedLayer:
    """Replace the plain layer `name` (dotted) by one in 8 bit, in place, and return it.

    Raises:
        ValueError: as `round_rows`, naming the layer.
    """
    weight = model.get_submodule(name).weight
    layer = swap_rounded(model, name)
    try:
        layer.set_weight(weight)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None
    return layer


def rounded_layers(model: nn.Module) -> dict[str, RoundedLayer]:
    """Dotted name → rounded layer, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Rounded)}


def unround_layers(model: nn.Module) -> None:
    """Replace every rounded layer by the plain one of its decoded weight, in place."""
    for name, layer in rounded_layers(model).items():
        model.set_submodule(name, layer.plain().train(layer.training))
