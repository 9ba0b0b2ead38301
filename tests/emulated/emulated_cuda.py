"""Two emulated CUDA devices on a CPU, which find tensors on the wrong device before a GPU does.

    python tests/emulated/run_emulated.py SCRIPT ARGS...        or, in a process of its own: emulated_cuda.install()

Every tensor stays a plain CPU tensor, so that autograd, parameters, pickling and identity are torch's own. What lies
"on a GPU" is a *storage*: a registry holds those that were asked for there. `Tensor.device`, `.to`, the factories and
`torch.cuda` are replaced in Python, and a dispatch mode sees every operation, also those of backward passes: a CPU
tensor that meets a GPU tensor, or a tensor of the other GPU, raises what CUDA raises and is reported even if the
exception is caught. So is an operation without a CUDA kernel, a product of integers, a generator of another device,
and a Triton kernel that is launched while another device than that of its tensors is the current one. Results belong
to the GPU of the inputs. Tensors that C++ makes out of nothing (in formulas of backward passes) are "free": they join
what they meet first. `torch.autocast("cuda")` is that of the CPU with CUDA's float32 list on top.

Not emulated: streams and races, CUDA's rounding, running out of memory, and what C code does with a `data_ptr()`.

The environment variable EMUCUDA_REPORT names the file to which every violation is appended.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch._dynamo  # before the functions that it lists are replaced
from emulated_runtime import COUNT, Generator, current_device, emulate_runtime
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

CPU, FREE = "cpu", "free"  # places beside "cuda:0" and "cuda:1"
HOST = torch.device("cpu")
FACTORIES = shlex.split(
    """empty ones zeros full rand randn randint randperm arange range linspace logspace eye tensor as_tensor
    asarray empty_strided empty_permuted scalar_tensor tril_indices triu_indices normal hann_window empty_like
    zeros_like ones_like full_like rand_like randn_like randint_like"""
)
METHODS = shlex.split("new_empty new_zeros new_ones new_full new_tensor new_empty_strided")
ANYWHERE = ("copy_", "_to_copy", "_copy_from", "set_", "_has_compatible_shallow_copy_type")
INDEXING = ("index.Tensor", "index_put.default", "index_put_.default", "_index_put_impl_.default")
PRODUCTS = shlex.split("mm bmm addmm baddbmm addbmm addmv mv dot vdot convolution linear")
SCALARS_TOO = tuple(shlex.split("where masked_fill fill copy index_put _index_put_impl clamp masked_scatter _foreach"))
AUTOCAST_FLOAT32 = shlex.split(
    """exp log pow.Tensor_Scalar rsqrt reciprocal layer_norm group_norm mse_loss l1_loss smooth_l1_loss
    softmax.int log_softmax.int cumsum sum sum.dim_IntList norm.ScalarOpt_dim logsumexp cdist dist"""
)

_library = torch.library.Library("aten", "IMPL")
_places: dict[int, tuple[StorageWeakRef, str]] = {}  # address of a StorageImpl → (what keeps it from reuse, place)
_limit = [10_000]  # of `_places`, before entries of freed storages are dropped
_local = threading.local()  # .explicit: a factory was called from Python, so its result is not free
_violations: set[str] = set()
_real = {name: getattr(torch.Tensor, name) for name in ("to", "numpy", "__deepcopy__", "pin_memory")}


def on_gpu(where: str) -> bool:
    return where.startswith("cuda")


def place(tensor: torch.Tensor) -> str:
    """Where a tensor lies."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return FREE
    held = _places.get(tensor.untyped_storage()._cdata)
    return held[1] if held and not held[0].expired() else CPU


def put(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Say where a tensor's storage lies."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return tensor
    storage = tensor.untyped_storage()
    _places.pop(storage._cdata, None)
    if where != CPU:
        _places[storage._cdata] = (StorageWeakRef(storage), where)
    if len(_places) > _limit[0]:
        for key in [key for key, (ref, _) in _places.items() if ref.expired()]:
            del _places[key]
        _limit[0] = 2 * len(_places) + 10_000
    return tensor


def complain(message: str, kind: type[Exception] = RuntimeError) -> None:
    """Raise as CUDA does, and report where."""
    frames = [
        f for f in traceback.extract_stack()[:-1] if "emulated_" not in f.filename and "/torch/" not in f.filename
    ]
    block = message + "".join(f"\n    {f.filename}:{f.lineno} {f.name}: {f.line}" for f in frames[-7:]) + "\n"
    report = os.environ.get("EMUCUDA_REPORT")
    if report and block not in _violations:
        with open(report, "a") as file:
            file.write(f"VIOLATION {sys.argv}\n{block}\n")
    _violations.add(block)
    raise kind(message)


class Operation(NamedTuple):
    """What matters of an operation of torch: its name, and which rules it follows."""

    name: str
    anywhere: bool
    lists: bool
    indexing: bool
    copies: bool
    scalars: bool  # 0-dimensional inputs may lie on the CPU
    product: bool
    written: tuple[int, ...]
    kernel: bool

    @classmethod
    @functools.cache
    def of(cls, func) -> Operation:
        name = str(func).removeprefix("aten.")
        base = name.split(".")[0]
        arguments = enumerate(func._schema.arguments)
        return cls(
            name,
            base in ANYWHERE,
            base.startswith("_foreach"),
            name in INDEXING,
            "copy_" in name,
            base.startswith(SCALARS_TOO) or torch.Tag.pointwise in func.tags,
            base in PRODUCTS,
            tuple(k for k, one in arguments if one.alias_info and one.alias_info.is_write),
            _has_kernel(func.name()),
        )


class Emulation(TorchDispatchMode):
    """Sees every operation of its thread."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(leaves((args, kwargs), torch.Tensor))
        places = [place(x) for x in given]
        gpu = next(filter(on_gpu, places), None)
        if gpu:
            check(Operation.of(func), args, kwargs, given, places)
        out = func(*args, **kwargs)
        if gpu and FREE in places:  # what was free now belongs there; of a copy, only what is written
            op = Operation.of(func)
            for x in leaves([args[k] for k in op.written] if op.copies else given, torch.Tensor):
                if place(x) == FREE and x.dim():
                    put(x, gpu)
        where = gpu or (CPU if CPU in places or getattr(_local, "explicit", 0) else FREE)
        made = [x for x in leaves(out, torch.Tensor) if x.layout == torch.strided]
        if made:
            owned = {x.untyped_storage()._cdata for x in given if x.layout == torch.strided}
            for x in made:
                if x.untyped_storage()._cdata not in owned:
                    put(x, where)
        return out


def leaves(values, kind: type) -> Iterator:
    """All of a kind in nested tuples, lists and dictionaries."""
    if isinstance(values, kind):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from leaves(value, kind)
    elif isinstance(values, dict):
        yield from leaves(list(values.values()), kind)


def check(op: Operation, args: tuple, kwargs: dict, given: list[torch.Tensor], places: list[str]) -> None:
    """Raise where CUDA could not run an operation that has a GPU tensor among its inputs."""
    if op.anywhere:
        return
    if op.lists:
        check_lists(op.name, args)
        return
    if op.indexing and on_gpu(place(args[0])):  # its indices may lie on the CPU
        given = [args[0], *args[2:3]]
        places = list(map(place, given))
    gpus = {where for where in places if on_gpu(where)}
    written = (x for k in op.written for x in leaves(args[k : k + 1], torch.Tensor))
    if (
        len(gpus) > 1
        or any(where == CPU and (x.dim() or not op.scalars) for x, where in zip(given, places, strict=True))
        or any(place(x) == CPU for x in written)
    ):
        shapes = [(tuple(x.shape), where) for x, where in zip(given, places, strict=True)]
        complain(f"Expected all tensors to be on the same device, but {op.name} got {shapes}")
    if op.product and not any(x.is_floating_point() or x.is_complex() for x in given):
        complain(f'"{op.name}_cuda" not implemented for {given[0].dtype}')
    for generator in leaves((args, kwargs), torch._C.Generator):
        if str(generator.device) not in gpus:
            complain(f"Expected a {'/'.join(gpus)} generator but found one of {generator.device} in {op.name}")
    if not op.kernel:
        complain(f"Could not run '{op.name}' with arguments from the 'CUDA' backend", NotImplementedError)


def check_lists(name: str, args: tuple) -> None:
    """Raise where tensors at the same place of the lists of a `_foreach` operation lie on different devices."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor)]
    for group in zip(*lists, strict=True):
        places = {place(x) for x in group if x.dim() or on_gpu(place(x))} - {FREE}
        if len(places) > 1:
            complain(f"Expected all tensors to be on the same device, but {name} got {sorted(places)}")


def _has_kernel(name: str) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if "for_cpu" in name or "mkldnn" in name or not has("aten::mm", "CUDA"):  # a CPU build of torch knows nothing
        return True
    kinds = "ExplicitAutograd", "ImplicitAutograd", "ExplicitAutogradNonFunctional"
    return has(name, "CUDA") or any(has(name, f"Composite{kind}") for kind in kinds)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, where):
        ctx.back = place(x)
        return put(x.clone(), where)

    @staticmethod
    def backward(ctx, gradient):
        return put(gradient.clone(), ctx.back), None


def _where(device) -> str | None:
    """The place of a device, "cuda" being the current one; None for none, and for meta."""
    device = torch.device("cuda", device) if isinstance(device, int) else device and torch.device(device)
    if not device or device.type not in ("cuda", "cpu"):
        return None
    if device.type == "cpu":
        return CPU
    index = current_device() if device.index is None else device.index
    if index >= COUNT:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return f"cuda:{index}"


def _device_of(tensor: torch.Tensor) -> torch.device:
    where = place(tensor)
    return torch.device(where) if on_gpu(where) else HOST


def _to(self, *args, **kwargs):
    other = kwargs.pop("other", None)
    if args and isinstance(args[0], torch.Tensor):
        other, args = args[0], args[1:]
    if other is not None:
        kwargs |= {"device": other.device, "dtype": other.dtype}
    copy = kwargs.pop("copy", False)
    device, dtype, _, form = torch._C._nn._parse_to(*args[:3], **kwargs)
    where, dtype, more = _where(device), dtype or self.dtype, {} if form is None else {"memory_format": form}
    if self.is_meta or (device is not None and where is None):
        return _real["to"](self, device=HOST if where else device or self.device, dtype=dtype, copy=copy, **more)
    if where is None or where == place(self) or (where, place(self)) == (CPU, FREE):
        return _real["to"](self, dtype, copy=copy, **more)
    follows = torch.is_grad_enabled() and self.requires_grad
    return _real["to"](_Move.apply(self, where) if follows else put(self.detach().clone(), where), dtype, **more)


def _numpy(self, *, force=False):
    if on_gpu(place(self)) and not force:
        complain(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.", TypeError)
    return _real["numpy"](self, force=force)


def _pinned(self, *_, **__):
    if on_gpu(place(self)):
        complain("cannot pin a tensor of a GPU; only dense CPU tensors can be pinned")
    return self


def _factory(make):
    @functools.wraps(make)
    def made(*args, **kwargs):
        if make.__name__ in ("as_tensor", "asarray") and args and isinstance(args[0], torch.Tensor):
            given = {name: kwargs[name] for name in ("device", "dtype") if kwargs.get(name) is not None}
            return args[0].to(**given) if given else args[0]
        where = _where(kwargs.get("device"))
        kwargs |= {"device": HOST} if where else {}
        inputs = [place(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        target = where or next(filter(on_gpu, inputs), CPU)
        generator = kwargs.get("generator")
        if generator is not None and str(generator.device) != target:
            complain(f"Expected a '{target}' device type for generator but found '{generator.device}'")
        _local.explicit = getattr(_local, "explicit", 0) + 1
        try:
            out = make(*args, **kwargs)
        finally:
            _local.explicit -= 1
        return put(out, where) if where and isinstance(out, torch.Tensor) and kwargs.get("out") is None else out

    return made


def _in_float32(name, *args, **kwargs):
    """An operation that CUDA's autocast runs in float32."""
    args = [x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.half, torch.bfloat16) else x for x in args]
    base, _, overload = name.partition(".")
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return getattr(getattr(torch.ops.aten, base), overload or "default")(*args, **kwargs)


def check_launch(tensors: list[torch.Tensor]) -> None:
    """Raise where a Triton kernel is launched on another device than that of its tensors, or on the CPU's."""
    places = {place(tensor) for tensor in tensors}
    if places != {f"cuda:{current_device()}"}:
        complain(f"Triton kernel launched on cuda:{current_device()} with tensors of {', '.join(sorted(places))}")


def _watch_triton() -> None:
    """Check the device of every launch in Triton's interpreter, where Triton is there."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    launch = GridExecutor.__call__

    @functools.wraps(launch)
    def checked(self, *args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if any(on_gpu(place(x)) for x in tensors):
            check_launch(tensors)
        return launch(self, *args, **kwargs)

    GridExecutor.__call__ = checked


def _replace_tensor_methods() -> None:
    T, real = torch.Tensor, torch._C.TensorBase.device.__get__
    T.device = property(lambda self: real(self) if self.is_meta else _device_of(self))
    T.is_cuda = property(lambda self: on_gpu(place(self)))
    T.is_cpu = property(lambda self: not self.is_meta and not on_gpu(place(self)))
    T.get_device = lambda self: self.device.index if self.is_cuda else -1
    T.to, T.numpy, T.pin_memory = _to, _numpy, _pinned
    T.__deepcopy__ = lambda self, memo: put(_real["__deepcopy__"](self, memo), place(self))
    T.cuda = lambda self, device=None, *_, **__: _to(self, device="cuda" if device is None else device)
    T.cpu = lambda self, *_, **__: _to(self, device=HOST)
    T.is_pinned = lambda self, *_: False


def _load_file(real):
    @functools.wraps(real)
    def load_file(filename, device="cpu", **more):
        return {name: tensor.to(device) for name, tensor in real(filename, **more).items()}

    return load_file


def install() -> None:
    """Emulate the GPUs from now on, in all threads."""
    import safetensors.torch

    torch.utils._device._device_constructors()  # caches the functions that `with torch.device(...)` knows
    _replace_tensor_methods()
    for owner, name in [(torch, name) for name in FACTORIES] + [(torch.Tensor, name) for name in METHODS]:
        setattr(owner, name, _factory(getattr(owner, name)))
    torch.Generator = Generator
    for name in ("is_autocast_enabled", "set_autocast_enabled", "get_autocast_dtype", "set_autocast_dtype"):
        ask = getattr(torch, name)
        setattr(torch, name, lambda *args, ask=ask: ask(*(CPU if a == "cuda" else a for a in args or ("cuda",))))
    for name in AUTOCAST_FLOAT32:
        _library.impl(name, functools.partial(_in_float32, name), "AutocastCPU")
    safetensors.torch.load_file = _load_file(safetensors.torch.load_file)
    emulate_runtime()
    _watch_triton()
    run = threading.Thread.run

    def run_emulated(self):
        with Emulation():
            run(self)

    threading.Thread.run = run_emulated
    Emulation().__enter__()
