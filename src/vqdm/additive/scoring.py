"""Scoring codebook entries and selecting the best: by plain torch, by a page of C on the CPU, or by a Triton kernel.

This is the one place that decides which; `VQDM_SCORING`, or `set_scoring`, overrides it. The C code runs the whole beam
inside a group, without scores in memory, several times as fast as products and selection.

Letters: N vectors of d values; M codebooks of K entries; B hypotheses (beam).
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from vqdm.compiled import build
from vqdm.errors import UserError

log = logging.getLogger("vqdm")

ENVIRONMENT = "VQDM_SCORING"
PRECISIONS = {"triton": "ieee", "triton_tf32x3": "tf32x3", "triton_tf32": "tf32"}
PATHS = ("auto", "torch", "native", *PRECISIONS)

BestEntries = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]

SCORES_AT_ONCE = 2**27  # that torch holds where the kernel fails

SOURCE = Path(__file__).with_suffix(".c")
COMPILER_FLAGS = ("-O3", "-march=native")
SCORES_PER_THREAD = 2**22  # below this a second thread costs more than it gives

_wanted: str | None = None
_failed_shapes: dict[tuple, set[tuple]] = {}  # (device, path) → shapes


def set_scoring(path: str | None) -> None:
    """Score by one of `PATHS` from now on; None leaves it to the environment again. Raises UserError on another."""
    global _wanted
    _wanted = None if path is None else _known(path, "set_scoring")


def fused_scoring(vectors: Tensor) -> BestEntries | None:
    """`scoring_triton.best_entries` if it serves `vectors`, which are float32 then; else None: plain torch does.

    By default CUDA takes the kernel in full float32, or torch with a warning: where Triton does not work at all, and at
    shapes that the kernel fails at.

    Raises:
        UserError: the kernel is asked for by name and does not work.
    """
    path = _path(vectors)
    if path in ("torch", "native") or vectors.dtype != torch.float32:
        return None
    if reason := _failure(vectors.device, path):
        raise UserError(f"{ENVIRONMENT} is {path}, which does not work on {vectors.device}: {reason}")
    return partial(_kernel_or_torch, path)


def _kernel_or_torch(path: str, residuals: Tensor, codebook: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`scoring_triton.best_entries`, or `torch_best_entries` if the kernel has failed at this shape.

    Small problems work nearly always; with long vectors or wide beams a GPU may lack registers or shared memory.

    Raises:
        UserError: the kernel is asked for by name and fails.
    """
    device, (B, d), K = residuals.device, residuals.shape[-2:], codebook.shape[-2]
    failed = _failed_shapes.setdefault((device, path), set())
    if (B, d, K, count) not in failed:
        try:
            return _kernel(path)(residuals, codebook, count)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what a compiler or a driver may raise is not known
            words = f"for {B} hypotheses, {d} values and {K} entries on {device}: {_reason(error)}"
            if (_wanted or os.environ.get(ENVIRONMENT, "auto")) != "auto":
                raise UserError(f"{ENVIRONMENT} is {path}, which does not work {words}") from None
            level = logging.DEBUG if failed else logging.WARNING
            log.log(level, "scoring by torch, slower than Triton, which fails %s", words)
            failed.add((B, d, K, count))
    return torch_best_entries(residuals, codebook, count)


def torch_best_entries(residuals: Tensor, codebook: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`scoring_triton.best_entries` in plain torch, with products in float32; of equal distances any are taken."""
    K, norms = codebook.shape[-2], codebook.square().sum(-1)[..., None, None, :]  # [..., 1, 1, K]
    layers, at_once = residuals.shape[:-3].numel(), SCORES_AT_ONCE // (residuals.shape[-2] * K)
    found = []
    for part in residuals.split(max(1, at_once // layers), dim=-3):
        scores = part.square().sum(-1, keepdim=True) + norms - 2 * part @ codebook[..., None, :, :].mT  # [..., n, B, K]
        scores = scores.flatten(-2)
        found.append(scores.topk(min(count, scores.shape[-1]), dim=-1, largest=False, sorted=False))
    distances, picks = (torch.cat([one[k] for one in found], dim=-2) for k in range(2))
    return distances, picks // K, picks % K


def native_scoring(vectors: Tensor) -> bool:
    """Whether `native_codes` serves `vectors`: float32 on the CPU, where there is a compiler.

    Raises:
        UserError: it is asked for by name and does not work.
    """
    path = _path(vectors)
    if path != "native" or vectors.dtype != torch.float32:
        return False
    if vectors.device.type != "cpu":
        raise UserError(f"{ENVIRONMENT} is native, which is for the CPU, not for {vectors.device}")
    if reason := _native_failure():
        raise UserError(f"{ENVIRONMENT} is native, which does not work: {reason}")
    return True


def asked_for() -> str | None:
    """The one of `PATHS` that is asked for by name; None where the device decides. Raises UserError on another."""
    path = _wanted or _known(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)
    return None if path == "auto" else path


def _path(vectors: Tensor) -> str:
    """One of `PATHS` but "auto"."""
    if path := asked_for():
        return path
    if vectors.is_cuda:
        path = "triton" if _failure(vectors.device, "triton") is None else "torch"
    else:
        path = "native" if vectors.device.type == "cpu" and _native_failure() is None else "torch"
    _log_choice(vectors.device, path)
    return path


@cache
def _native_failure() -> str | None:
    """Why the C code cannot be used; None where it can."""
    try:
        native_library()
    except RuntimeError as error:
        return str(error)
    return None


def _known(path: str, source: str) -> str:
    if path not in PATHS:
        raise UserError(f"{source} is {path!r}; allowed are {', '.join(PATHS)}")
    return path


def _kernel(path: str) -> BestEntries:
    from vqdm.additive.scoring_triton import best_entries

    return partial(best_entries, precision=PRECISIONS[path])


@cache
def _failure(device: torch.device, path: str) -> str | None:
    """Why the kernel cannot be used on a device, found by trying it on a small problem; None where it can."""
    generator = torch.Generator().manual_seed(0)
    residuals, codebook = torch.randn(3, 2, 4, generator=generator), torch.randn(32, 4, generator=generator)
    wanted = torch.cdist(residuals.view(6, 4), codebook).square().view(3, 64).amin(1)
    try:
        found, _, _ = _kernel(path)(residuals.to(device), codebook.to(device), 1)
    except Exception as error:  # what a compiler or a driver may raise is not known
        return f"{type(error).__name__}: {_reason(error)}"
    return None if torch.allclose(found.cpu()[:, 0], wanted, rtol=0.02, atol=0.02) else "its results are wrong"


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@cache
def _log_choice(device: torch.device, path: str) -> None:
    """Once a device: what is used, and where that is not the fast backend, why."""
    if device.type == "cuda" and path == "torch":
        log.warning("scoring on %s: torch, slower than Triton, which fails: %s", device, _failure(device, "triton"))
    elif path == "torch" and device.type == "cpu":
        log.info("scoring on cpu: torch, slower than C, which fails: %s", _native_failure())
    else:
        log.log(logging.INFO if device.type == "cuda" else logging.DEBUG, "scoring on %s: %s", device, path)


# ------------------------------------------------------------------------------------------- C


class _Job(ctypes.Structure):
    """As in scoring.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("targets", "books", "columns", "norms", "codes")),
        *((name, ctypes.c_int64) for name in ("N", "K")),
        *((name, ctypes.c_int32) for name in ("M", "d", "B")),
    )


def native_codes(targets: Tensor, codebooks: Tensor, beam_size: int) -> Tensor:
    """Codes [..., N, M] as `encode.encode_vectors`, by the C code: float32 on the CPU, at most one leading dimension.

    Raises:
        RuntimeError: the C code cannot be compiled.
        MemoryError: there is no room for the hypotheses.
    """
    if targets.dim() == 3:
        return torch.stack([native_codes(*layer, beam_size) for layer in zip(targets, codebooks, strict=True)])
    codebooks = codebooks.contiguous()
    columns = (-2 * codebooks).transpose(1, 2).contiguous()  # [M, d, K]
    norms = codebooks.square().sum(2)  # [M, K]
    codes = torch.empty(len(targets), len(codebooks), dtype=torch.int64)
    run = partial(_encode, targets, codebooks, columns, norms, codes, beam_size)
    parts = _parts(len(targets), beam_size * norms.numel())
    if len(parts) == 1:
        run(parts[0])
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(run, parts))
    return codes


def _parts(count: int, scores: int) -> list[slice]:
    threads = max(1, min(torch.get_num_threads(), count * scores // SCORES_PER_THREAD))
    size = -(-count // threads)
    return [slice(start, start + size) for start in range(0, max(1, count), max(1, size))]


def _encode(
    targets: Tensor, codebooks: Tensor, columns: Tensor, norms: Tensor, codes: Tensor, beam_size: int, part: slice
) -> None:
    M, K, d = codebooks.shape
    some = targets[part].contiguous()
    pointers = (tensor.data_ptr() for tensor in (some, codebooks, columns, norms, codes[part]))
    if native_library().vqdm_encode(ctypes.byref(_Job(*pointers, len(some), K, M, d, beam_size))):
        raise MemoryError(f"no room for {beam_size} hypotheses of {M} codes and {d} values")


@cache
def native_library() -> ctypes.CDLL:
    """The compiled code. Raises RuntimeError where it cannot be made or loaded."""
    return build(SOURCE, COMPILER_FLAGS)
