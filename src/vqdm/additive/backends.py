"""Which code scores codebook entries and selects the best: plain torch, a page of C, or on CUDA the Triton kernel.

This is the one place that decides. `VQDM_SCORING`, or `set_scoring`, overrides it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from vqdm.additive import encode_cpu
from vqdm.errors import UserError

log = logging.getLogger("vqdm")

ENVIRONMENT = "VQDM_SCORING"
PRECISIONS = {"triton": "ieee", "triton_tf32x3": "tf32x3", "triton_tf32": "tf32"}
PATHS = ("auto", "torch", "native", *PRECISIONS)

BestEntries = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]

SCORES_AT_ONCE = 2**27  # that torch holds where the kernel fails

_wanted: str | None = None
_failed_shapes: dict[tuple, set[tuple]] = {}  # (device, path) → shapes


def set_scoring(path: str | None) -> None:
    """Score by one of `PATHS` from now on; None leaves it to the environment again. Raises UserError on another."""
    global _wanted
    _wanted = None if path is None else _known(path, "set_scoring")


def fused_scoring(vectors: Tensor) -> BestEntries | None:
    """`kernels.best_entries` where it serves `vectors`, else None: plain torch does, and always for other than float32.

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
    """`kernels.best_entries`, or `torch_best_entries` if the kernel has failed at this shape.

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
    """`kernels.best_entries` in plain torch, with products in float32; of equal distances any are taken."""
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
    """Whether `encode_cpu.encode` serves `vectors`: float32 on the CPU, where there is a compiler.

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
    _say(vectors.device, path)
    return path


@cache
def _native_failure() -> str | None:
    """Why the C code cannot be used; None where it can."""
    try:
        encode_cpu.library()
    except RuntimeError as error:
        return str(error)
    return None


def _known(path: str, source: str) -> str:
    if path not in PATHS:
        raise UserError(f"{source} is {path!r}; allowed are {', '.join(PATHS)}")
    return path


def _kernel(path: str) -> BestEntries:
    from vqdm.additive.encode_triton import best_entries

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
def _say(device: torch.device, path: str) -> None:
    """Once a device: what is used, and where that is not the fast backend, why."""
    if device.type == "cuda" and path == "torch":
        log.warning("scoring on %s: torch, slower than Triton, which fails: %s", device, _failure(device, "triton"))
    elif path == "torch" and device.type == "cpu":
        log.info("scoring on cpu: torch, slower than C, which fails: %s", _native_failure())
    else:
        log.log(logging.INFO if device.type == "cuda" else logging.DEBUG, "scoring on %s: %s", device, path)
