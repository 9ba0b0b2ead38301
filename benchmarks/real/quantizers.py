"""What other methods make of a layer: a function of its weight and the second moments of its inputs.

`QUANTIZERS[name](weight, H)` returns the weight as it is decoded, in its shape, and the bits that are stored for it.
Libraries where they work on a CPU: GGUF's formats by ggml's own library (in the package pywhispercpp), SDNQ, HQQ. NF4,
rounding to integers and GPTQ are plain computations of what is published, here.

Scales are of 16 bits, zero points of integers as wide as these. Groups of the plain methods run along a row, taps of
a convolution outermost.

Letters: O rows, I columns.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from vqdm.diffusion.blocks import weight_of

Quantizer = Callable[[Tensor, Tensor], tuple[Tensor, int]]

# Levels of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
NF4_BLOCK = 64  # weights that share a scale
HQQ_GROUP = 64
SHRINKS = torch.linspace(1.0, 0.3, 29)  # of a group's range, that clipping tries
GPTQ_DAMPING = 0.01  # of the diagonal's mean
GPTQ_BLOCK = 128  # columns whose feedback to later ones is summed before it is applied
GGML = {"Q4_0": (2, 32), "Q2_K": (10, 256), "Q3_K": (11, 256)}  # number of the type, weights of a block


def matrix(weight: Tensor) -> Tensor:
    """A weight as [O, I], a convolution's taps outermost; the inverse of `vqdm.diffusion.blocks.weight_of`."""
    return (weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight).reshape(len(weight), -1)


def unmatrix(found: Tensor, weight: Tensor) -> Tensor:
    return weight_of(found, weight.shape, True)


# ------------------------------------------------------------------------------------------------ plain computations


def bfloat16(weight: Tensor, H: Tensor) -> tuple[Tensor, int]:
    """Rounded to bfloat16."""
    return weight.to(torch.bfloat16).float(), 16 * weight.numel()


def nf4(weight: Tensor, H: Tensor) -> tuple[Tensor, int]:
    """Rounded to NF4 with a float16 scale for every block."""
    blocks, levels = matrix(weight).reshape(-1, NF4_BLOCK), torch.tensor(NF4)
    scales = blocks.abs().amax(1, keepdim=True).half().float()
    units = blocks / torch.where(scales == 0, 1.0, scales)
    nearest = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2)
    found = (levels[nearest] * scales).view(len(weight), -1)
    return unmatrix(found, weight), 4 * weight.numel() + 16 * len(blocks)


def round_to_nearest(weight: Tensor, H: Tensor, bits: int, group: int) -> tuple[Tensor, int]:
    """Rounded to integers, the range of a group from its least to its largest value."""
    groups = matrix(weight).reshape(-1, group)
    scale, zero = grid(groups, bits)
    found = rounded(groups, scale, zero, bits).view(len(weight), -1)
    return unmatrix(found, weight), bits * weight.numel() + (16 + bits) * len(groups)


def grid(groups: Tensor, bits: int, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of values [..., g], whose range has zero inside."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) * shrink / (2**bits - 1)).half().float()
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (-low * shrink / scale).round().clamp(0, 2**bits - 1)


def rounded(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((values / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def clipped_grid(groups: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of the shrunk range with the least error, weighted by `importance` [..., g]."""
    best_scale, best_zero = grid(groups, bits)
    least = torch.full_like(best_scale, torch.inf)
    for shrink in SHRINKS.tolist():
        scale, zero = grid(groups, bits, shrink)
        error = ((rounded(groups, scale, zero, bits) - groups).square() * importance).sum(-1, keepdim=True)
        better = error < least
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        least = torch.where(better, error, least)
    return best_scale, best_zero


def gptq(weight: Tensor, H: Tensor, bits: int, group: int) -> tuple[Tensor, int]:
    """GPTQ (arXiv 2210.17323): columns by falling diagonal of H (act-order), groups of the columns' own order.

    A group's grid is found before, from the weights as they are, clipped where that lowers the error weighted by H's
    diagonal; so no index of groups is stored. The last group of a row may be smaller.
    """
    W = matrix(weight)
    I, groups = W.shape[1], -(-W.shape[1] // group)  # noqa: E741
    shape = len(W), groups, group
    padded = torch.nn.functional.pad(W, (0, groups * group - I)).view(shape)
    importance = torch.nn.functional.pad(H.diagonal(), (0, groups * group - I)).view(groups, group)
    scale, zero = (one.expand(shape).flatten(1)[:, :I] for one in clipped_grid(padded, importance, bits))
    order = H.diagonal().argsort(descending=True)
    damped = H[order][:, order].clone()
    damped.diagonal().add_(GPTQ_DAMPING * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    U = torch.linalg.cholesky(inverse, upper=True)
    left, scale, zero = (one[:, order].T.contiguous() for one in (W, scale, zero))  # [I, O], one after another
    coded = torch.empty_like(left)
    for start in range(0, I, GPTQ_BLOCK):
        block = slice(start, min(start + GPTQ_BLOCK, I))
        errors = torch.empty_like(left[block])
        for j in range(block.start, block.stop):
            coded[j] = rounded(left[j], scale[j], zero[j], bits)
            errors[j - start] = (left[j] - coded[j]) / U[j, j]
            left[j + 1 : block.stop] -= U[j, j + 1 : block.stop, None] * errors[j - start]
        left[block.stop :] -= U[block, block.stop :].T @ errors
    found = coded.T[:, order.argsort()]
    return unmatrix(found, weight), bits * W.numel() + (16 + bits) * groups * len(W)


# ------------------------------------------------------------------------------------------------ libraries


@cache
def _ggml() -> ctypes.CDLL:
    folder = next((one for one in map(Path, sys.path) if (one / "libggml-base.so").is_file()), None)
    if folder is None:
        raise ImportError("no libggml-base.so; it comes with the package pywhispercpp")
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def gguf(weight: Tensor, H: Tensor, kind: str, weighted: bool = False) -> tuple[Tensor, int]:
    """A format of GGUF, by ggml; with H's diagonal as its importance matrix if `weighted`.

    Blocks run on into the next row where a row is no multiple of 256 weights, for which llama.cpp has other formats.
    """
    library, (number, block) = _ggml(), GGML[kind]
    blocks = matrix(weight).reshape(-1, block).contiguous()  # [N, block]
    importance = H.diagonal().repeat(len(weight)).view(blocks.shape).contiguous()
    codes = torch.zeros(blocks.numel() + 64, dtype=torch.uint8)  # no format takes more than a byte per weight
    rows, count, size = (1, len(blocks), 0) if weighted else (len(blocks), 1, 0)
    for k in range(count):
        some = blocks[k * rows].data_ptr(), codes.data_ptr() + size
        given = importance[k].data_ptr() if weighted else None
        size += library.ggml_quantize_chunk(number, *some, 0, rows, block, given)
    found = torch.empty_like(blocks)
    decode = getattr(library, f"dequantize_row_{kind[0].lower()}{kind[1:]}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode(codes.data_ptr(), found.data_ptr(), found.numel())
    return unmatrix(found.view(len(weight), -1), weight), 8 * size


def hqq(weight: Tensor, H: Tensor, bits: int) -> tuple[Tensor, int]:
    """HQQ (Badri and Shaji, 2023), by its library; scale and zero point of a group of 64 in float16."""
    from hqq.core.quantize import Quantizer as Library

    given = matrix(weight).contiguous()
    options = dict(nbits=bits, group_size=HQQ_GROUP, axis=1, device="cpu", compute_dtype=torch.float32, bitpack=False)
    codes, meta = Library.quantize(given, **options)
    scale, zero = (meta[name].half().float() for name in ("scale", "zero"))
    found = ((codes.float() - zero) * scale).view(given.shape)
    return unmatrix(found, weight), bits * weight.numel() + 16 * (scale.numel() + zero.numel())


def sdnq(weight: Tensor, H: Tensor, bits: int, **options: bool) -> tuple[Tensor, int]:
    """SDNQ's unsigned integers with its own choice of groups; float32 numbers are charged at 16 bits."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
    from sdnq.quantizer import sdnq_quantize_layer_weight

    kind = "Conv2d" if weight.dim() == 4 else "Linear"
    dequantizer, parts = sdnq_quantize_layer_weight(weight.clone(), kind, weights_dtype=f"uint{bits}", **options)
    stored = [one for one in parts.values() if isinstance(one, Tensor)]
    widths = [min(2, one.element_size()) if one.is_floating_point() else one.element_size() for one in stored]
    size = sum(one.numel() * width for one, width in zip(stored, widths, strict=True))
    found = dequantizer(**parts)
    return found.float().view(weight.shape), 8 * size


def quantizers(group: int) -> dict[str, Quantizer]:
    """All of them by name; `group`: columns of GPTQ's groups."""
    found: dict[str, Quantizer] = {
        "rounded to bfloat16": bfloat16,
        "NF4, block 64": nf4,
        "int4, group 64": partial(round_to_nearest, bits=4, group=64),
        "int4, group 32": partial(round_to_nearest, bits=4, group=32),
        **{f"GGUF {kind}": partial(gguf, kind=kind) for kind in GGML},
        **{f"GGUF {kind}, importance": partial(gguf, kind=kind, weighted=True) for kind in ("Q2_K", "Q3_K")},
        **{f"HQQ {bits} bits": partial(hqq, bits=bits) for bits in (2, 3, 4)},
    }
    for bits in (2, 3, 4):
        found[f"GPTQ int{bits}, group {group}"] = partial(gptq, bits=bits, group=group)
    for name in ("", "svd", "hadamard", "codebook"):
        options = {f"use_{name}": True} if name else {}
        label = f", {name.upper() if name == 'svd' else name}" if name else ""
        found |= {f"SDNQ uint{bits}{label}": partial(sdnq, bits=bits, **options) for bits in (2, 3, 4)}
    return found
