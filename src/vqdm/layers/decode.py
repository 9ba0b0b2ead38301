"""From stored tensors to the weight: several ways that give the same numbers, and the choice among them.

    torch     the definition in plain operations, on every device
    gather    numpy gathers, on the CPU; not for a trellis
    native    a loop in C, on the CPU where there is a compiler
    triton    one Triton kernel, on CUDA
    compile   one kernel that `torch.compile` makes, anywhere; its first use takes seconds

By itself the fastest by measurement is taken, once a device, type, format and size. `VQDM_DECODE` and
`set_decode_path` name one for all.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from vqdm.additive.code import CodeSpec, packed_bytes
from vqdm.additive.trellis import UNITS
from vqdm.errors import UserError
from vqdm.layers.decode_compiled import pointwise
from vqdm.layers.decode_cpu import native
from vqdm.layers.gather import gather
from vqdm.layers.stored import Stored
from vqdm.layers.trellis_cpu import native_trellis

log = logging.getLogger("vqdm")

ENVIRONMENT = "VQDM_DECODE"
PATHS = ("auto", "torch", "gather", "native", "triton", "compile")
ON_CPU = ("gather", "native")
NOT_FOR_TRELLIS = ("gather",)
CANDIDATES = {  # on other devices torch alone
    "cpu": ("native", "gather", "torch"),
    "cuda": ("triton", "torch"),
}
MEASURED_WEIGHTS = 2**18  # of a layer, at most: measuring takes little time and memory
NUMBERS = {  # of a format, as an operator can take them
    "num_codebooks": int,
    "nbits_per_codebook": int,
    "in_group_size": int,
    "out_group_size": int,
    "scale_nbits": int,
    "row_bits": int,
    "groupwise_codebooks": bool,
    "input_channel_scales": bool,
    "segment_rows": int,
    "segment_bits": int,
    "log_scales": bool,
    "scale_exponent": int,
}
ROUNDS = 3  # of measuring, in each of which the ways take turns: another program may slow one of them down
COMPILATIONS = 64  # formats that torch.compile may meet

_wanted: str | None = None
_chosen: dict[tuple, str] = {}


def set_decode_path(path: str | None) -> None:
    """Decode by one of `PATHS` from now on; None leaves it to the environment again. Raises UserError on another."""
    global _wanted
    _wanted = None if path is None else _known(path, "set_decode_path")
    _environment.cache_clear()


def decode(stored: Stored, dtype: torch.dtype, out: Tensor | None = None, path: str | None = None) -> Tensor:
    """The matrix [O, I] in `dtype`, without a gradient; sums are taken in float32.

    Args: `out`, where to put it, contiguous; `path`, one of `PATHS`, overrules every other choice.

    Raises:
        UserError: no such path, or not for this device or format.
    """
    if torch.compiler.is_compiling():
        return traced(stored).to(dtype)
    if out is None:
        out = torch.empty(stored.shape, dtype=dtype, device=stored.codes.device)
    name = path or _wanted or _environment()
    name = _choice(stored, dtype) if _known(name, ENVIRONMENT) == "auto" else name
    if name in ON_CPU and out.device.type != "cpu":
        raise UserError(f"{ENVIRONMENT} is {name}, which is for the CPU; {out.device} takes torch, triton or compile")
    if name in NOT_FOR_TRELLIS and stored.spec.is_trellis:
        raise UserError(f"{ENVIRONMENT} is {name}, which does not decode a trellis; use auto, torch, native or compile")
    RUNS[name](stored, out)
    return out


def traced(stored: Stored) -> Tensor:
    """The matrix [O, I] while `torch.compile` looks on: fused on a GPU, on the CPU a call of what is fastest there.

    Differentiable in all but the codes.
    """
    differentiable = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in stored)
    if stored.codes.device.type != "cpu" or differentiable:
        return pointwise(stored)
    spec = stored.spec
    numbers = [int(getattr(spec, name)) for name in NUMBERS]
    return _decode_operator(numbers, spec.shared_codebooks, list(stored.shape), *stored[2:])


@torch.library.custom_op("vqdm::decode", mutates_args=())
def _decode_operator(
    numbers: list[int],
    bank: str,
    shape: list[int],
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor | None,
    scale_codes: Tensor | None,
    scale_values: Tensor | None,
    input_scales: Tensor | None,
    code_widths: Tensor | None,
    scale_logarithms: Tensor | None,
    input_scale_logarithms: Tensor | None,
) -> Tensor:
    """`decode` as an operator that compiled graphs can call: numpy and C cannot be traced."""
    settings = {name: kind(number) for (name, kind), number in zip(NUMBERS.items(), numbers, strict=True)}
    spec = CodeSpec(**settings, shared_codebooks=bank)
    scaling = scales, scale_codes, scale_values, input_scales
    stored = Stored(
        spec, tuple(shape), codes, codebooks, *scaling, code_widths, scale_logarithms, input_scale_logarithms
    )
    return decode(stored, torch.float32)


@_decode_operator.register_fake
def _(numbers: list[int], bank: str, shape: list[int], *_) -> Tensor:
    return torch.empty(shape)


# ------------------------------------------------------------------------------------------------ the ways


@torch.no_grad()
def _by_torch(stored: Stored, out: Tensor) -> None:
    out.copy_(stored.working().dequantize())


def _by_native(stored: Stored, out: Tensor) -> None:
    (native_trellis if stored.spec.is_trellis else native)(stored, out)


def _by_triton(stored: Stored, out: Tensor) -> None:
    if stored.spec.is_trellis:  # Triton is not everywhere
        from vqdm.layers.trellis_triton import decode as run
    else:
        from vqdm.layers.decode_triton import decode as run

    run(stored, out)


@torch.no_grad()
def _by_compile(stored: Stored, out: Tensor) -> None:
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
        _compiled()(stored, out)


@cache
def _compiled() -> Callable[[Stored, Tensor], None]:
    return torch.compile(lambda stored, out: out.copy_(pointwise(stored)), fullgraph=True, dynamic=True)


RUNS: dict[str, Callable[[Stored, Tensor], None]] = {
    "torch": _by_torch,
    "gather": gather,
    "native": _by_native,
    "triton": _by_triton,
    "compile": _by_compile,
}


# ------------------------------------------------------------------------------------------------ the choice


@cache
def _environment() -> str:
    """What the environment says on first use: asking it takes a microsecond, and every layer comes here."""
    return os.environ.get(ENVIRONMENT, "auto")


def _known(path: str, source: str) -> str:
    if path not in PATHS:
        raise UserError(f"{source} is {path!r}; allowed are {', '.join(PATHS)}")
    return path


def _choice(stored: Stored, dtype: torch.dtype) -> str:
    """The fastest way for layers of this class, measured on the first of them."""
    weights = min(stored.shape[0] * stored.shape[1], MEASURED_WEIGHTS).bit_length()
    kind = _kind(stored.spec), stored.code_widths is None, stored.codebooks.dtype
    key = (stored.codes.device, dtype, *kind, weights)
    if key not in _chosen:
        candidates = CANDIDATES.get(stored.codes.device.type, ("torch",))
        if stored.spec.is_trellis:
            candidates = tuple(name for name in candidates if name not in NOT_FOR_TRELLIS)
        if len(candidates) == 1:
            _warn_once(f"decoding on {stored.codes.device}: {candidates[0]}, for want of a faster way on this device")
        _chosen[key] = candidates[0] if len(candidates) == 1 else _fastest(_first_rows(stored), dtype, candidates)
    return _chosen[key]


@cache
def _kind(spec: CodeSpec) -> CodeSpec:
    """The format without the bits of one layer: the same object for equal ones, which are then found sooner."""
    one_layers = {"segment_rows": 1, "segment_bits": 0, "scale_exponent": 0} if spec.is_trellis else {"row_bits": 0}
    return _first_of(replace(spec, **one_layers))


@cache
def _first_of(spec: CodeSpec) -> CodeSpec:
    return spec


def _fastest(stored: Stored, dtype: torch.dtype, candidates: tuple[str, ...]) -> str:
    """Of the candidates that work and agree with torch, the fastest."""
    out = torch.empty(stored.shape, dtype=dtype, device=stored.codes.device)
    wanted = stored.working().dequantize().to(dtype)
    able = [name for name in candidates if _agrees(name, stored, out, wanted)]
    rounds = [{name: _seconds(name, stored, out) for name in able} for _ in range(ROUNDS)]
    seconds = {name: min(times[name] for times in rounds) for name in able}
    best = min(seconds, key=seconds.get)
    _say_once(out.device, best, ", ".join(f"{name} {1e3 * time:.2f} ms" for name, time in seconds.items()))
    return best


def _agrees(name: str, stored: Stored, out: Tensor, wanted: Tensor) -> bool:
    """Whether a way works and gives what is `wanted`; a warning says where not."""
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
    """A layer made of the first rows, of no more than `MEASURED_WEIGHTS` weights where one row group has no more."""
    if stored.spec.is_trellis:
        return _first_segments(stored)
    spec, I = stored.spec, stored.shape[1]  # noqa: E741
    R, G = min(stored.groups[0], max(1, MEASURED_WEIGHTS // (I * spec.out_group_size))), stored.groups[1]
    return stored._replace(
        shape=(R * spec.out_group_size, I),
        codes=stored.codes[: spec.code_bytes(R, G)],
        scales=None if stored.scales is None else stored.scales[:R],
        scale_codes=None if stored.scale_codes is None else stored.scale_codes[: packed_bytes(R * G, spec.scale_nbits)],
        scale_values=None if stored.scale_values is None else stored.scale_values[:R],
    )


def _first_segments(stored: Stored) -> Stored:
    """Likewise of a trellis: its first segments, or the first columns of the first one."""
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


_said: set[tuple] = set()


def _say_once(device: torch.device, name: str, times: str) -> None:
    if (device, name) not in _said:
        _said.add((device, name))
        log.info("decoding on %s: %s (%s)", device, name, times)
