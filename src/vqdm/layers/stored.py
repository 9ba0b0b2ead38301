"""What a quantized layer's weight is decoded from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from vqdm.additive import trellis
from vqdm.additive.code import AdditiveCode, CodeSpec, stored_codebooks, unpack_codes


class Stored(NamedTuple):
    """A layer's tensors as they lie in memory, on one device; letters as in `vqdm.additive.code`.

    Attributes:
        spec: the format.
        shape: (O, I) of the matrix.
        codes: uint8, packed codes [R, G, M].
        codebooks: float [M, K, p, g], or [G, M, K, p, g] when groupwise; a layer's own or a bank's.
        scales: float [R], [R, 1] or [R, G]; None where `scale_codes` and `scale_values`, or `scale_logarithms` give
            them.
        scale_codes: uint8, packed indices [R, G] of `spec.scale_nbits` bits, or None.
        scale_values: float [R, 2^scale_nbits], or None.
        input_scales: float [I]; None where `input_scale_logarithms` give them, or where there are none.
        code_widths: uint8 [G], bits of the codes of every column group where the rate is variable, quarter bits of a
            trellis; or None.
        scale_logarithms: uint8 [R], see `vqdm.additive.trellis.scale_values`, or None.
        input_scale_logarithms: uint8 [I], to which `spec.scale_exponent` is added, or None.
    """

    spec: CodeSpec
    shape: tuple[int, int]
    codes: Tensor
    codebooks: Tensor
    scales: Tensor | None = None
    scale_codes: Tensor | None = None
    scale_values: Tensor | None = None
    input_scales: Tensor | None = None
    code_widths: Tensor | None = None
    scale_logarithms: Tensor | None = None
    input_scale_logarithms: Tensor | None = None

    @classmethod
    def of(
        cls, spec: CodeSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor], codebooks: Tensor | None = None
    ) -> Stored:
        """From tensors of the names and shapes of `CodeSpec.tensor_shapes`; `codebooks` from elsewhere if given."""
        if codebooks is None:
            codebooks = stored_codebooks(spec, shape[1] // spec.in_group_size, tensors)
        rest = [tensors.get(name) for name in cls._fields[4:]]
        return cls(spec, shape, tensors["codes"], codebooks, *rest)

    @property
    def groups(self) -> tuple[int, int]:
        """R, G."""
        return self.shape[0] // self.spec.out_group_size, self.shape[1] // self.spec.in_group_size

    def scale_matrix(self) -> Tensor:
        """Scales [R, 1] or [R, G]."""
        if self.scales is not None:
            return self.scales if self.scales.dim() == 2 else self.scales[:, None]
        if self.scale_logarithms is not None:
            return trellis.scale_values(self.scale_logarithms)[:, None]
        indices = unpack_codes(self.scale_codes, self.spec.scale_nbits, torch.Size(self.groups).numel())
        return torch.gather(self.scale_values, 1, indices.view(self.groups).long())

    def column_scales(self) -> Tensor | None:
        """Input scales [I], or None."""
        if self.input_scale_logarithms is not None:
            return trellis.scale_values(self.input_scale_logarithms, self.spec.scale_exponent)
        if self.spec.is_trellis:  # without a gradient where there are no bits, so that zero columns stay zero
            return torch.where(self.code_widths > 0, self.input_scales, self.input_scales.detach())
        return self.input_scales

    def learnable(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codebooks, scales [R, 1] or [R, G], and input scales [I]; None for what is not there, or integers."""
        return self.codebooks, None if self.scale_logarithms is not None else self.scale_matrix(), self.input_scales

    def working(self) -> AdditiveCode:
        """The code in working form."""
        codes = self.spec.unpacked(*self.groups, self.codes, self.code_widths)
        widths = None if self.code_widths is None else self.code_widths.to(torch.int64)
        return AdditiveCode(self.spec, codes, self.codebooks, self.scale_matrix(), self.column_scales(), widths)


@cache
def logarithm_values(exponent: int, device: torch.device) -> Tensor:
    """The scales that the 256 logarithms stand for, float32; made once a device and exponent."""
    with torch.inference_mode(False):
        return trellis.scale_values(torch.arange(256, device=device), exponent)
