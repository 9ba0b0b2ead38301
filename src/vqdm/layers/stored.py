"""What a quantized layer's weight is decoded from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, CodeSpec, stored_codebooks, unpack_codes


class Stored(NamedTuple):
    """A layer's tensors as they lie in memory, on one device; letters as in `vqdm.additive.code`.

    Attributes:
        spec: the format.
        shape: (O, I) of the matrix.
        codes: uint8, packed codes [R, G, M].
        codebooks: float [M, K, p, g], or [G, M, K, p, g] when groupwise; a layer's own or a bank's.
        scales: float [R], [R, 1] or [R, G]; None where `scale_codes` and `scale_values` give them.
        scale_codes: uint8, packed indices [R, G] of `spec.scale_nbits` bits, or None.
        scale_values: float [R, 2^scale_nbits], or None.
        input_scales: float [I], or None.
        code_widths: uint8 [G], bits of the codes of every column group where the rate is variable, or None.
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

    @classmethod
    def of(
        cls, spec: CodeSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor], codebooks: Tensor | None = None
    ) -> Stored:
        """From tensors of the names and shapes of `CodeSpec.tensor_shapes`; `codebooks` from elsewhere if given."""
        if codebooks is None:
            codebooks = stored_codebooks(spec, shape[1] // spec.in_group_size, tensors)
        rest = [tensors.get(name) for name in ("scales", "scale_codes", "scale_values", "input_scales", "code_widths")]
        return cls(spec, shape, tensors["codes"], codebooks, *rest)

    @property
    def groups(self) -> tuple[int, int]:
        """R, G."""
        return self.shape[0] // self.spec.out_group_size, self.shape[1] // self.spec.in_group_size

    def scale_matrix(self) -> Tensor:
        """Scales [R, 1] or [R, G]."""
        if self.scales is not None:
            return self.scales if self.scales.dim() == 2 else self.scales[:, None]
        indices = unpack_codes(self.scale_codes, self.spec.scale_nbits, torch.Size(self.groups).numel())
        return torch.gather(self.scale_values, 1, indices.view(self.groups).long())

    def working(self) -> AdditiveCode:
        """The code in working form."""
        codes = self.spec.unpacked(*self.groups, self.codes, self.code_widths)
        widths = None if self.code_widths is None else self.code_widths.to(torch.int64)
        return AdditiveCode(self.spec, codes, self.codebooks, self.scale_matrix(), self.input_scales, widths)
