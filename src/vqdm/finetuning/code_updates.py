"""Train codes: accumulate steps on the decoded weights, and re-encode groups for which the steps are large enough.

The idea is PV-Tuning's (arXiv 2405.14852): the loss has a gradient E with respect to the decoded weight W, and codes
follow it in small parts of the matrix at a time. Here every weight has a drift u, a decaying sum of preconditioned
steps. Groups with a large drift are re-encoded towards W + u under the metric of the gradients, and the change of their
weights is subtracted from the drift.

A group of a trellis is a ring: a segment of a column, whose states are searched together.

Letters: O rows, I columns; p, g = out and in group size, T rows and 1 column of a trellis; R row groups, G column
groups; N groups that are re-encoded; E gradient [O, I].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqdm.additive.code import CodeSpec
from vqdm.additive.encode import nearest_moves, nearest_paths, ring_states, within
from vqdm.additive.trellis import UNITS
from vqdm.finetuning.config import CodeUpdateSettings
from vqdm.layers.quantized import QuantizedLayer, quantized_layers

SMALLEST = 1e-3  # smallest divisor among second moments, relative to their mean
DAMPING = 0.01  # of a metric, relative to its mean diagonal
FIRST_TRY = 0.25  # root mean square drift of a group, in units of the grid, at which it is first tried
NEXT_TRY = 1.25  # a group is tried again when its drift is this many times that of its last try


class CodeStep(NamedTuple):
    """Number of groups that were re-encoded in a step, and of those whose codes changed."""

    tried: int
    changed: int


@dataclass
class Drift:
    """The optimizer state of a layer's codes, in float32.

    Attributes:
        u: accumulated steps that the weights have not followed yet, [O, I].
        rows: average squared gradient of each row, [O].
        blocks: average of E_jᵀ E_j over the rows, [G, g, g].
        sizes: root mean square of each row's weights before training, [O].
        cells: 2^(−bits per weight) of the column groups, [G]; times `sizes` the unit of steps, the grid.
        norm: ‖W‖ before training, [].
        due: drift, as in `lengths`, above which a group is tried, [R, G].
    """

    u: Tensor
    rows: Tensor
    blocks: Tensor
    sizes: Tensor
    cells: Tensor
    norm: Tensor
    due: Tensor

    @classmethod
    def of(cls, layer: QuantizedLayer) -> Drift:
        W, spec = layer.decoded_matrix().detach(), layer.spec
        p, g = group_rows(spec), spec.in_group_size
        R, G = len(W) // p, W.shape[1] // g
        due = W.new_full((R, G), FIRST_TRY * (p * g) ** 0.5)
        if spec.is_trellis:
            due[:, layer.code_widths == 0] = torch.inf  # has no states to search
        blocks = W.new_zeros(G, g, g)
        return cls(
            torch.zeros_like(W), W.new_zeros(len(W)), blocks, W.square().mean(1).sqrt(), _cells(layer), W.norm(), due
        )

    def observe(self, E: Tensor, beta: float) -> None:
        """Update the averages with a gradient [O, I]."""
        groups = E.unflatten(1, self.blocks.shape[:2])  # [O, I] → [O, G, g]
        self.rows.lerp_(E.square().mean(1), 1 - beta)
        self.blocks.lerp_(torch.einsum("ogi,ogk->gik", groups, groups) / len(E), 1 - beta)

    def advance(self, E: Tensor, lr: float, memory: float, bias_correction: float) -> None:
        """u ← memory · u − lr · grid · E / √v, v the factored second moment (Adafactor, arXiv 1804.04235, §3).

        `bias_correction`: 1 − βᵗ, the factor by which the averages are too small.
        """
        g = self.blocks.shape[1]
        columns = self.blocks.diagonal(dim1=1, dim2=2).flatten()  # [I]
        mean = columns.mean()
        self.u.mul_(memory)
        if mean > 0:
            by_row = (self.rows / mean).clamp(min=SMALLEST).rsqrt() * self.sizes  # [O]
            by_column = (columns / mean).clamp(min=SMALLEST).rsqrt() * self.cells.repeat_interleave(g)  # [I]
            self.u.sub_(E * by_row[:, None] * by_column, alpha=lr * (bias_correction / mean.item()) ** 0.5)

    def by_group(self, p: int) -> Tensor:
        """Return a view of u: [O, I] → [R, p, G, g]."""
        return self.u.view(-1, p, *self.blocks.shape[:2])

    def lengths(self, p: int) -> Tensor:
        """Return the norm of each group's drift, in units of the grid: [R, G]."""
        unit = self.sizes.clamp(min=torch.finfo(self.sizes.dtype).tiny)
        length = torch.linalg.vector_norm(self.by_group(p), dim=3) / unit.view(-1, p, 1)  # [R, p, G]
        return torch.linalg.vector_norm(length, dim=1) / self.cells

    def pick(self, p: int, count: int) -> Tensor:
        """Return at most `count` groups (r·G + j) [N] to be tried, ascending: the most overdue; raises their `due`."""
        lengths = self.lengths(p).flatten()
        overdue, at = (lengths / self.due.flatten()).topk(count)
        at = at[overdue > 1].sort().values
        self.due.view(-1)[at] = NEXT_TRY * lengths[at]
        return at

    def row_weights(self, at: Tensor, p: int) -> Tensor:
        """Return damped mean squares of the rows of the groups `at` [N]: [N, p]."""
        rows = self.rows.view(-1, p)[at // len(self.blocks)]
        return rows + SMALLEST * rows.mean(1, keepdim=True)

    def reset_due(self, at: Tensor, p: int) -> None:
        """Reset `due` of the groups `at` [N], which have changed."""
        self.due.view(-1)[at] = FIRST_TRY * (p * self.blocks.shape[1]) ** 0.5

    def metrics(self, at: Tensor, p: int) -> Tensor:
        """Return metrics [N, g, g] of groups `at` [N]: damped block of the column group, times mean square of rows."""
        G = len(self.blocks)
        size = self.blocks.diagonal(dim1=1, dim2=2).mean(1)  # [G]
        damping = DAMPING * size.clamp(min=SMALLEST * size.mean())
        damped = self.blocks + torch.diag_embed(damping[:, None].expand(-1, self.blocks.shape[1]))
        return damped[at % G] * self.rows.view(-1, p).mean(1)[at // G, None, None]


class CodeUpdates:
    """Changes the codes of a model's quantized layers by steps on the decoded weights.

    Every layer gets a `latent` that collects E in `.grad`. Nothing is random: with the same gradients all processes
    make the same changes. A weight takes 8 bytes in training: its gradient and its drift.

    Raises:
        ValueError: the model has no quantized layer.
    """

    def __init__(self, unet: nn.Module, settings: CodeUpdateSettings | None = None):
        self.settings, self.layers, self.steps = settings or CodeUpdateSettings(), quantized_layers(unet), 0
        if not self.layers:
            raise ValueError("the model has no quantized layer whose codes could change")
        self.drifts = {name: Drift.of(layer) for name, layer in self.layers.items()}
        self.first = {name: layer.codes.detach().clone() for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.latent = _placeholder(self.drifts[name].u)

    def latents(self) -> list[Tensor]:
        """Return the tensors that collect the gradients of the decoded weights, layer by layer."""
        return [layer.latent for layer in self.layers.values()]

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the decoded weights [O, I], layer by layer; zeros for a layer without one."""
        for layer in self.layers.values():
            if layer.latent.grad is None:
                layer.latent.grad = torch.zeros(layer.latent.shape, device=layer.latent.device)
        return [layer.latent.grad for layer in self.layers.values()]

    def zero_grad(self) -> None:
        """Delete the gradients."""
        for layer in self.layers.values():
            layer.latent.grad = None

    @torch.no_grad()
    def step(self, lr: float = 1.0) -> CodeStep:
        """Take one step: move the drifts along the gradients, by `lr` times `code_lr`, and re-encode the due groups.

        To be called after the continuous optimizer's step, with gradients that are the same on all processes.
        """
        self.steps += 1
        work = zip(self.layers.values(), self.drifts.values(), self.gradients(), strict=True)
        steps = [self._step(layer, drift, E, lr) for layer, drift, E in work]
        return CodeStep(*map(sum, zip(*steps, strict=True)))

    def _step(self, layer: QuantizedLayer, drift: Drift, E: Tensor, lr: float) -> CodeStep:
        settings = self.settings
        drift.observe(E, settings.code_beta)
        drift.advance(E, lr * settings.code_lr, settings.code_memory, 1 - settings.code_beta**self.steps)
        p = group_rows(layer.spec)
        at = drift.pick(p, math.ceil(settings.code_fraction * drift.due.numel()))
        return self._encode(layer, drift, at) if len(at) else CodeStep(0, 0)

    def _encode(self, layer: QuantizedLayer, drift: Drift, at: Tensor) -> CodeStep:
        """Re-encode the groups `at` [N] towards W + u."""
        code, p, G = layer.code(), group_rows(layer.spec), len(drift.blocks)
        targets = drift.by_group(p)[at // G, :, at % G]  # [N, p, g]
        if layer.spec.is_trellis:
            move = nearest_paths(code, at, targets, drift.row_weights(at, p))
        else:
            move = nearest_moves(code, at, targets, drift.metrics(at, p), self.settings.code_beam_size)
        made = within((self.settings.code_trust_ratio * drift.norm).square(), move)
        drift.by_group(p)[at // G, :, at % G] = torch.where(made[:, None, None], targets - move.moved, targets)
        drift.reset_due(at[made], p)
        codes = code.codes.clone()  # [R, G, M]
        by_group(codes, layer.spec)[at[made] // G, at[made] % G] = move.codes[made].to(codes.dtype)
        layer.set_codes(codes)
        return CodeStep(len(at), int(made.sum()))

    def changed_groups(self) -> CodeStep:
        """Count all groups, and those with other codes than before training."""
        tried = changed = 0
        for name, layer in self.layers.items():
            differs = by_group(layer.code().codes != _unpacked(layer, self.first[name]), layer.spec).any(2)  # [R, G]
            tried, changed = tried + differs.numel(), changed + int(differs.sum())
        return CodeStep(tried, changed)

    def restart(self) -> None:
        """Reset all drifts and averages; codes stay."""
        self.steps = 0
        for name, layer in self.layers.items():
            for key, value in vars(Drift.of(layer)).items():
                getattr(self.drifts[name], key).copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything the next step depends on, besides the model."""
        held = {f"{name}.{key}": value for name, drift in self.drifts.items() for key, value in vars(drift).items()}
        held |= {f"{name}.first": codes for name, codes in self.first.items()}
        return {"steps": torch.tensor(self.steps)} | held

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`, bit for bit. Raises KeyError or RuntimeError if it is of another model."""
        self.steps = int(state["steps"])
        for name, drift in self.drifts.items():
            for key, value in (vars(drift) | {"first": self.first[name]}).items():
                value.copy_(state[f"{name}.{key}"])

    def close(self) -> None:
        """Remove the latents from the layers."""
        for layer in self.layers.values():
            layer.latent = None


def _cells(layer: QuantizedLayer) -> Tensor:
    """Return 2^(−bits per weight) of the column groups of a layer: [G]."""
    code, spec = layer.code(), layer.spec
    G = code.codes.shape[1]
    bits = (
        code.codes.new_full((G,), spec.num_codebooks * spec.nbits_per_codebook) if code.widths is None else code.widths
    )
    if spec.is_trellis:
        bits = bits / UNITS
    return 2 ** (-bits.float() / (spec.out_group_size * spec.in_group_size))


def group_rows(spec: CodeSpec) -> int:
    """Return the number of rows of a group of codes that change together."""
    return spec.segment_rows or spec.out_group_size


def by_group(codes: Tensor, spec: CodeSpec) -> Tensor:
    """Return a view of codes [R, G, M] by groups that change together; for a trellis, states [S, I, T]."""
    return ring_states(codes, spec.segment_rows) if spec.is_trellis else codes


def _unpacked(layer: QuantizedLayer, packed: Tensor) -> Tensor:
    """Unpack codes [R, G, M] of a layer's format."""
    code = layer.code()
    return layer.spec.unpacked(*code.codes.shape[:2], packed, code.widths)


def _placeholder(like: Tensor) -> Tensor:
    """Return a leaf tensor of the shape of `like` that stores one number; only its gradient takes memory."""
    return torch.zeros((), device=like.device).expand(like.shape).requires_grad_()
