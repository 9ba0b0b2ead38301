"""Classes with the names, attributes and arithmetic of the original's layers, and a UNet saved as it saves one."""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager
from pathlib import Path

import torch
from conftest import tiny_unet
from torch import Tensor, nn


class QuantizedWeight(nn.Module):
    """Random codes of a [rows, columns] matrix."""

    def __init__(
        self,
        rows: int,
        columns: int,
        code_dtype: torch.dtype = torch.int32,
        groupwise: bool = False,
        input_scales: bool = False,
        scale_nbits: int = 0,
        straight_through: bool = False,
        value_nbits: int = 16,
        value_groups: int = 1,
        nbits: int = 4,
    ):
        super().__init__()
        M, K, p, g = 2, 2**nbits, 1, 4
        R, G = rows // p, columns // g
        self.out_features, self.in_features = rows, columns
        self.num_codebooks, self.nbits_per_codebook, self.codebook_size = M, nbits, K
        self.out_group_size, self.in_group_size, self.scale_nbits = p, g, scale_nbits
        self.codebook_value_nbits, self.codebook_value_num_groups = value_nbits, value_groups
        self.straight_through_gradient = straight_through
        self.scales_are_lossless = scale_nbits == 0 or scale_nbits >= 16 or 2**scale_nbits >= G
        self.codebook_value_clusters = self.scales = self.scales_clusters = self.scales_indices = self.input_scales = (
            None
        )
        codes = torch.randint(0, K, (R, G, M))
        codes = torch.where(codes > torch.iinfo(code_dtype).max, codes - K, codes)
        self.codes = nn.Parameter(codes.to(code_dtype), requires_grad=False)
        self.codebooks = nn.Parameter(torch.randn(G if groupwise else 1, M, K, p, g) / columns**0.5)
        if value_nbits < 16:
            self.codebook_value_clusters = torch.randn(value_groups * p * g, 2**value_nbits) / columns**0.5
        if self.scales_are_lossless or straight_through:
            self.scales = nn.Parameter(torch.rand(R, G if scale_nbits else 1, 1, 1) + 0.5)
        if not self.scales_are_lossless:
            self.scales_clusters = nn.Parameter(torch.rand(R, 2**scale_nbits) + 0.5)
            self.scales_indices = nn.Parameter(torch.randint(0, 2**scale_nbits, (R, G)), requires_grad=False)
        if input_scales:
            self.input_scales = nn.Parameter(torch.rand(columns) + 0.5)

    def looked_up_codebooks(self) -> Tensor:
        """Entry by entry: its value group and its place in the vector choose the table."""
        if self.codebook_value_nbits >= 16:
            return self.codebooks
        out = self.codebooks.detach().clone()
        _, _, K, p, g = out.shape
        T, share = self.codebook_value_num_groups, K // self.codebook_value_num_groups
        for t in range(T):
            for a in range(p):
                for c in range(g):
                    table = self.codebook_value_clusters[(t * p + a) * g + c]
                    values = out[:, :, t * share : (t + 1) * share, a, c]
                    near = (values[..., None] - table).abs().argmin(-1)
                    out[:, :, t * share : (t + 1) * share, a, c] = table[near]
        return out

    def looked_up_scales(self) -> Tensor:
        """[R, 1 or G, 1]"""
        if self.scales_are_lossless:
            return self.scales[..., 0]
        if not self.straight_through_gradient:
            return self.scales_clusters.gather(1, self.scales_indices)[..., None]
        near = (self.scales[..., 0] - self.scales_clusters[:, None]).abs().argmin(-1)
        return self.scales_clusters.gather(1, near)[..., None]

    def forward(self) -> Tensor:
        codebooks, (R, G, M) = self.looked_up_codebooks(), self.codes.shape
        codes = self.codes.long() % self.codebook_size
        groups = torch.zeros(R, G, self.in_group_size)
        for j in range(G):
            for m in range(M):
                groups[:, j] += codebooks[j if len(codebooks) > 1 else 0, m, codes[:, j, m], 0]
        matrix = (groups * self.looked_up_scales()).reshape(R, -1)
        return matrix if self.input_scales is None else matrix * self.input_scales


class QuantizedLinear(nn.Module):
    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.quantized_weight, self.bias, self.use_checkpoint = weight, bias, False

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.quantized_weight(), self.bias)


class QuantizedConv2D(nn.Module):
    def __init__(self, weight: QuantizedWeight, conv: nn.Conv2d, group_channels: bool):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.group_channels = conv.stride, conv.padding, group_channels
        self.quantized_weight, self.bias = weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.quantized_weight()
        if self.group_channels:
            kernel = matrix.view(self.out_channels, *self.kernel_size, self.in_channels).permute(0, 3, 1, 2)
        else:
            kernel = matrix.view(self.out_channels, self.in_channels, *self.kernel_size)
        return nn.functional.conv2d(x, kernel, self.bias, self.stride, self.padding)


CLASSES = (QuantizedWeight, QuantizedLinear, QuantizedConv2D)


@contextmanager
def original_modules():
    """Inside, the classes live in `src.aq`, as in the original; outside that module does not exist."""
    package, module = types.ModuleType("src"), types.ModuleType("src.aq")
    here = __name__
    try:
        sys.modules |= {"src": package, "src.aq": module}
        for one in CLASSES:
            one.__module__ = "src.aq"
            setattr(module, one.__name__, one)
        yield
    finally:
        for one in CLASSES:
            one.__module__ = here
        del sys.modules["src"], sys.modules["src.aq"]


def original_layer(plain: nn.Linear | nn.Conv2d, group_channels: bool = True, **settings) -> nn.Module:
    weight = QuantizedWeight(len(plain.weight), plain.weight[0].numel(), **settings)
    if isinstance(plain, nn.Linear):
        return QuantizedLinear(weight, plain.bias)
    return QuantizedConv2D(weight, plain, group_channels)


def original_unet(settings: dict[str, dict], family: str = "sdxl") -> nn.Module:
    """A family's tiny UNet with these of its layers quantized, and the empty tensor that replication leaves behind."""
    unet = tiny_unet(family).requires_grad_(False)
    for name, own in settings.items():
        unet.set_submodule(name, original_layer(unet.get_submodule(name), **own))
    for module in unet.modules():
        module._dummy_parameter = nn.Parameter(torch.empty(0), requires_grad=False)
    return unet


def save_original(unet: nn.Module, path: Path) -> Path:
    with original_modules():
        torch.save(unet, path)
    return path
