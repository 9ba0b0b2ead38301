"""Linear maps and convolutions by a coded weight that save the code for the backward pass, never the weight.

Decoded weights lie in a scratch buffer that all layers share: one per device, dtype and stream, as large as the largest
weight. So they take the memory of one layer and no time to allocate.

Letters as in `vqdm.additive.code`; W the decoded matrix [O, I], E its gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqdm.additive.code import AdditiveCode
from vqdm.layers.decode import Stored, decode, pointwise

GROUPS_AT_ONCE = 2**14  # in the backward pass, whose intermediate tensors are then smaller than the weight


class Linear(NamedTuple):
    """y = x Wᵀ + bias, x [..., I]."""

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, W, bias)

    def backward(self, e: Tensor, x: Tensor, W: Tensor, needs: tuple[bool, bool, bool]) -> tuple:
        """Return the gradients of x, W and the bias that are needed, given that of y."""
        rows = e.reshape(-1, e.shape[-1])  # [..., O] → [N, O]
        return (
            e @ W if needs[0] else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )


class Convolution(NamedTuple):
    """A two-dimensional convolution of x [N, C, H, W] by a matrix [O, kh·kw·C], or [O, C·kh·kw] unless `taps_first`."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    taps_first: bool

    def kernel(self, W: Tensor) -> Tensor:
        """[O, I] → [O, C, kh, kw], without a copy."""
        if self.taps_first:
            return W.view(len(W), *self.kernel_size, -1).permute(0, 3, 1, 2)  # [O, kh, kw, C] → [O, C, kh, kw]
        return W.view(len(W), -1, *self.kernel_size)

    def matrix(self, kernel: Tensor) -> Tensor:
        """The inverse of `kernel`."""
        return (kernel.permute(0, 2, 3, 1) if self.taps_first else kernel).flatten(1)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.conv2d(x, self.kernel(W), bias, self.stride, self.padding, self.dilation)

    def backward(self, e: Tensor, x: Tensor, W: Tensor, needs: tuple[bool, bool, bool]) -> tuple:
        """Return the gradients of x, W and the bias that are needed, given that of y."""
        geometry = self.stride, self.padding, self.dilation, False, (0, 0), 1
        found = torch.ops.aten.convolution_backward(e, x, self.kernel(W), [len(W)], *geometry, needs)
        return found[0], self.matrix(found[1]) if needs[1] else None, found[2]


def coded(
    operation: Linear | Convolution, x: Tensor, stored: Stored, bias: Tensor | None, latent: Tensor | None = None
) -> Tensor:
    """Apply `operation` with the decoded weight in the dtype of `x`; the weight lies in the scratch buffer.

    The values of `latent` [O, I] are ignored, but it gets the weight's gradient: a stand-in for the weight in methods
    that change codes, such as PV-tuning (arXiv 2405.14852).
    """
    if torch.compiler.is_compiling():
        W = pointwise(stored).to(x.dtype)
        return operation.forward(x, W if latent is None else W + (latent - latent.detach()).to(x.dtype), bias)
    learned = (x, bias, stored.codebooks, stored.scales, stored.scale_values, stored.input_scales, latent)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in learned):
        fixed = stored._replace(scales=None, scale_codes=None, scale_values=None, codebooks=None, input_scales=None)
        return _DecodedTwice.apply(operation, fixed, x, bias, *stored.learnable(), latent)
    with scratch(stored.shape, x.dtype, x.device) as out:
        return operation.forward(x, decode(stored, x.dtype, out), bias)


class _DecodedTwice(torch.autograd.Function):
    """The operation with a backward pass that decodes again."""

    @staticmethod
    def forward(ctx: Any, operation, fixed: Stored, x, bias, codebooks, scales, input_scales, latent) -> Tensor:
        ctx.operation, ctx.fixed, ctx.biased = operation, fixed._replace(codes=None), bias is not None
        ctx.latent = None if latent is None else latent.dtype
        ctx.save_for_backward(x, fixed.codes, codebooks, scales, input_scales)
        stored = fixed._replace(codebooks=codebooks, scales=scales, input_scales=input_scales)
        with scratch(fixed.shape, x.dtype, x.device) as out:
            return operation.forward(x, decode(stored, x.dtype, out), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple:
        x, codes, codebooks, scales, input_scales = ctx.saved_tensors
        stored = ctx.fixed._replace(codes=codes, codebooks=codebooks, scales=scales, input_scales=input_scales)
        _, _, needs_x, needs_bias, *needs_code, needs_latent = ctx.needs_input_grad
        needs = needs_x, any(needs_code) or needs_latent, needs_bias and ctx.biased
        with scratch(stored.shape, x.dtype, x.device) as out:
            W = decode(stored, x.dtype, out) if needs_x else out
            grad_x, E, grad_bias = ctx.operation.backward(e, x, W, needs)
        parts = code_gradients(stored, E, tuple(needs_code)) if any(needs_code) else (None, None, None)
        return None, None, grad_x, grad_bias, *parts, E.to(ctx.latent) if needs_latent else None


def code_gradients(stored: Stored, E: Tensor, needs: tuple[bool, bool, bool]) -> tuple:
    """Return the gradients of codebooks, scales and input scales that are needed, given that of W = `E` [O, I].

    With v = Σ_m of entries, W = s·v·t: an entry gets the sum of E·s·t over the groups that use it, s that of E·v·t over
    what it scales, t that of E·s·v over the rows; 0 in columns of a trellis that have no bits, which are to stay zero.
    """
    code, (R, G) = stored.working(), stored.groups
    p, g = stored.spec.out_group_size, stored.spec.in_group_size
    books = code.codebooks.float().reshape(-1, p * g)  # [(G·)M·K, d]
    s = code.scales.float()[:, :, None, None]  # [R, S, 1, 1]
    t = torch.ones(G, 1, g, device=E.device) if code.input_scales is None else code.input_scales.float().view(G, 1, g)
    grad_books, grad_s, grad_t = torch.zeros_like(books), torch.zeros_like(s), torch.zeros_like(t)
    rows = max(1, GROUPS_AT_ONCE // G)
    for part in (slice(start, start + rows) for start in range(0, R, rows)):
        bags = entry_rows(code, part)
        e = E[part.start * p : part.stop * p].float().view(-1, p, G, g).transpose(1, 2)  # [r, G, p, g]
        if needs[0]:
            change = (e * s[part] * t).reshape(-1, p * g)  # [r·G, d]
            for column in bags.unbind(1):
                grad_books.index_add_(0, column, change)
        if needs[1] or needs[2]:
            v = torch.nn.functional.embedding_bag(bags, books, mode="sum").view_as(e)
            grad_s[part] = (e * v * t).sum((2, 3), keepdim=True).sum_to_size(grad_s[part].shape)
            grad_t += (e * v * s[part]).sum((0, 2)).unsqueeze(1)
    if stored.spec.is_trellis:
        grad_t[code.widths == 0] = 0
    return (
        grad_books.view_as(code.codebooks).to(code.codebooks.dtype) if needs[0] else None,
        grad_s.view_as(code.scales).to(code.scales.dtype) if needs[1] else None,
        grad_t.view(-1).to(code.input_scales.dtype) if needs[2] else None,
    )


def entry_rows(code: AdditiveCode, part: slice) -> Tensor:
    """Return the rows [r·G, M] of the codebooks [(G·)M·K, d] that the codes of the row groups `part` stand for."""
    G, M = code.codes.shape[1:]
    offset = torch.arange(M, device=code.codes.device) * code.spec.entries  # [M]
    if code.spec.groupwise_codebooks:
        offset = offset + torch.arange(G, device=code.codes.device)[:, None] * (M * code.spec.entries)  # [G, M]
    return (code.codes[part] + offset).view(-1, M)


# ------------------------------------------------------------------------------------------------ decoded weights


class DecodedWeight(Tensor):
    """The `weight` of a layer without a weight parameter: reads as any tensor; operations on it return plain tensors.

    Adapters are merged by assigning to `weight.data`. Here that would change a copy and lose the adapter silently, so
    it is an error.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        """The values, as a plain tensor."""
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise RuntimeError(
            "a quantized layer's weight is decoded from its codes and cannot be changed, so no adapter can be fused "
            "into it; keep the adapter separate, or call dequantize() on the model first"
        )


def decoded_weight(values: Tensor) -> DecodedWeight:
    """Return `values` as a `DecodedWeight`, sharing memory and gradients."""
    return values.as_subclass(DecodedWeight)


class _Buffer:
    """Memory, and its views by shape, made outside of inference mode: others could not be written to there."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        with torch.inference_mode(False):
            self.memory = torch.empty(torch.Size(shape).numel(), dtype=dtype, device=device)
        self._views: dict[tuple[int, ...], Tensor] = {}

    def view(self, shape: tuple[int, ...]) -> Tensor | None:
        """Return a tensor of `shape`; None if the memory is too small."""
        if shape not in self._views:
            count = torch.Size(shape).numel()
            if count > self.memory.numel():
                return None
            with torch.inference_mode(False):
                self._views[shape] = self.memory[:count].view(shape)
        return self._views[shape]


_idle: dict[tuple, _Buffer] = {}


class scratch:
    """`with scratch(shape, dtype, device) as out`: an uninitialised tensor that is valid inside.

    If the buffer is in use, a new one is allocated. Every call of every layer comes here, so it is quick.
    """

    __slots__ = ("_key", "_lent", "_shape")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self._shape, self._key = shape, (dtype, device, _stream(device))

    def __enter__(self) -> Tensor:
        self._lent = _idle.pop(self._key, None)  # one step, so that no two threads get the same
        out = self._lent and self._lent.view(self._shape)
        if out is None:
            self._lent = None  # the smaller one goes before the larger one comes
            self._lent = _Buffer(self._shape, *self._key[:2])
            out = self._lent.view(self._shape)
        return out

    def __exit__(self, *_) -> None:
        idle = _idle.get(self._key)
        if idle is None or idle.memory.numel() < self._lent.memory.numel():
            _idle[self._key] = self._lent


def free_scratch() -> None:
    """Free the buffers' memory; the next call of a layer allocates again."""
    _idle.clear()


def _stream(device: torch.device) -> int:
    """Return the stream, since work on another one may still read a buffer that is idle on this one."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
