"""From stored tensors to the weight: the definition in torch, faster backends with the same results, and the choice.

    torch     plain operations, on every device; the reference
    native    C, on the CPU where there is a compiler
    triton    one Triton kernel, on CUDA
    compile   one kernel that `torch.compile` makes, anywhere; its first use takes seconds

By default the fastest is chosen by measurement, once per device, dtype, format and size. `VQDM_DECODE` and
`set_decode_backend` name one for all layers.

Letters as in `vqdm.additive.code`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vqdm.additive import trellis
from vqdm.additive.code import (
    AdditiveCode,
    CodeSpec,
    first_entries,
    offsets,
    packed_bytes,
    stored_codebooks,
    unpack_codes,
    variable_field,
)
from vqdm.additive.trellis import UNITS
from vqdm.errors import UserError
from vqdm.layers.decode_cpu import decode_additive, decode_trellis

log = logging.getLogger("vqdm")

ENVIRONMENT = "VQDM_DECODE"
BACKENDS = ("auto", "torch", "native", "triton", "compile")
CANDIDATES = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}  # on other devices torch alone
GROUPS_PER_BLOCK = 2**15  # of the reference on a CPU: intermediate tensors then stay in the cache
MEASURED_WEIGHTS = 2**18  # of a layer, at most: measuring takes little time and memory
ROUNDS = 3  # of measuring, in which the backends take turns: another program may slow one of them down
COMPILATIONS = 64  # formats that torch.compile may compile for

_wanted: str | None = None
_chosen: dict[tuple, str] = {}


class Stored(NamedTuple):
    """The tensors that a layer's weight is decoded from, on one device.

    Attributes:
        spec: the format.
        shape: (O, I) of the matrix.
        codes: uint8, packed codes [R, G, M].
        codebooks: float [M, K, p, g], or [G, M, K, p, g] when groupwise; a layer's own or shared ones.
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
        """Collect tensors named and shaped as in `CodeSpec.tensor_shapes`; `codebooks` are shared ones, if given."""
        if codebooks is None:
            codebooks = stored_codebooks(spec, shape[1] // spec.in_group_size, tensors)
        rest = [tensors.get(name) for name in cls._fields[4:]]
        return cls(spec, shape, tensors["codes"], codebooks, *rest)

    @property
    def groups(self) -> tuple[int, int]:
        """Numbers of row groups and column groups (R, G)."""
        return self.shape[0] // self.spec.out_group_size, self.shape[1] // self.spec.in_group_size

    def scale_matrix(self) -> Tensor:
        """Look up the scales: [R, 1] or [R, G]."""
        if self.scales is not None:
            return self.scales if self.scales.dim() == 2 else self.scales[:, None]
        if self.scale_logarithms is not None:
            return trellis.scale_values(self.scale_logarithms)[:, None]
        indices = unpack_codes(self.scale_codes, self.spec.scale_nbits, torch.Size(self.groups).numel())
        return torch.gather(self.scale_values, 1, indices.view(self.groups).long())

    def column_scales(self) -> Tensor | None:
        """Look up the input scales: [I], or None."""
        if self.input_scale_logarithms is not None:
            return trellis.scale_values(self.input_scale_logarithms, self.spec.scale_exponent)
        if self.spec.is_trellis:  # without a gradient where there are no bits, so that zero columns stay zero
            return torch.where(self.code_widths > 0, self.input_scales, self.input_scales.detach())
        return self.input_scales

    def learnable(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return codebooks, scales [R, 1] or [R, G], and input scales [I]; None for what is absent, or integers."""
        return self.codebooks, None if self.scale_logarithms is not None else self.scale_matrix(), self.input_scales

    def working(self) -> AdditiveCode:
        """Unpack to the working form."""
        codes = self.spec.unpacked(*self.groups, self.codes, self.code_widths)
        widths = None if self.code_widths is None else self.code_widths.to(torch.int64)
        return AdditiveCode(self.spec, codes, self.codebooks, self.scale_matrix(), self.column_scales(), widths)

    def scale_tables(self) -> tuple[Tensor, Tensor]:
        """Return the float32 values of all 256 bytes of `scale_logarithms`, and of `input_scale_logarithms`."""
        return tuple(_logarithm_values(exponent, self.codes.device) for exponent in (0, self.spec.scale_exponent))

    def rows(self, first: int, stop: int) -> Stored:
        """Return the layer of row groups first..stop, without a copy. `first` is a multiple of 8; not for a trellis."""
        spec, (R, G), scale_codes = self.spec, self.groups, self.scale_codes
        stop = min(stop, R)
        place = spec.code_bytes(first, G)
        if scale_codes is not None:
            begin = packed_bytes(first * G, spec.scale_nbits)
            scale_codes = scale_codes[begin : begin + packed_bytes((stop - first) * G, spec.scale_nbits)]
        return self._replace(
            shape=((stop - first) * spec.out_group_size, self.shape[1]),
            codes=self.codes[place : place + spec.code_bytes(stop - first, G)],
            scales=None if self.scales is None else self.scales[first:stop],
            scale_codes=scale_codes,
            scale_values=None if self.scale_values is None else self.scale_values[first:stop],
        )


@cache
def _logarithm_values(exponent: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return trellis.scale_values(torch.arange(256, device=device), exponent)


def set_decode_backend(backend: str | None) -> None:
    """Use one of `BACKENDS` for all layers from now on; None returns the choice to the environment.

    Raises:
        UserError: no such backend.
    """
    global _wanted
    _wanted = None if backend is None else _known(backend, "set_decode_backend")
    _environment.cache_clear()


def decode(stored: Stored, dtype: torch.dtype, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Return the matrix [O, I] in `dtype`, without a gradient; sums are taken in float32.

    Args:
        out: where to write it, contiguous; a new tensor if None.
        backend: one of `BACKENDS`; overrules every other choice.

    Raises:
        UserError: no such backend, or not for this device.
    """
    if torch.compiler.is_compiling() or isinstance(stored.codes, FakeTensor):  # C would read through a null pointer
        return pointwise(stored).to(dtype)
    if out is None:
        out = torch.empty(stored.shape, dtype=dtype, device=stored.codes.device)
    name = backend or _wanted or _environment()
    name = _choice(stored, dtype) if _known(name, ENVIRONMENT) == "auto" else name
    if name == "native" and out.device.type != "cpu":
        raise UserError(f"{ENVIRONMENT} is {name}, which is for the CPU; {out.device} takes torch, triton or compile")
    RUNS[name](stored, out)
    return out


# ------------------------------------------------------------------------------------------------ the backends


@torch.no_grad()
def _by_torch(stored: Stored, out: Tensor) -> None:
    R, G = stored.groups
    if out.device.type != "cpu" or stored.spec.is_trellis:
        out.copy_(stored.working().dequantize())
        return
    rows, p = max(8, GROUPS_PER_BLOCK // G // 8 * 8), stored.spec.out_group_size
    for first in range(0, R, rows):
        out[first * p : (first + rows) * p] = stored.rows(first, first + rows).working().dequantize()


def _by_native(stored: Stored, out: Tensor) -> None:
    (decode_trellis if stored.spec.is_trellis else decode_additive)(stored, out)


def _by_triton(stored: Stored, out: Tensor) -> None:
    from vqdm.layers import decode_triton  # Triton is not everywhere

    (decode_triton.decode_trellis if stored.spec.is_trellis else decode_triton.decode_additive)(stored, out)


@torch.no_grad()
def _by_compile(stored: Stored, out: Tensor) -> None:
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
        _compiled()(stored, out)


@cache
def _compiled() -> Callable[[Stored, Tensor], None]:
    return torch.compile(lambda stored, out: out.copy_(pointwise(stored)), fullgraph=True, dynamic=True)


RUNS: dict[str, Callable[[Stored, Tensor], None]] = {
    "torch": _by_torch,
    "native": _by_native,
    "triton": _by_triton,
    "compile": _by_compile,
}


# ------------------------------------------------------------------------------------------------ the choice


@cache
def _environment() -> str:
    """Return the environment's choice as of the first call: reading it takes a microsecond in every call of a layer."""
    return os.environ.get(ENVIRONMENT, "auto")


def _known(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise UserError(f"{source} is {backend!r}; allowed are {', '.join(BACKENDS)}")
    return backend


def _choice(stored: Stored, dtype: torch.dtype) -> str:
    """Return the fastest backend for layers of this class, measured on the first of them."""
    weights = min(stored.shape[0] * stored.shape[1], MEASURED_WEIGHTS).bit_length()
    kind = _kind(stored.spec), stored.code_widths is None, stored.codebooks.dtype
    key = (stored.codes.device, dtype, *kind, weights)
    if key not in _chosen:
        candidates = CANDIDATES.get(stored.codes.device.type, ("torch",))
        if len(candidates) == 1:
            _warn_once(f"decoding on {stored.codes.device}: by torch, since no faster backend supports this device")
        _chosen[key] = candidates[0] if len(candidates) == 1 else _fastest(_first_rows(stored), dtype, candidates)
    return _chosen[key]


@cache
def _kind(spec: CodeSpec) -> CodeSpec:
    """Return the format without one layer's bit counts; the same object for equal ones, which speeds up look-ups."""
    one_layers = {"segment_rows": 1, "segment_bits": 0, "scale_exponent": 0} if spec.is_trellis else {"row_bits": 0}
    return _first_of(replace(spec, **one_layers))


@cache
def _first_of(spec: CodeSpec) -> CodeSpec:
    return spec


def _fastest(stored: Stored, dtype: torch.dtype, candidates: tuple[str, ...]) -> str:
    """Return the fastest of the candidates that work and agree with torch."""
    out = torch.empty(stored.shape, dtype=dtype, device=stored.codes.device)
    wanted = stored.working().dequantize().to(dtype)
    able = [name for name in candidates if _agrees(name, stored, out, wanted)]
    rounds = [{name: _seconds(name, stored, out) for name in able} for _ in range(ROUNDS)]
    seconds = {name: min(times[name] for times in rounds) for name in able}
    best = min(seconds, key=seconds.get)
    _log_once(out.device, best, ", ".join(f"{name} {1e3 * time:.2f} ms" for name, time in seconds.items()))
    return best


def _agrees(name: str, stored: Stored, out: Tensor, wanted: Tensor) -> bool:
    """Return whether a backend works and returns `wanted`; log a warning if not."""
    try:
        RUNS[name](stored, out)
        if not torch.allclose(out, wanted, rtol=0.02, atol=1e-3 * wanted.abs().max().item()):
            raise ArithmeticError("its results are wrong")
        return True
    except Exception as error:  # what a compiler or a driver may raise is not known
        reason = str(error).strip().partition("\n")[0]
        _warn_once(f"decoding on {out.device}: not by {name}, which fails: {reason}")
        return False


def _first_rows(stored: Stored) -> Stored:
    """Return the layer of the first rows: at most `MEASURED_WEIGHTS` weights, if one row group has no more."""
    if stored.spec.is_trellis:
        return _first_segments(stored)
    return stored.rows(0, max(1, MEASURED_WEIGHTS // (stored.shape[1] * stored.spec.out_group_size)))


def _first_segments(stored: Stored) -> Stored:
    """Return the layer of a trellis's first segments, or of the first columns of the first one."""
    spec, (O, I), T = stored.spec, stored.shape, stored.spec.segment_rows  # noqa: E741
    columns = min(I, max(1, MEASURED_WEIGHTS // T))
    rows = min(O, max(1, MEASURED_WEIGHTS // (T * columns)) * T) if columns == I else T
    widths = stored.code_widths[:columns]
    spec = spec.changed(segment_bits=int(widths.sum(dtype=torch.int64)) * T // UNITS)
    parts = {"scales": rows, "scale_logarithms": rows, "input_scales": columns, "input_scale_logarithms": columns}
    held = {name: tensor[:n] for name, n in parts.items() if (tensor := getattr(stored, name)) is not None}
    codes = stored.codes[: spec.code_bytes(rows, columns)]
    return stored._replace(spec=spec, shape=(rows, columns), codes=codes, code_widths=widths, **held)


def _seconds(name: str, stored: Stored, out: Tensor) -> float:
    _wait(out.device)
    start = time.perf_counter()
    RUNS[name](stored, out)
    _wait(out.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def _warn_once(line: str) -> None:
    log.warning("%s", line)


_logged: set[tuple] = set()


def _log_once(device: torch.device, name: str, times: str) -> None:
    if (device, name) not in _logged:
        _logged.add((device, name))
        log.info("decoding on %s: %s (%s)", device, name, times)


# -------------------------------------------------------------------------------------------------------- torch.compile
#
# Decode as one expression of an element's place, which `torch.compile` turns into a single kernel.


def pointwise(stored: Stored) -> Tensor:
    """Return the matrix [O, I] in float32 at least; differentiable in all but the codes. Slow unless compiled.

    Every element reads the bytes of its codes itself, so that nothing between is written to memory.
    """
    spec, (R, G) = stored.spec, stored.groups
    if spec.is_trellis:
        return stored.working().dequantize()  # of plain operations, with nothing that depends on values
    M, K, p, g = spec.num_codebooks, spec.entries, spec.out_group_size, spec.in_group_size
    r, a, j, c = _places(R, p, G, g, stored.codes.device)
    dtype = torch.promote_types(stored.codebooks.dtype, torch.float32)
    flat = stored.codebooks.reshape(-1)
    total = None
    for m in range(M):
        entry = _entry(stored, r, j, m)
        book = j * M + m if spec.groupwise_codebooks else m
        value = flat[((book * K + entry) * p + a) * g + c].to(dtype)  # [R, p, G, g]
        total = value if total is None else total + value
    total = total * _scale(stored, r, j).to(dtype)
    if (input_scales := stored.column_scales()) is not None:
        total = total * input_scales[j * g + c].to(dtype)
    return total.reshape(R * p, G * g)  # [R, p, G, g] → [O, I]


def _entry(stored: Stored, r: Tensor, j: Tensor, m: int) -> Tensor:
    """Return codes that broadcast to [R, p, G, g]."""
    spec, G = stored.spec, stored.groups[1]
    if not spec.row_bits:
        return _field(stored.codes, (r * G + j) * spec.num_codebooks + m, spec.nbits_per_codebook)
    widths = stored.code_widths.to(torch.int64)
    first = r * spec.row_bits + offsets(widths)[j]
    return variable_field(stored.codes, first, widths[j]) + first_entries(widths)[j]


def _places(R: int, p: int, G: int, g: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return indices of every axis that broadcast to [R, p, G, g]."""
    r, a, j, c = (torch.arange(size, device=device) for size in (R, p, G, g))
    return r[:, None, None, None], a[:, None, None], j[:, None], c


def _field(packed: Tensor, index: Tensor, bits: int) -> Tensor:
    """Return the packed integers number `index` of `bits` bits each, little end first."""
    first = index * bits
    byte, shift, last = first >> 3, first & 7, packed.numel() - 1
    word = packed[byte].to(torch.int64)
    if 8 % bits:
        word = word | packed[(byte + 1).clamp(max=last)].to(torch.int64) << 8
    if 8 < bits < 16:
        word = word | packed[(byte + 2).clamp(max=last)].to(torch.int64) << 16
    return (word >> shift) & (2**bits - 1)


def _scale(stored: Stored, r: Tensor, j: Tensor) -> Tensor:
    """Return scales that broadcast to [R, p, G, g]."""
    if stored.scale_codes is None:
        scales = stored.scale_matrix()
        return scales[r, j if scales.shape[1] > 1 else torch.zeros_like(j)]
    level = _field(stored.scale_codes, r * stored.groups[1] + j, stored.spec.scale_nbits)
    return stored.scale_values[r, level]
