"""Additive codes: a weight matrix as sums of codebook entries times scales.

    W[r·p + a, j·g + c] ≈ scale[r (, j)] · Σ_m codebooks[(j,) m, codes[r, j, m], a, c] · input_scales[j·g + c]

This is AQLM's representation (arXiv 2401.06118, eq. 5) as VQDM applies it to diffusion models (arXiv 2409.00492, §3).

Letters: O rows, I columns of the matrix; p = `out_group_size`, g = `in_group_size`; R = O/p row groups,
G = I/g column groups; M codebooks of K = 2^b entries; b = `nbits_per_codebook`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from vqdm.additive import trellis
from vqdm.config import check_fields, flag

_additive = partial(flag, needs=("not target_bits",))  # which chooses the format
SHARED_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # shared codebooks name tensors and files


@dataclass(frozen=True)
class CodeSpec:
    """What defines the stored tensors of one layer. Raises ValueError, naming the field, on impossible settings.

    Letters: M `num_codebooks`, b `nbits_per_codebook`, g `in_group_size`, p `out_group_size`. Fields with a help text
    are flags of quantization; the others follow from the kind of code:

    Attributes:
        shared_codebooks: the name of codebooks that layers share and the model stores once, of up to 64
            letters, digits, _ and -; empty: the layer stores its own.
        row_bits: 0 gives every code b bits. Else the rate is variable, see "variable rate" below: one shared codebook
            of all widths up to b, and so many bits for the codes of a row group together. Only old models have it.
        segment_rows: 0: every code stands alone. Else a bitshift trellis, see `vqdm.additive.trellis`: codes are states
            of b bits, and so many rows of a column are one ring. One shared codebook of single values.
        segment_bits: bits of the codes of all columns in one segment of a trellis.
        log_scales: the scales of a trellis are stored as 8-bit logarithms, else as float16.
        scale_exponent: added to the stored logarithms of input scales, in octaves.
    """

    num_codebooks: int = _additive(3, "codes per group", ge=1, le=16, common=True)
    nbits_per_codebook: int = _additive(8, "bits per code", ge=1, le=16, common=True)
    in_group_size: int = _additive(8, "consecutive inputs that share a code", ge=1, le=64, common=True)
    out_group_size: int = _additive(1, "consecutive outputs that share a code", ge=1, le=64)
    scale_nbits: int = _additive(
        0,
        "0: a 16-bit scale per row; 1-8: a scale of so many bits per group, from a 16-bit table per row; 16: a 16-bit "
        "scale per group",
        choices=(*range(9), 16),
        metavar="N",
    )
    codebook_value_nbits: int = _additive(
        16,
        "1-8: codebook values are indices of so many bits into tables of 16-bit values; 16: they are stored in 16 bit",
        choices=(*range(1, 9), 16),
        metavar="N",
    )
    codebook_value_num_groups: int = flag(
        1,
        "tables per layer for quantized codebook values",
        ge=1,
        le=1024,
        needs=("not target_bits", "not codebook_value_nbits 16 or overrides"),
    )
    groupwise_codebooks: bool = _additive(False, "separate codebooks for every group of inputs")
    input_channel_scales: bool = _additive(False, "also a 16-bit scale per input")
    group_channels: bool = flag(True, "groups of a convolution run over channels at one kernel location")
    shared_codebooks: str = ""
    row_bits: int = 0
    segment_rows: int = 0
    segment_bits: int = 0
    log_scales: bool = False
    scale_exponent: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        _in_range(self, "row_bits", 0, 2**24)
        _in_range(self, "segment_rows", 0, 2**20)
        _in_range(self, "segment_bits", 0, 2**32)
        _in_range(self, "scale_exponent", -256, 256)
        if not isinstance(self.log_scales, bool):
            raise ValueError(f"log_scales is {self.log_scales!r}; allowed are true and false")
        if not isinstance(self.shared_codebooks, str) or not SHARED_NAME.fullmatch(self.shared_codebooks or "_"):
            raise ValueError(
                f"shared_codebooks is {self.shared_codebooks!r}; allowed are up to 64 letters, digits, _ and -"
            )
        if self.codebook_value_nbits < 16 and self.num_codebooks * self.entries % self.codebook_value_num_groups:
            raise ValueError(
                f"codebook_value_num_groups is {self.codebook_value_num_groups}; it must divide "
                f"num_codebooks * 2^nbits_per_codebook = {self.num_codebooks * self.entries}"
            )
        if self.shared_codebooks and not self.can_share:
            raise ValueError("shared_codebooks go neither with groupwise_codebooks nor with codebook_value_nbits")
        if self.row_bits and (self.num_codebooks != 1 or not self.shared_codebooks):
            raise ValueError("row_bits need num_codebooks 1 and shared_codebooks")
        self._check_trellis()

    def _check_trellis(self) -> None:
        if not self.is_trellis:
            if self.segment_bits or self.log_scales or self.scale_exponent:
                raise ValueError("segment_bits, log_scales and scale_exponent need segment_rows")
            return
        values = self.out_group_size == self.in_group_size == self.num_codebooks == 1
        if not (values and self.shared_codebooks and self.input_channel_scales) or self.scale_nbits or self.row_bits:
            raise ValueError(
                "segment_rows need num_codebooks, in_group_size and out_group_size 1, shared_codebooks, "
                "input_channel_scales, and neither scale_nbits nor row_bits"
            )
        if self.nbits_per_codebook < trellis.FEWEST_STATE_BITS:
            raise ValueError(
                f"nbits_per_codebook is {self.nbits_per_codebook}; a trellis takes {trellis.FEWEST_STATE_BITS} to 16"
            )

    @property
    def is_trellis(self) -> bool:
        """Whether codes are states of a bitshift trellis."""
        return self.segment_rows > 0

    @property
    def has_widths(self) -> bool:
        """Whether column groups differ in bits, which `code_widths` then says."""
        return self.row_bits > 0 or self.is_trellis

    @property
    def can_share(self) -> bool:
        """Whether the codebooks are of a kind that layers can share: one set a layer, its values as they are."""
        return not self.groupwise_codebooks and self.codebook_value_nbits == 16

    @property
    def codebooks_shape(self) -> tuple[int, int, int, int]:
        """[M, K, p, g], the shape of one set of codebooks."""
        return (self.num_codebooks, self.entries, self.out_group_size, self.in_group_size)

    @property
    def entries(self) -> int:
        """K, the entries of one codebook; of all widths together where the rate is variable."""
        return 2 ** (self.nbits_per_codebook + 1) - 1 if self.row_bits else 2**self.nbits_per_codebook

    def check_shape(self, rows: int, columns: int) -> None:
        """Raise ValueError unless a [rows, columns] matrix divides into groups."""
        if columns % self.in_group_size:
            raise ValueError(f"in_group_size {self.in_group_size} does not divide its {columns} inputs")
        if rows % self.out_group_size:
            raise ValueError(f"out_group_size {self.out_group_size} does not divide its {rows} outputs")
        if self.row_bits > (most := columns // self.in_group_size * self.nbits_per_codebook):
            raise ValueError(f"row_bits is {self.row_bits}; its {columns} inputs take {most} at most")
        if self.is_trellis:
            if rows % self.segment_rows:
                raise ValueError(f"segment_rows {self.segment_rows} does not divide its {rows} outputs")
            if self.segment_bits > (most := self.segment_rows * columns * self.nbits_per_codebook):
                raise ValueError(f"segment_bits is {self.segment_bits}; its {columns} inputs take {most} at most")

    def check_tensors(self, rows: int, columns: int, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless `tensors` are those of a [rows, columns] layer, in names, shapes and dtypes."""
        expected = self.tensor_shapes(rows, columns)
        if expected.keys() != tensors.keys():
            raise ValueError(f"its tensors are {', '.join(sorted(tensors))}; expected {', '.join(sorted(expected))}")
        for name, (shape, dtype) in expected.items():
            held = tensors[name]
            if held.shape != shape or held.dtype != dtype:
                raise ValueError(f"{name} is {held.dtype} {list(held.shape)}; expected {dtype} {list(shape)}")

    def to_dict(self) -> dict:
        return asdict(self)

    def changed(self, **values) -> CodeSpec:
        """A copy with some fields changed; raises ValueError on a field that does not exist."""
        unknown = set(values) - {field.name for field in fields(self)}
        if unknown:
            raise ValueError(f"no such setting: {', '.join(sorted(unknown))}")
        return replace(self, **values)

    def code_bits_per_weight(self, columns: int) -> float:
        """Bits of the codes over the weights of a matrix of so many columns."""
        group = self.out_group_size * self.in_group_size
        if self.row_bits:
            return self.row_bits / (columns * self.out_group_size)
        if self.is_trellis:
            return self.segment_bits / (columns * self.segment_rows)
        return self.num_codebooks * self.nbits_per_codebook / group

    def packed(self, codes: Tensor, widths: Tensor | None) -> Tensor:
        """The bytes of codes [R, G, M]; the inverse of `unpacked`. Raises ValueError where one is out of its range."""
        if self.row_bits:
            return pack_rows(codes[:, :, 0], widths)
        if self.is_trellis:
            return trellis.pack(codes[:, :, 0], widths, self.segment_rows, self.nbits_per_codebook)
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.entries:
            raise ValueError(f"codes reach from {codes.min()} to {codes.max()}; allowed are 0 to {self.entries - 1}")
        return pack_codes(codes, self.nbits_per_codebook)

    def code_bytes(self, rows: int, groups: int) -> int:
        """Bytes of the packed codes of R row groups of G column groups."""
        if self.row_bits:
            return row_bytes(rows, self.row_bits)
        if self.is_trellis:
            return -(-rows // self.segment_rows * self.segment_bits // 8)
        return packed_bytes(rows * groups * self.num_codebooks, self.nbits_per_codebook)

    def unpacked(self, rows: int, groups: int, packed: Tensor, widths: Tensor | None) -> Tensor:
        """Codes [R, G, M] from their bytes, and from the `widths` [G] of variable rate."""
        if self.row_bits:
            return unpack_rows(packed, widths, rows)[:, :, None]
        if self.is_trellis:
            return trellis.unpack(packed, widths, rows, self.segment_rows, self.nbits_per_codebook)[:, :, None]
        codes = unpack_codes(packed, self.nbits_per_codebook, rows * groups * self.num_codebooks)
        return codes.view(rows, groups, self.num_codebooks)

    def tensor_shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → (shape, dtype) of every stored tensor of a [rows, columns] layer; 16-bit floats are float16."""
        R, G = rows // self.out_group_size, columns // self.in_group_size
        sets = (G,) if self.groupwise_codebooks else ()
        values = (*sets, *self.codebooks_shape)
        shapes = {"codes": ((self.code_bytes(R, G),), torch.uint8)}
        if self.has_widths:
            shapes["code_widths"] = ((G,), torch.uint8)
        if self.codebook_value_nbits == 16 and not self.shared_codebooks:
            shapes["codebooks"] = (values, torch.float16)
        elif not self.shared_codebooks:
            count = torch.Size(values).numel()
            shapes["codebook_codes"] = ((packed_bytes(count, self.codebook_value_nbits),), torch.uint8)
            tables = (*sets, self.codebook_value_num_groups, 2**self.codebook_value_nbits)
            shapes["codebook_values"] = (tables, torch.float16)
        if self.log_scales:
            return shapes | {
                "scale_logarithms": ((R,), torch.uint8),
                "input_scale_logarithms": ((columns,), torch.uint8),
            }
        if self.scale_nbits == 0:
            shapes["scales"] = ((R,), torch.float16)
        elif self.scale_nbits == 16:
            shapes["scales"] = ((R, G), torch.float16)
        else:
            shapes["scale_codes"] = ((packed_bytes(R * G, self.scale_nbits),), torch.uint8)
            shapes["scale_values"] = ((R, 2**self.scale_nbits), torch.float16)
        if self.input_channel_scales:
            shapes["input_scales"] = ((columns,), torch.float16)
        return shapes


def _in_range(spec: CodeSpec, name: str, low: int, high: int) -> None:
    value = getattr(spec, name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed are whole numbers from {low} to {high}")


@dataclass
class AdditiveCode:
    """An additive code in working form: unpacked codes, float values. All tensors on one device.

    Attributes:
        spec: the format.
        codes: integers [R, G, M] in 0..K-1.
        codebooks: float [M, K, p, g], or [G, M, K, p, g] when groupwise.
        scales: float [R, 1], or [R, G] when `spec.scale_nbits` > 0.
        input_scales: float [I] or None.
        widths: int64 [G], bits of the codes of every column group where the rate is variable, else None.
    """

    spec: CodeSpec
    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    input_scales: Tensor | None = None
    widths: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The matrix [O, I], float32 (float64 if the codebooks are)."""
        return dequantize(self.codes, self.codebooks, self.scales, self.input_scales)

    def pack(self) -> dict[str, Tensor]:
        """Stored tensors by name, of the shapes and dtypes of `CodeSpec.tensor_shapes`."""
        return dict(_pack(self))

    @classmethod
    def unpack(
        cls, spec: CodeSpec, shape: tuple[int, int], tensors: dict[str, Tensor], shared: Tensor | None = None
    ) -> AdditiveCode:
        """The inverse of `pack` for a matrix of `shape` = (O, I); exact. `shared`: the spec's shared codebooks."""
        R, G = shape[0] // spec.out_group_size, shape[1] // spec.in_group_size
        widths = tensors.get("code_widths")
        return cls(
            spec,
            spec.unpacked(R, G, tensors["codes"], widths),
            shared if spec.shared_codebooks else stored_codebooks(spec, G, tensors),
            stored_scales(spec, R, G, tensors),
            stored_input_scales(spec, tensors),
            None if widths is None else widths.to(torch.int64),
        )

    def with_groups(self, order: Tensor) -> AdditiveCode:
        """The code of the matrix whose column groups are this one's in the order of `order` [G]."""
        g = self.spec.in_group_size
        return replace(
            self,
            codes=self.codes[:, order],
            codebooks=self.codebooks[order] if self.spec.groupwise_codebooks else self.codebooks,
            scales=self.scales[:, order] if self.scales.shape[1] > 1 else self.scales,
            input_scales=None if self.input_scales is None else self.input_scales[group_columns(order, g)],
            widths=None if self.widths is None else self.widths[order],
        )

    def stored(self) -> AdditiveCode:
        """This code as it will be read back: values rounded to what `pack` keeps."""
        R, G, _ = self.codes.shape
        if self.spec.has_widths:  # codes of columns without bits are read back as others
            shape = (R * self.spec.out_group_size, G * self.spec.in_group_size)
            return AdditiveCode.unpack(self.spec, shape, self.pack(), self.codebooks)
        values = dict(_packed_values(self))
        return replace(
            self,
            codes=self.codes.to(torch.int32),
            codebooks=self.codebooks if self.spec.shared_codebooks else stored_codebooks(self.spec, G, values),
            scales=stored_scales(self.spec, R, G, values),
            input_scales=stored_input_scales(self.spec, values),
        )


@dataclass(frozen=True)
class SharedCodebooks:
    """Codebooks that several layers share.

    Attributes:
        codebooks: [M, K, p, g], the values that float16 keeps.
        weights: the number of weights of all layers that use them.
    """

    codebooks: Tensor
    weights: int

    @property
    def bits_per_weight(self) -> float:
        """Return the bits of the codebooks per weight that uses them."""
        return 16 * self.codebooks.numel() / self.weights


def group_columns(order: Tensor, g: int) -> Tensor:
    """The columns [G·g] of column groups `order` [G]."""
    return (order[:, None] * g + torch.arange(g, device=order.device)).view(-1)


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor, input_scales: Tensor | None) -> Tensor:
    """The matrix [O, I] of unpacked codes [R, G, M]; see the module's formula. In float32 at least.

    Of L layers, with a leading axis on everything: the matrices [L, O, I].
    """
    *layers, R, G, _ = codes.shape
    p, g = codebooks.shape[-2:]
    dtype = torch.promote_types(codebooks.dtype, torch.float32)
    flat = codebooks.reshape(-1, p * g).to(dtype)  # [(L,) (G,) M·K, p·g]
    bags = entry_bags(codes, codebooks)
    # Of one entry a group, as in a trellis, a sum is the entry.
    groups = flat[bags[:, 0]] if bags.shape[1] == 1 else torch.nn.functional.embedding_bag(bags, flat, mode="sum")
    groups = groups.view(*layers, R, G, p, g) * scales.to(dtype)[..., None, None]
    matrix = groups.transpose(-3, -2).reshape(*layers, R * p, G * g)  # [R, p, G, g] → [O, I]
    return matrix if input_scales is None else matrix * input_scales.to(dtype)


def entry_bags(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Codes [(L,) R, G, M] as rows of all entries of `codebooks` [(L,) (G,) M, K, p, g] in turn: int64 [(L·)R·G, M]."""
    *layers, _, G, M = codes.shape
    K, groups = codebooks.shape[-3], G if codebooks.dim() == codes.dim() + 2 else 1
    first = torch.arange(codebooks.shape[:-3].numel(), device=codes.device) * K
    return (codes.long() + first.view(*layers, 1, groups, M)).view(-1, M)


def stored_codebooks(spec: CodeSpec, groups: int, tensors: dict[str, Tensor]) -> Tensor:
    """Codebooks [M, K, p, g] or [G, M, K, p, g] from stored tensors, looked up where values are quantized."""
    if spec.codebook_value_nbits == 16:
        return tensors["codebooks"]
    shape = (*((groups,) if spec.groupwise_codebooks else ()), *spec.codebooks_shape)
    indices = unpack_codes(tensors["codebook_codes"], spec.codebook_value_nbits, torch.Size(shape).numel())
    tables = tensors["codebook_values"]  # [(G,) T, 2^n]
    indices = indices.view(*tables.shape[:-1], -1).long()
    return torch.gather(tables, -1, indices).view(shape)


def stored_input_scales(spec: CodeSpec, tensors: dict[str, Tensor]) -> Tensor | None:
    """Input scales [I] from stored tensors, or None."""
    if spec.log_scales:
        return trellis.scale_values(tensors["input_scale_logarithms"], spec.scale_exponent)
    return tensors.get("input_scales")


def stored_scales(spec: CodeSpec, rows: int, groups: int, tensors: dict[str, Tensor]) -> Tensor:
    """Scales [R, 1] or [R, G] from stored tensors."""
    if spec.log_scales:
        return trellis.scale_values(tensors["scale_logarithms"])[:, None]
    if spec.scale_nbits == 0:
        return tensors["scales"][:, None]
    if spec.scale_nbits == 16:
        return tensors["scales"]
    indices = unpack_codes(tensors["scale_codes"], spec.scale_nbits, rows * groups).view(rows, groups)
    return torch.gather(tensors["scale_values"], 1, indices.long())


def _pack(code: AdditiveCode) -> Iterator[tuple[str, Tensor]]:
    yield "codes", code.spec.packed(code.codes, code.widths)
    if code.spec.has_widths:
        yield "code_widths", code.widths.to(torch.uint8)
    yield from _packed_values(code)


def _packed_values(code: AdditiveCode) -> Iterator[tuple[str, Tensor]]:
    """All stored tensors but codes and their widths."""
    spec = code.spec
    if spec.codebook_value_nbits == 16 and not spec.shared_codebooks:
        yield "codebooks", _half(code.codebooks)
    elif not spec.shared_codebooks:
        sets = code.codebooks.shape[:1] if spec.groupwise_codebooks else ()
        flat = code.codebooks.reshape(*sets, spec.codebook_value_num_groups, -1)  # [(G,) T, values]
        tables, indices = quantize_values(flat, spec.codebook_value_nbits)
        yield "codebook_codes", pack_codes(indices, spec.codebook_value_nbits)
        yield "codebook_values", tables
    if spec.log_scales:
        yield "scale_logarithms", trellis.scale_logarithms(code.scales[:, 0])
        yield "input_scale_logarithms", trellis.scale_logarithms(code.input_scales, spec.scale_exponent)
        return
    if spec.scale_nbits in (0, 16):
        yield "scales", _half(code.scales[:, 0] if spec.scale_nbits == 0 else code.scales)
    else:
        tables, indices = quantize_values(code.scales, spec.scale_nbits)
        yield "scale_codes", pack_codes(indices, spec.scale_nbits)
        yield "scale_values", tables
    if spec.input_channel_scales:
        yield "input_scales", _half(code.input_scales)


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).contiguous()


def quantize_values(values: Tensor, nbits: int, iterations: int = 25) -> tuple[Tensor, Tensor]:
    """One-dimensional k-means of the last axis, deterministic, and exact where there are no more than 2^nbits values.

    Returns float16 tables [..., 2^nbits], ascending, and int64 indices shaped like `values`.
    """
    ordered = values.float().sort(dim=-1).values
    tables = _starting_tables(ordered, 2**nbits)  # [..., 2^n]
    for _ in range(iterations):
        indices = _nearest(tables, values.float())
        sums = torch.zeros_like(tables).scatter_add_(-1, indices, values.float())
        sizes = torch.zeros_like(tables).scatter_add_(-1, indices, torch.ones_like(values, dtype=torch.float32))
        tables = torch.where(sizes > 0, sums / sizes.clamp(min=1), tables).sort(dim=-1).values
    tables = _half(tables)
    return tables, _nearest(tables.float(), values.float())


def _starting_tables(ordered: Tensor, levels: int) -> Tensor:
    """Ascending [..., levels]: the distinct values where they fit, quantiles elsewhere."""
    picks = torch.linspace(0, ordered.shape[-1] - 1, levels, device=ordered.device).round().long()
    rank = torch.nn.functional.pad(ordered.diff(dim=-1) != 0, (1, 0)).cumsum(-1)  # [..., N]
    distinct = ordered[..., -1:].expand(*ordered.shape[:-1], levels).contiguous()
    distinct.scatter_(-1, rank.clamp(max=levels - 1), ordered)
    return torch.where(rank[..., -1:] < levels, distinct, ordered[..., picks])


def _nearest(tables: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest entry of ascending `tables` [..., n] for each of `values` [..., N]."""
    middles = (tables[..., 1:] + tables[..., :-1]) / 2
    return torch.searchsorted(middles.contiguous(), values.contiguous())


# ------------------------------------------------------------------------------------------------ bit packing


def packed_bytes(count: int, nbits: int) -> int:
    """Bytes of `count` codes of `nbits` each; rounded up to whole bundles of eight codes."""
    return -(-count // 8) * nbits


def pack_codes(codes: Tensor, nbits: int) -> Tensor:
    """Pack integers in 0..2^nbits-1 of any shape, little end first, into uint8 [packed_bytes(count, nbits)].

    Eight codes fill exactly `nbits` bytes, so the pattern of shifts repeats every bundle.
    """
    flat = codes.reshape(-1).to(torch.int32)
    bundles = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    out = torch.zeros(len(bundles), nbits, dtype=torch.int32, device=codes.device)
    for k in range(8):
        byte, shift = divmod(k * nbits, 8)
        for spill in range(-(-(shift + nbits) // 8)):
            out[:, byte + spill] |= ((bundles[:, k] << shift) >> (8 * spill)) & 255
    return out.to(torch.uint8).view(-1)


def unpack_codes(packed: Tensor, nbits: int, count: int) -> Tensor:
    """The inverse of `pack_codes`: int32 [count]."""
    bundles = packed.view(-1, nbits)  # [count/8, nbits]
    if nbits == 8:
        return packed[:count].to(torch.int32)
    out = []
    for k in range(8):
        byte, shift = divmod(k * nbits, 8)
        word = bundles[:, byte].to(torch.int32)
        for spill in range(1, -(-(shift + nbits) // 8)):
            word = word | (bundles[:, byte + spill].to(torch.int32) << (8 * spill))
        out.append((word >> shift) & (2**nbits - 1))
    return torch.stack(out, dim=1).view(-1)[:count]


def stored_bits(tensors: dict[str, Tensor]) -> int:
    """Bits of stored tensors, as they lie in the file."""
    return sum(8 * tensor.element_size() * tensor.numel() for tensor in tensors.values())


# -------------------------------------------------------------------------------------------------------- variable rate
#
# The column groups of one layer have codes of different widths. Loaded, no longer made.
#
# A codebook for that holds one codebook of every width w = 0..b, one after another: that of width w begins at entry
# 2^w − 1 and has 2^w entries, the only one of width 0 being zero. Codes count from the beginning of the whole.
#
# Letters: w [G] widths, whose sum is the bits of a row group.


def first_entries(widths: Tensor) -> Tensor:
    """Where the codebooks of the widths [G] begin: int64 [G]."""
    return 2 ** widths.to(torch.int64) - 1


def width_slice(width: int) -> slice:
    """The entries of the codebook of one width."""
    return slice(2**width - 1, 2 ** (width + 1) - 1)


def offsets(widths: Tensor) -> Tensor:
    """First bit of every column group in a row group: int64 [G]."""
    widths = widths.to(torch.int64)
    return widths.cumsum(0) - widths


def row_bytes(rows: int, row_bits: int) -> int:
    """Bytes of so many row groups."""
    return -(-rows * row_bits // 8)


def pack_rows(codes: Tensor, widths: Tensor) -> Tensor:
    """Pack codes [R, G], column j in `widths[j]` bits, little end first, rows without a gap: uint8 [row_bytes].

    Raises ValueError when a code is not one of its group's width.
    """
    local, widths = codes.to(torch.int64) - first_entries(widths), widths.to(torch.int64)
    if ((local < 0) | (local >> widths > 0)).any():
        raise ValueError("a code is out of the range of its group's width")
    group = torch.arange(len(widths), device=widths.device).repeat_interleave(widths)  # of every bit of a row
    place = torch.arange(len(group), device=widths.device) - offsets(widths)[group]
    bits = ((local[:, group] >> place) & 1).to(torch.uint8).view(-1)  # [R, row_bits] → [R·row_bits]
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_rows(packed: Tensor, widths: Tensor, rows: int) -> Tensor:
    """The inverse of `pack_rows`: int64 [R, G]."""
    widths = widths.to(torch.int64)
    row_bits = widths.sum()
    first = torch.arange(rows, device=packed.device)[:, None] * row_bits + offsets(widths)  # [R, G]
    return variable_field(packed, first, widths) + first_entries(widths)


def variable_field(packed: Tensor, first: Tensor, widths: Tensor) -> Tensor:
    """Integers of `widths` [G] bits, 16 at most, that begin at the bits `first` [..., G]: int64."""
    byte, last = first >> 3, packed.numel() - 1
    word = torch.zeros_like(first)
    for place in range(3):
        word = word | packed[(byte + place).clamp(max=last)].to(torch.int64) << (8 * place)
    return (word >> (first & 7)) & ((1 << widths) - 1)
