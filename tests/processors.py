"""Other processors, played on this one: for tests that must not rest on the luck of the machine they were written on.

Matrix products are exact only up to rounding. The last bits depend on the processor, the number of threads, the sizes
of the product, and with some processors on where its operands lie: torch allocates at multiples of 64 bytes, while
tensors mapped from a safetensors file lie anywhere. Two switches, for a whole run of the tests:

VQDM_TEST_ODD_ADDRESSES=1   tensors from safetensors files lie between the multiples of 64 bytes
VQDM_TEST_PERTURB=1         products have other last bits for other sizes and for other addresses of their operands

What is computed twice in one way is equal also here; what is computed in two ways is not.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; what torch allocates at, and what vector instructions like
ATEN = torch.ops.aten

# ------------------------------------------------------------------------------------------------------- addresses


def odd_copy(tensor: Tensor) -> Tensor:
    """An equal tensor whose address is a multiple of its element size, but not of the size of a vector register."""
    size, offset = tensor.element_size(), 56 if tensor.element_size() == 8 else 64 - 2 * tensor.element_size()
    raw = torch.empty(tensor.numel() * size + ALIGNMENT, dtype=torch.uint8)  # itself at a multiple of ALIGNMENT
    placed = raw[offset : offset + tensor.numel() * size].view(tensor.dtype).view(tensor.shape)
    return placed.copy_(tensor)


def is_odd(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT != 0


class _OddFile:
    """`safetensors.safe_open` whose tensors on the CPU lie at odd addresses."""

    def __init__(self, *args, **kwargs):
        self._file = _REAL(*args, **kwargs)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *args):
        return self._file.__exit__(*args)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def get_tensor(self, name: str):
        return _odd(self._file.get_tensor(name))

    def get_tensors(self):
        return {name: self.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118

    def get_slice(self, name: str):
        return _OddSlice(self._file.get_slice(name))


class _OddSlice:
    def __init__(self, part):
        self._part = part

    def __getattr__(self, name: str):
        return getattr(self._part, name)

    def __getitem__(self, index):
        return _odd(self._part[index])


_REAL = safetensors.safe_open


def _odd(found):
    return odd_copy(found) if isinstance(found, Tensor) and found.device.type == "cpu" else found


def _replace_everywhere(old: type, new: type) -> None:
    """Put `new` where a module holds `old` as its `safe_open`."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("safe_open") is old:
            module.safe_open = new


@contextlib.contextmanager
def odd_addresses() -> Iterator[None]:
    """Within, every tensor that is read from a safetensors file lies at an odd address."""
    if safetensors.safe_open is not _REAL:  # switched on for all
        yield
        return
    _replace_everywhere(_REAL, _OddFile)
    try:
        yield
    finally:
        _replace_everywhere(_OddFile, _REAL)


# ------------------------------------------------------------------------------------------------------- last bits


def _key(name: str, operands: list[Tensor]) -> int:
    """A number that follows from an operation, the sizes of its operands, and where they lie."""
    about = [name, str(operands[0].dtype)]
    for operand in operands:
        about += [str(tuple(operand.shape)), str(operand.data_ptr() % ALIGNMENT)]
    return zlib.crc32("|".join(about).encode())


def _perturbed(out: Tensor, exact: Tensor, squares: Tensor, key: int) -> Tensor:
    """`out`, elements moved by about one unit in the last place of what was added up; never those without a sum.

    Args:
        exact: `out` in float64. What every order of adding gives exactly is left alone.
        squares: the sum of the squared terms, in float64. What has only one term is left alone.
    """
    if not out.numel() or out.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return out
    seldom = 1.0 if out.dtype != torch.bfloat16 else 0.02  # 16 bits seldom show what 32 add up to
    choice = torch.rand(out.shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
    signs = torch.where(choice < seldom / 3, 1.0, torch.where(choice > 1 - seldom / 3, -1.0, 0.0))
    inexact = out.double() != (exact if out.dtype != torch.float64 else out.round())
    several = (squares - exact.square()).abs() > 1e-12 * squares
    moved = out + signs * torch.finfo(out.dtype).eps * squares.sqrt()
    return torch.where(inexact & several & out.isfinite(), moved.to(out.dtype), out)


def _product(name: str):
    """The operation `name` of aten on the CPU, computed by its form with `out` and then perturbed."""
    plain = getattr(ATEN, name).out

    def perturbed(*operands, **scalars):
        with torch.no_grad():
            out, exact, squares = (operands[0].new_empty(0, dtype=t) for t in (None, torch.float64, torch.float64))
            plain(*operands, **scalars, out=out)
            if not out.is_floating_point():
                return out
            wide = [operand.double() for operand in operands]
            plain(*wide, **scalars, out=exact)
            plain(*(one.square() for one in wide), **{key: value**2 for key, value in scalars.items()}, out=squares)
            return _perturbed(out, exact, squares, _key(name, operands))

    return perturbed


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *settings) -> Tensor:
    def plain(operands: list[Tensor]) -> Tensor:
        x, weight, bias = [*operands, None][:3]
        return ATEN._convolution(x, weight, bias, *settings, False, False, True, True)

    with torch.no_grad():
        operands = [operand for operand in (x, weight, bias) if operand is not None]
        wide = [operand.double() for operand in operands]
        exact, squares = plain(wide), plain([one.square() for one in wide])
        return _perturbed(plain(operands), exact, squares, _key("convolution", operands))


@contextlib.contextmanager
def other_last_bits() -> Iterator[None]:
    """Within, products on the CPU, of all threads, have other last bits for other sizes and addresses."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every operation that is replaced
        for name in ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv"):
            library.impl(name, _product(name), "CPU")
        library.impl("convolution", _convolution, "CPU")
    try:
        yield
    finally:
        library._destroy()


def from_environment() -> None:
    """Switch on what the environment asks for, in this process until it ends, and in those that it starts."""
    wanted = [switch for name, switch in SWITCHES.items() if os.environ.get(name, "0") not in ("", "0")]
    for switch in wanted:
        _KEPT.enter_context(switch())
    if wanted:
        atexit.register(_KEPT.close)  # while the modules still have their names
        os.environ["PYTHONPATH"] = path_of_started_programs()


def path_of_started_programs() -> str:
    """PYTHONPATH on which Python switches on what the environment asks for as it starts."""
    tests = Path(__file__).parent
    return os.pathsep.join([str(tests / "started_programs"), str(tests), os.environ.get("PYTHONPATH", "")])


SWITCHES = {"VQDM_TEST_ODD_ADDRESSES": odd_addresses, "VQDM_TEST_PERTURB": other_last_bits}
_KEPT = contextlib.ExitStack()
